"""A room imports from lower levels alone; docs/architecture.md says which those are."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from fusion_bench import __file__ as package

ROOT = Path(package).parent
PAGE = ROOT.parent / "docs" / "architecture.md"
#: The package itself, which has the version alone, and its entry point.
_DOORS = {"fusion_bench", "__main__"}


def levels() -> dict[str, int]:
    rows = re.findall(r"^\| (-?\d+) \| ([^|]*) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {room: int(level) for level, rooms in rows for room in re.findall(r"`(\w+)`", rooms)}


def rooms() -> set[str]:
    names = {path.stem for path in ROOT.glob("*.py")} - {"__init__"}
    return names | {path.parent.name for path in ROOT.glob("*/__init__.py")}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the rooms that a module imports from, but for annotations alone."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        return
    names: list[str] = []
    if isinstance(tree, ast.Import):
        names = [alias.name for alias in tree.names]
    elif isinstance(tree, ast.ImportFrom):
        assert not tree.level, "relative imports are not looked at"
        names = [f"{tree.module}.{alias.name}" for alias in tree.names]
    for name in names:
        top, _, rest = name.partition(".")
        if top == "fusion_bench":
            yield rest.partition(".")[0]
    for child in ast.iter_child_nodes(tree):
        yield from imports(child)


def test_every_room_has_a_level() -> None:
    assert levels().keys() == rooms() - _DOORS


def test_imports_go_down() -> None:
    level, wrong = levels(), []
    for file in sorted(ROOT.rglob("*.py")):
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        for other in set(imports(ast.parse(file.read_text(encoding="utf-8")))):
            if other not in level or other == room:  # ``__version__``, and its own modules
                continue
            if level[other] >= level[room]:
                wrong.append(f"{file.relative_to(ROOT)} imports {other}")
    assert not wrong
