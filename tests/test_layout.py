"""Packages of harness/ import each other in one direction: no circle, not even through imports inside functions."""

import ast
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
    renamed = [f"{path.name}: {node.module}.{alias.name} as {alias.asname}" for path in (ROOT / "harness").rglob("*.py")
               for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)
               for alias in node.names if alias.asname and _is_module(f"{node.module}.{alias.name}")]
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
    order = list(TopologicalSorter(imports).static_order())  # raises CycleError, which names the circle
    assert order.index("experiment") < order.index("data") < order.index("planning") < order.index("launching")
