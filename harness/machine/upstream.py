"""Which Megatron-LM runs: the submodule, the directory in MEGATRON_LM, or the installed wheel."""

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from harness.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = "pretrain_gpt.py"
FILL = "git submodule update --init megatron-lm"


@dataclass(frozen=True)
class Upstream:
    """Where upstream is: ``tree`` is its source tree, or None for the installed ``megatron-core`` wheel."""

    tree: Path | None

    @property
    def source(self) -> str:
        """``submodule`` or ``package``, as a run's records name it."""
        return "package" if self.tree is None else "submodule"


def locate(environment: dict[str, str] | os._Environ = os.environ) -> Upstream:
    """Return the upstream to run: MEGATRON_LM, else ``megatron-lm/`` of the repository, else the wheel.

    Raises:
        UserError: MEGATRON_LM is no source tree of Megatron-LM, or the submodule is half checked out.
    """
    if named := environment.get("MEGATRON_LM"):
        tree, name, way_out = Path(named), "MEGATRON_LM", f"point it at a checkout, or unset it and run: {FILL}"
    else:
        tree, name, way_out = REPOSITORY / "megatron-lm", "the submodule", f"fill it with: {FILL}"
        if not tree.is_dir() or not any(entry.name != ".git" for entry in tree.iterdir()):
            return Upstream(None)
    missing = [part for part in (SCRIPT, "megatron/core", "megatron/training") if not (tree / part).exists()]
    if missing:
        raise UserError(f"{name} is not a whole Megatron-LM: {tree} has no {', '.join(missing)}\n{way_out}")
    return Upstream(tree.resolve())


def put_on_path(upstream: Upstream) -> None:
    """Make ``import megatron`` mean ``upstream``, and nothing else.

    A source tree goes first on ``sys.path`` and wins over an installed wheel: ``megatron`` is a namespace package,
    whose parts are looked up in the path's order.

    Raises:
        UserError: neither a source tree nor the wheel is there.
    """
    if upstream.tree:
        sys.path.insert(0, str(upstream.tree))
    core = find_spec("megatron.core") if find_spec("megatron") else None
    if core is None or core.origin is None:
        raise UserError(f"no Megatron-LM found\nrun {FILL}, or pip install megatron-core")
    if upstream.tree and upstream.tree not in Path(core.origin).resolve().parents:
        raise UserError(f"megatron.core comes from {core.origin}, not from {upstream.tree}\nunset PYTHONPATH")
