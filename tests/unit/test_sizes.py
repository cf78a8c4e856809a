"""No file and no function outgrows what one can hold in mind; the limits stand in pyproject.toml."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SIZES = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["roformer_dist"][
    "sizes"
]
FOLDERS = ("roformer_dist", "data_tools")


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """``(Class.method, lines)`` of every function, decorators included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.end_lineno is not None
            yield prefix + node.name, node.end_lineno - first + 1
        named = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from functions(node, f"{prefix}{node.name}." if named else prefix)


def measured(root: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Lines of every file, and of every function as ``file::function``, below ``root``."""
    files: dict[str, int] = {}
    functions_of: dict[str, int] = {}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            text, name = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
            files[name] = len(text.splitlines())
            functions_of |= {f"{name}::{function}": lines for function, lines in functions(ast.parse(text))}
    return files, functions_of


def report(kind: str, lines: dict[str, int], limit: int) -> list[str]:
    """One message with the ten longest when any is over its limit; else nothing."""
    exceptions = SIZES["exceptions"]

    def allowed(name: str) -> int:
        return exceptions[name]["lines"] if name in exceptions else limit

    if all(count <= allowed(name) for name, count in lines.items()):
        return []
    longest = sorted(lines, key=lambda name: -lines[name])[:10]
    over = [name for name in lines if lines[name] > allowed(name) and name not in longest]
    table = "\n".join(
        f"  {lines[name]:5} of {allowed(name):3}  {'TOO LONG  ' if lines[name] > allowed(name) else '          '}{name}"
        for name in [*longest, *over]
    )
    return [
        f"the longest {kind}, in lines:\n{table}\nsplit it, or list it with a reason in [tool.roformer_dist.sizes]"
    ]


def test_no_file_and_no_function_is_too_long():
    files, functions_of = measured(REPOSITORY)
    longest = [max(lines, key=lambda name: lines[name]) for lines in (files, functions_of)]
    print(
        f"longest file {longest[0]} ({files[longest[0]]}), function {longest[1]} ({functions_of[longest[1]]})"
    )
    messages = report("files", files, SIZES["file_lines"])
    messages += report("functions", functions_of, SIZES["function_lines"])
    assert not messages, "\n" + "\n".join(messages)


def test_every_exception_is_needed_and_has_a_reason():
    files, functions_of = measured(REPOSITORY)
    for name, exception in SIZES["exceptions"].items():
        limit = SIZES["function_lines"] if "::" in name else SIZES["file_lines"]
        count = (files | functions_of).get(name)
        assert count is not None, f"{name} is not there any more: take it off the list of exceptions"
        assert count > limit, f"{name} has {count} lines, which needs no exception"
        assert len(exception["reason"]) > 15, name


def test_too_long_is_seen(tmp_path: Path):
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
    body = "        pass\n" * SIZES["function_lines"]
    filler = "# filler\n" * SIZES["file_lines"]
    (tmp_path / "data_tools/long.py").write_text(f"class A:\n    @property\n    def f(self):\n{body}{filler}")
    files, functions_of = measured(tmp_path)
    assert functions_of == {"data_tools/long.py::A.f": SIZES["function_lines"] + 2}
    [message] = report("files", files, SIZES["file_lines"])
    assert "TOO LONG  data_tools/long.py" in message
    [message] = report("functions", functions_of, SIZES["function_lines"])
    assert "long.py::A.f" in message
    assert report("files", {"data_tools/short.py": SIZES["file_lines"]}, SIZES["file_lines"]) == []
