"""weights/<name>/: what ``make import-hf`` leaves, ready for ``--load``.

weights.json                       what it is: the model, where it came from, upstream's arguments
                                   for it
latest_checkpointed_iteration.txt  upstream's tracker; says ``release``: weights alone, iteration 0
release/                           the torch_dist checkpoint, loadable under any TP, PP and EP
hf/                                config.json and the tokenizer, as they came
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from harness import ROOT
from harness.data.data_sets import Blend
from harness.errors import UserError
from harness.experiment.model import Model
from harness.system.files import expanded

_ONLY_TRAINING = ("dropout", "init_method_std", "moe_aux_loss_coeff", "moe_z_loss_coeff")
_TRAINING = (
    *_ONLY_TRAINING,
    "name",
    "ffn_hidden_size",
    "num_query_groups",
    "kv_channels",
    "moe_ffn_hidden_size",
)
"""Fields of a model that its weights do not depend on, or whose defaults say the same in another
way."""
WEIGHTS = ROOT / "weights"
RECORD, RELEASE, HF = "weights.json", "release", "hf"


class Weights(BaseModel):
    """weights.json.

    Attributes:
        source: HF= as it was given.
        positions: the longest sequence.
        padded_vocab_size: rows of the vocabulary with those added; upstream takes as many as it
        needs.
        dequantized: tensors that were MXFP4 and are bf16 here.
        flags: upstream's arguments for the model; what a run adds is its --seq-length.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    source: str
    architecture: str
    model: Model
    positions: int
    padded_vocab_size: int
    parameters: int
    bytes: int
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...]
    dequantized: int
    tokenizer: bool
    flags: tuple[str, ...]


def names() -> list[str]:
    """What was imported, by name."""
    return sorted(path.parent.name for path in WEIGHTS.glob(f"*/{RECORD}"))


def read(folder: Path) -> Weights | None:
    """What the folder of an import says of itself; None where it is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        return Weights.model_validate_json((folder / RECORD).read_bytes(), strict=False)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        raise UserError(
            f"{folder / RECORD} is damaged: {error.errors()[0]['msg']}\nimport it again"
        ) from None


def find(named: str) -> tuple[Path, Weights] | None:
    """What ``WEIGHTS=named`` is of imported weights: a name in weights/, else a folder
    (``./name``); None: it is neither.

    Raises:
        UserError: it is damaged.
    """
    for folder in ([WEIGHTS / named] if "/" not in named else []) + [expanded(named)]:
        if known := read(folder):
            return folder.resolve(), known
    return None


def differences(trained: Model, model: Model) -> dict[str, tuple[object, object]]:
    """In what ``model`` cannot take the weights of ``trained``: field -> both values.

    What only training is about (dropout, initial weights, losses of the router) may differ.
    """
    widths = ("query_size", "key_size", "ffn", *(["moe_ffn"] if trained.num_experts else []))
    return _pairs(
        trained, model, (*widths, *(name for name in Model.model_fields if name not in _TRAINING))
    )


def training_differences(trained: Model, model: Model) -> dict[str, tuple[object, object]]:
    """In what else the two differ, that only training is about: field -> both values."""
    return _pairs(trained, model, _ONLY_TRAINING)


def _pairs(trained: Model, model: Model, names: Sequence[str]) -> dict[str, tuple[object, object]]:
    both = {name: (getattr(trained, name), getattr(model, name)) for name in names}
    return {name: (there, here) for name, (there, here) in both.items() if there != here}


def check_data(model: Model, tokenizer: Path | None, blend: Blend) -> None:
    """Refuse data that another tokenizer made than the one in the folder ``tokenizer``, which
    ``model`` was trained with.

    Where that one is not known (None), only the number of tokens is compared.

    Raises:
        UserError: an id means different tokens in the two, or is beyond the model's vocabulary.
    """
    from harness.convert.hub import vocabulary_of

    data = blend.sets[0]
    again = (
        "prepare it again with"
        f" TOKENIZER={tokenizer or 'the folder of the tokenizer of the weights'}"
    )
    if data.vocab_size and data.vocab_size > model.vocab_size:
        raise UserError(
            f"DATA={data.name} has {data.vocab_size:,} tokens, {model.name} knows"
            f" {model.vocab_size:,}\n{again}"
        )
    ours = vocabulary_of(tokenizer) if tokenizer else None
    theirs = (
        vocabulary_of(data.tokenizer_model)
        if data.tokenizer_model and data.tokenizer_model.is_dir()
        else None
    )
    if ours is None or theirs is None:
        return
    if differing := [token for token, number in theirs.items() if ours.get(token) != number]:
        first = min(differing, key=theirs.__getitem__)
        pair = f"{first!r}: {theirs[first]} in the data, {ours.get(first)} in the weights"
        raise UserError(
            f"DATA={data.name} was made by another tokenizer than {model.name}'s:"
            f" {len(differing):,} of {len(theirs):,} tokens have other ids, such as {pair}\n{again}"
        )
