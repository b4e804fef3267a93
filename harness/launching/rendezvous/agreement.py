"""What the nodes of one run must have in common: experiment, code, packages, data; and where they
differ."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import ROOT
from harness.data import fingerprint
from harness.machine.provenance import (
    CUDA_LIBRARIES,
    PACKAGES,
    describe_upstream,
    library_version,
    package_version,
    source_commit,
)
from harness.machine.upstream import locate

if TYPE_CHECKING:
    from harness.planning.plan import Plan

MOST_DIFFERENCES = 12
NOT_COMPARED = ("overrides",)
"""Fields of an experiment: settings as they were typed. Their effects are compared."""


def facts(plan: Plan) -> dict[str, Any]:
    """What this node would run, by name. Packages are looked up, not imported.

    Raises:
        UserError: the data set or upstream is damaged.
    """
    saving, loading = plan.extras.saving, plan.extras.loading
    found = {
        "experiment": {
            k: v
            for k, v in plan.experiment.model_dump(mode="json").items()
            if k not in NOT_COMPARED
        },
        "device": plan.device,
        "resumed": plan.resumes is not None,
        "checkpoints": (
            saving
            and {"every": saving.every, "keep": saving.keep, "folder": str(saving.folder or "")}
        ),
        "starts from": loading and {"step": loading.step, "weights only": loading.only_weights},
        "Megatron-LM": _upstream(),
        "harness": {"commit": source_commit(ROOT)[0], "sources": _sources(ROOT / "harness")},
        "packages": _packages(),
        "data": fingerprint.of(plan.experiment.data),
    }
    return dict(_flat("", found))


def differences(first: dict[str, Any], other: dict[str, Any], names: tuple[str, str]) -> list[str]:
    """Lines such as ``experiment lr: 0.001 on node 0, 0.1 on node 1``; none where both are
    equal."""
    found = [
        f"{key}: {_shown(first, key)} on {names[0]}, {_shown(other, key)} on {names[1]}"
        for key in dict.fromkeys([*first, *other])
        if first.get(key) != other.get(key)
    ]
    more = [f"… and {len(found) - MOST_DIFFERENCES} more"] if len(found) > MOST_DIFFERENCES else []
    return found[:MOST_DIFFERENCES] + more


def _shown(known: dict[str, Any], key: str) -> str:
    return str(known[key]) if known.get(key) is not None else "none"


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{prefix} {key}".strip(), inner)
    else:
        yield prefix, value


def _upstream() -> dict[str, Any]:
    tree, known = locate(), describe_upstream()
    return {**known.model_dump(), "sources": _sources(tree / "megatron") if tree else None}


def _packages() -> dict[str, str | None]:
    """Versions of the packages that compute.

    megatron-core's is left out: where it runs, it is in ``Megatron-LM``; where a source tree runs,
    it does not matter.
    """
    wanted = [name for name in PACKAGES if name != "megatron-core"]
    python = ".".join(platform.python_version_tuple()[:2])
    return {
        "python": python,
        **{name: package_version(name) for name in wanted},
        **{name: library_version(name) for name in CUDA_LIBRARIES},
    }


def _sources(folder: Path) -> str:
    """Checksum of the Python files in ``folder``: a commit does not show uncommitted changes."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
