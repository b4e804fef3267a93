"""Upstream's parser as a table, so that ``ARGS=`` is checked before a run starts, without torch.

The table of the pinned release is known_arguments.json. For another Megatron-LM (MEGATRON_LM=,
another wheel) it is made once, where torch is installed, and kept in the virtual environment by
``python -m harness.upstreams.megatron_lm.known_arguments FILE``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from harness import ROOT
from harness.errors import UserError, nearest
from harness.experiment import extra_arguments
from harness.machine import upstream
from harness.system.files import write_text

PINNED = Path(__file__).with_name("known_arguments.json")
SOURCES = (
    "training/arguments.py",
    "training/argument_utils.py",
    "training/config/*.py",
    "core/model_parallel_config.py",
    "core/fault_injector.py",
    "core/transformer/transformer_config.py",
    "core/transformer/enums.py",
    "core/transformer/cuda_graph_config.py",
)
"""The files in megatron/ from which upstream builds its parser."""
ADDING = ("modelopt", "nvidia_kitchen")
"""Packages that add arguments where they are installed."""
OF_OTHER_SCRIPTS = ("rl_", "grpo_", "langrl_", "logits_")
"""Prefixes of arguments for scripts of the source tree, which the wheel lacks."""
INSTEAD = {"--use-flash-attn": "--attention-backend flash asks for flash attention"}
_TYPES = {"int": int, "float": float, "str": str}


def check(text: str) -> None:
    """Check ``ARGS=text`` against upstream's parser.

    Raises:
        UserError: an argument is unknown, or has too few, too many or invalid values.
    """
    words = extra_arguments.split(text)
    if not words or (rows := table()) is None:
        return
    parser = _Parser(add_help=False, allow_abbrev=False)
    for row in rows:
        if row["nargs"] == 0:
            parser.add_argument(*row["names"], action="store_true")
        else:
            parser.add_argument(
                *row["names"],
                nargs=row["nargs"],
                type=_TYPES.get(row["type"], str),
                choices=row["choices"],
            )
    _, strange = parser.parse_known_args(words)
    dropped = {name for row in rows if row["dropped"] for name in row["names"]}
    for argument in extra_arguments.arguments(words):
        if argument.option in dropped:
            instead = INSTEAD.get(argument.option, "leave it out")
            raise UserError(
                f"ARGS: upstream accepts {argument.option} and does nothing with it; {instead}"
            )
    if not strange or (any(map(find_spec, ADDING)) and strange[0].startswith("--")):
        return
    name = strange[0].partition("=")[0]
    if name.startswith("--"):
        valid = [known for row in rows for known in row["names"]]
        raise UserError(
            f"ARGS: upstream has no argument {name}; {nearest(name, valid)}\n"
            "make arguments MATCH= looks for some"
        )
    raise UserError(
        f"ARGS: {name!r} belongs to no argument: values follow a name, such as --lr 1e-4"
    )


def table() -> list[dict[str, Any]] | None:
    """Every argument of the installed Megatron-LM.

    None where it is not the pinned one and its parser cannot be asked without torch.
    """
    here = identity()
    known = json.loads(PINNED.read_text(encoding="utf-8"))
    if here in (None, known["identity"]):
        return known["arguments"]
    own = Path(sys.prefix) / f"megatron-arguments-{here[:16]}.json"
    if not own.is_file() and find_spec("torch"):
        print("reading the arguments of this Megatron-LM, once …", file=sys.stderr)
        subprocess.run(
            [sys.executable, "-m", __spec__.name, str(own)], cwd=ROOT, capture_output=True
        )
    try:
        return json.loads(own.read_text(encoding="utf-8"))["arguments"]
    except (OSError, ValueError):
        return None


def identity() -> str | None:
    """A checksum of the files that define upstream's parser; None where none is installed."""
    tree = upstream.locate()
    wheel = getattr(find_spec("megatron"), "submodule_search_locations", ())
    places = [tree / "megatron"] if tree else [Path(place) for place in wheel]
    for place in places:
        if (place / SOURCES[0]).is_file():
            digest = hashlib.sha256()
            for path in sources(place):
                digest.update(
                    path.relative_to(place).as_posix().encode() + b"\0" + path.read_bytes()
                )
            return digest.hexdigest()
    return None


def sources(megatron: Path) -> list[Path]:
    """The files of ``SOURCES`` in the package ``megatron``, in order."""
    return [path for pattern in SOURCES for path in sorted(megatron.glob(pattern))]


def described() -> list[dict[str, Any]]:
    """Every argument of upstream's parser and of LoRA; needs torch."""
    from harness.finetune.arguments import add_arguments
    from harness.upstreams.megatron_lm.arguments import upstream_parser

    actions = [action for action in upstream_parser()._actions if action.option_strings]
    unread, own = (
        _unread({action.dest for action in actions}),
        add_arguments(argparse.ArgumentParser(add_help=False)),
    )
    return [_row(action, action.dest in unread) for action in (*actions, *own._actions)]


def _unread(names: set[str]) -> set[str]:
    """Those of the parser's ``names`` that no training code mentions outside the parser."""
    import megatron.core

    names = {name for name in names if not name.startswith(OF_OTHER_SCRIPTS)}
    core = Path(megatron.core.__file__).parent
    parser = core.parent / "training" / "arguments.py"
    scripts = [ROOT / "harness" / "entry" / "pretrain.py"]
    for path in (*core.rglob("*.py"), *parser.parent.rglob("*.py"), *scripts):
        text = path.read_text(encoding="utf-8")
        names = names - set(re.findall(r"args\.(\w+)" if path == parser else r"\w+", text))
    return names


def _row(action: argparse.Action, dropped: bool) -> dict[str, Any]:
    kind = getattr(action.type, "__name__", "str")
    choices = action.choices and [getattr(choice, "name", choice) for choice in action.choices]
    return {
        "names": list(action.option_strings),
        "nargs": action.nargs,
        "type": kind if kind in _TYPES else "other",
        "choices": choices,
        "dropped": dropped,
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"ARGS: {message.removeprefix('argument ')}")


def main(words: Sequence[str]) -> None:
    """Write the table of the installed Megatron-LM to the file in ``words``, or to ``PINNED``."""
    rows = ",\n".join(json.dumps(row) for row in described())
    path = Path(words[0]) if words else PINNED
    write_text(path, f'{{"identity": {json.dumps(identity())},\n"arguments": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    main(sys.argv[1:])
