"""Imports point one way: the plan of the house as data, checked against every module's syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import roformer_dist

ROOT = Path(roformer_dist.__file__).parent
REPOSITORY = ROOT.parent

# What each part may import besides itself. Entry modules may import everything but the command line.
ENTRIES = {
    "cli",
    "train",
    "exchange",
    "exchange_app",
    "extrapolate",
    "generate",
    "generate_app",
    "quickstart",
    "trained",
}
ALLOWED = {
    "config": set(),
    "batch": set(),
    "resources": {"configs"},
    "kernels": {"batch"},
    "model": {"kernels", "config", "batch"},
    "objectives": {"model", "kernels", "batch"},
    "parallel": {"kernels", "config", "batch"},
    "data": {"config", "batch"},
    "engine": {"objectives", "model", "parallel", "kernels", "data", "config", "batch"},
    "extrapolation": {"objectives", "model", "kernels", "data", "config", "batch"},
    "bench": {"engine", "objectives", "model", "parallel", "kernels", "data", "config", "batch"},
    "parity": {
        "engine",
        "extrapolation",
        "model",
        "parallel",
        "data",
        "kernels",
        "config",
        "batch",
        "objectives",
    },
    "interop": {"model", "config"},
    "launching": {"config"},
    "data_tools": {"data", "config"},
}

MODULES = sorted([*ROOT.rglob("*.py"), *(REPOSITORY / "data_tools").rglob("*.py")])
IDS = [str(path.relative_to(REPOSITORY)) for path in MODULES]


def name_of(path: Path) -> str:
    """``roformer_dist.engine.metrics`` for its file."""
    parts = list(path.relative_to(REPOSITORY).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str | None:
    """The part of the house that a module belongs to; None outside of it."""
    names = module.split(".")
    if names[0] == "data_tools":
        return "data_tools"
    if names[0] != "roformer_dist":
        return None
    return names[1] if len(names) > 1 else "roformer_dist"


def imported_by(tree: ast.AST, module: str, *, is_package: bool = False) -> Iterator[tuple[str, int]]:
    """Every module that a syntax tree imports, at any depth, with its line; relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                names = module.split(".")
                names = names[: len(names) - node.level + is_package]
                base = ".".join([*names, *([base] if base else [])])
            # "from a import b" may import the module a.b.
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from ((a.value, node.lineno) for a in node.args[:1] if isinstance(a, ast.Constant))


def imports(path: Path) -> list[tuple[str, int]]:
    tree = ast.parse(path.read_text())
    return list(imported_by(tree, name_of(path), is_package=path.name == "__init__.py"))


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_imports_point_one_way(path: Path) -> None:
    own = part_of(name_of(path))
    if own in ENTRIES or own == "roformer_dist":
        return
    assert own in ALLOWED, f"{own} has no row in the table of this test"
    for module, line in imports(path):
        part = part_of(module)
        # The package itself holds the version alone.
        if part is None or part in (own, "roformer_dist", "__version__"):
            continue
        assert part in ALLOWED[own], f"{path}:{line}: {own} may not import {module}"


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_nothing_imports_the_command_line(path: Path) -> None:
    # Quickstart starts it as a process, as a user would.
    assert [line for module, line in imports(path) if module.startswith("roformer_dist.cli")] == []


def uses_distributed(path: Path) -> bool:
    tree = ast.parse(path.read_text())
    if any(m == "torch.distributed" or m.startswith("torch.distributed.") for m, _ in imports(path)):
        return True
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == "distributed"
        and getattr(node.value, "id", "") == "torch"
        for node in ast.walk(tree)
    )


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_processes_are_known_to_few(path: Path) -> None:
    name, part = name_of(path), part_of(name_of(path))
    if part in {"engine", "parity", *ENTRIES} or name == "roformer_dist.parallel.comm":
        return
    assert not uses_distributed(path)


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_deepspeed_has_one_door(path: Path) -> None:
    # As a contender it is measured, not used.
    if part_of(name_of(path)) == "engine" or name_of(path) == "roformer_dist.bench.sequence_peers":
        return
    assert [line for module, line in imports(path) if module.split(".")[0] == "deepspeed"] == []


def test_the_checks_see_what_they_look_for() -> None:
    # comm and engine do use them; a walker that finds nothing would pass everything above.
    assert uses_distributed(ROOT / "parallel" / "comm.py")
    assert any(module == "deepspeed" for module, _ in imports(ROOT / "engine" / "engine.py"))
    tree = ast.parse(
        "def f():\n    from roformer_dist import parallel\n    from ..engine import metrics\n    from . import heads"
    )
    found = {module for module, _ in imported_by(tree, "roformer_dist.model.roformer")}
    assert {"roformer_dist.parallel", "roformer_dist.engine.metrics", "roformer_dist.model.heads"} <= found
    inside = ast.parse("from . import rows")
    found = {m for m, _ in imported_by(inside, "roformer_dist.data", is_package=True)}
    assert "roformer_dist.data.rows" in found
    assert len(MODULES) > 50


HEAVY = (
    "torch",
    "numpy",
    "deepspeed",
    "matplotlib",
    "sentencepiece",
    "tensorboard",
    "webdataset",
    "pydantic",
)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("roformer_dist", HEAVY),
        ("roformer_dist.cli", HEAVY),
        ("roformer_dist.train", ("torch", "numpy", "deepspeed", "matplotlib")),
        ("roformer_dist.config", ("torch", "numpy", "deepspeed", "matplotlib")),
        ("roformer_dist.launching.local", HEAVY),
    ],
)
def test_importing_it_loads_nothing_heavy(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*(m for m in {absent!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_help_comes_within_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        command = [sys.executable, "-m", "roformer_dist.cli", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "quickstart" in done.stdout
        return time.perf_counter() - start

    # The fastest of three: the machine may be busy with something else.
    assert min(seconds() for _ in range(3)) < 1.0
