"""Which Megatron-LM runs: the submodule, the directory in MEGATRON_LM, or the installed wheel."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from harness import ROOT
from harness.errors import UserError

SCRIPT = "pretrain_gpt.py"
HYBRID_SCRIPT = "pretrain_hybrid.py"
FILL = "git submodule update --init megatron-lm"


def locate() -> Path | None:
    """The source tree that runs: MEGATRON_LM, else the submodule ``megatron-lm/``; None: the wheel.

    Raises:
        UserError: MEGATRON_LM is no source tree of Megatron-LM, or the submodule is checked out in
        part.
    """
    if named := os.environ.get("MEGATRON_LM"):
        tree, name, way_out = (
            Path(named),
            "MEGATRON_LM",
            f"point it at a checkout, or unset it and run: {FILL}",
        )
    else:
        tree, name, way_out = ROOT / "megatron-lm", "the submodule", f"fill it with: {FILL}"
        if not tree.is_dir() or not any(entry.name != ".git" for entry in tree.iterdir()):
            return None
    missing = [
        part
        for part in (SCRIPT, "megatron/core", "megatron/training")
        if not (tree / part).exists()
    ]
    if missing:
        raise UserError(
            f"{name} is not a complete Megatron-LM: {tree} has no {', '.join(missing)}\n{way_out}"
        )
    return tree.resolve()


def put_on_path(tree: Path | None) -> None:
    """Make ``import megatron`` import the upstream in ``tree``, or the installed wheel.

    A source tree goes first on ``sys.path``, before an installed wheel: ``megatron`` is a namespace
    package, whose parts Python looks up in the path's order.

    Raises:
        UserError: neither a source tree nor the wheel is there.
    """
    if tree:
        sys.path.insert(0, str(tree))
    core = find_spec("megatron.core") if find_spec("megatron") else None
    if core is None or core.origin is None:
        raise UserError(f"no Megatron-LM found\nrun {FILL}, or pip install megatron-core")
    if tree and tree not in Path(core.origin).resolve().parents:
        raise UserError(
            f"megatron.core comes from {core.origin}, not from {tree}\nunset PYTHONPATH"
        )
