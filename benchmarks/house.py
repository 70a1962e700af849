"""Count the lines of the source, and list files and functions that are too long and methods named outside `methods/`.

    python benchmarks/house.py [--max-lines 10500] [--max-file 300] [--max-function 50] [--json]

Lines are counted by room: a folder or a file directly under `src/bayestune`, or the command line, `src/bayestune_cli`.
Every line counts, including comments, docstrings and blank lines. A file names a method if it has a string, other than
a docstring, that equals the method's key in `bayestune.methods.METHODS`, or if it checks one of the method's classes
with `isinstance`.

Exits with 1 if a limit is exceeded or a method is named outside its room.
"""

import argparse
import ast
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

from bayestune.methods import METHODS

SOURCE = Path(__file__).parent.parent / "src"
CLI = "bayestune_cli"
HOME = "methods"
OTHER_MEANINGS = {"dropout": ("adapters",), "temperature": ("bayestune_cli", "experiment", "storage", "tasks")}
"""Rooms in which the word does not mean the method: "dropout" is a distribution of weights, "temperature" a number."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def room(path: Path) -> str:
    """Return the folder or file directly under the package; the command line is one room."""
    first, second, *_ = path.relative_to(SOURCE).parts
    return CLI if first == CLI else second.removesuffix(".py")


def functions(tree: ast.AST) -> Iterator[tuple[str, int, int]]:
    """Yield name, line and length of every function, without its decorators."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1


def names(tree: ast.AST, methods: set[str], classes: set[str]) -> Iterator[tuple[str, int]]:
    """Yield the method names and classes that `tree` mentions, with their lines."""
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in methods and id(node) not in statements:
            yield repr(node.value), node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            for part in ast.walk(node.args[1]):
                found = part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else ""
                if found in classes:
                    yield f"{ast.unparse(node.func)} {found}", node.lineno


def classes_of_methods() -> set[str]:
    """Return the names of the classes defined in `methods/`, except those that every method shares."""
    files = [path for path in (SOURCE / "bayestune" / HOME).rglob("*.py") if path.name != "base.py"]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def misplaced(path: Path, tree: ast.AST, methods: set[str], classes: set[str]) -> list[str]:
    """Return where the file at `path` names a method; empty for files in `methods/`."""
    if room(path) == HOME:
        return []
    known = {name for name in methods if room(path) not in OTHER_MEANINGS.get(name, ())}
    place = path.relative_to(SOURCE).as_posix()
    found = sorted(names(tree, known, classes), key=lambda named: named[1])
    return [f"{place}:{line} {name}" for name, line in found]


def survey(max_file: int, max_function: int) -> dict[str, object]:
    """Return all figures, as --json prints them."""
    rooms: dict[str, int] = {}
    files: dict[str, int] = {}
    long_functions: dict[str, int] = {}
    outside: list[str] = []
    methods, classes = set(METHODS), classes_of_methods()
    for path in sorted(SOURCE.rglob("*.py")):
        text, place = path.read_text(encoding="utf-8"), path.relative_to(SOURCE).as_posix()
        files[place] = text.count("\n")
        rooms[room(path)] = rooms.get(room(path), 0) + files[place]
        tree = ast.parse(text)
        long_functions |= {f"{place}:{line} {n}": size for n, line, size in functions(tree) if size > max_function}
        outside += misplaced(path, tree, methods, classes)
    return {
        "lines": sum(rooms.values()),
        "rooms": _largest_first(rooms),
        "files": len(files),
        "median_file": statistics.median(files.values()),
        "long_files": _largest_first({place: lines for place, lines in files.items() if lines > max_file}),
        "long_functions": _largest_first(long_functions),
        "methods_outside": outside,
    }


def _largest_first(sizes: dict[str, int]) -> dict[str, int]:
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def text(found: dict) -> str:
    """Return the figures as text."""
    lines = [f"{found['lines']} lines in {found['files']} files, median {found['median_file']:.0f}", ""]
    lines += [f"{size:6} {100 * size / found['lines']:5.1f} %  {name}" for name, size in found["rooms"].items()]
    for title, part in (("files too long", "long_files"), ("functions too long", "long_functions")):
        lines += ["", f"{title}: {len(found[part]) or 'none'}"]
        lines += [f"{size:6}  {name}" for name, size in found[part].items()]
    lines += ["", f"methods named outside {HOME}/: {len(found['methods_outside']) or 'none'}"]
    return "\n".join([*lines, *(f"        {line}" for line in found["methods_outside"])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-lines", type=int, default=10_500, help="of the whole source")
    parser.add_argument("--max-file", type=int, default=300, help="of a file")
    parser.add_argument("--max-function", type=int, default=50, help="of a function")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    found = survey(options.max_file, options.max_function)
    print(json.dumps(found, indent=1) if options.json else text(found))
    kept = found["lines"] <= options.max_lines and not found["long_files"] and not found["long_functions"]
    return 0 if kept and not found["methods_outside"] else 1


if __name__ == "__main__":
    sys.exit(main())
