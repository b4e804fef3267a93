"""Packages of harness/ import each other in one direction: no circle, not even through imports inside functions."""

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

from harness import ROOT


def imported(path: Path) -> set[str]:
    """What ``path`` imports of harness, as dotted names, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("harness.")}


def test_modules_keep_their_names_where_they_are_imported() -> None:
    """Whoever reads a call finds its file by the name."""
    renamed = [
        f"{path.name}: {node.module}.{alias.name} as {alias.asname}"
        for path in (ROOT / "harness").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname and _is_module(f"{node.module}.{alias.name}")
    ]
    assert not renamed


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_packages_import_each_other_in_one_direction():
    imports: dict[str, set[str]] = defaultdict(set)
    for path in (ROOT / "harness").rglob("*.py"):
        part = path.relative_to(ROOT / "harness").with_suffix("").parts[0]
        imports[part] |= {name.split(".")[1] for name in imported(path)} - {part, "ROOT"}
    assert "experiment" in imports["planning"]
    order = list(
        TopologicalSorter(imports).static_order()
    )  # raises CycleError, which names the circle
    assert (
        order.index("experiment")
        < order.index("data")
        < order.index("planning")
        < order.index("launching")
    )


def test_files_import_each_other_in_one_direction():
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "harness").rglob("*.py")
    }
    imports: dict[str, set[str]] = {}
    for module, path in files.items():
        found = {name if name in files else name.rpartition(".")[0] for name in imported(path)}
        imports[module] = found - {module, "harness"}
    assert "harness.experiment.experiment" in imports["harness.experiment.constraints"]
    order = list(TopologicalSorter(imports).static_order())
    assert order.index("harness.experiment.constraints") < order.index("harness.experiment.catalog")


HEAVY = (
    "torch",
    "megatron.core",
    "safetensors",
    "transformers",
    "tokenizers",
    "datasets",
    "scipy",
)


def test_quick_tests_need_nothing_heavy() -> None:
    """``make test-quick`` runs on a machine where only the light stage is installed: nothing heavy is imported to collect."""
    script = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    words = [
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--ignore-glob=tests/test_data_*",
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " tests collected" in done.stdout and "test_step_time.py" in done.stdout
