"""Writes what follows from a method's module and page: YAML, lists, navigation and catalogue.

    .venv/bin/python tools/add_method.py my_method

It reads ``fusion_bench/method/my_method.py`` and ``docs/methods/my_method.md``. Lines are added at
the end of the group that fits the class; move them where they belong better. What is there already
stays as it is. At the end ``write_catalog.py`` is run.
"""

import inspect
import os
import re
import subprocess
import sys
from bisect import bisect
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import yaml

from fusion_bench.configs import schema_line
from fusion_bench.method.base import TensorwiseAlgorithm
from fusion_bench.method.data import LearningAlgorithm
from fusion_bench.method.ensemble import EnsembleAlgorithm

Method = type[TensorwiseAlgorithm | LearningAlgorithm | EnsembleAlgorithm]

_BASES = (TensorwiseAlgorithm, LearningAlgorithm, EnsembleAlgorithm)
#: Options that every method has, so that no YAML needs them.
_COMMON = ("show_pbar", "inplace", "where")


def add_method(root: Path, name: str) -> None:
    """Write all that is missing for the methods of a module under the checkout ``root``."""
    classes = classes_of(root / "fusion_bench" / "method" / f"{name}.py")
    title = (root / "docs" / "methods" / f"{name}.md").read_text("utf-8").splitlines()[0]
    configs = {name if len(classes) == 1 else f"{name}/{own.__name__}": own for own in classes}
    for config, own in configs.items():
        file = root / "config" / "method" / f"{config}.yaml"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            line = schema_line(file, Path("method") / f"{config}.yaml", root / "config")
            file.write_text(f"{line}\n{as_yaml(own)}", "utf-8")
    _export(root / "fusion_bench" / "method" / "__init__.py", name, classes)
    link = f"[{title.removeprefix('# ')}]({name}.md)"
    for config, own in configs.items():
        _reference(root, own)
        _row(root / "docs" / "methods" / "index.md", link, config, own)
        link = ""
    page = f"          - {title.removeprefix('# ')}: methods/{name}.md\n"
    _append(root / "mkdocs.yml", f"      - {group_of(classes[0])}:\n", "          - ", page)
    # In a process of its own, which imports the package with the new method in it.
    own = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, root / "tools" / "write_catalog.py"], env=own, check=True)


def classes_of(file: Path) -> list[Method]:
    """Return the public methods that a module defines."""
    spec = spec_from_file_location(f"fusion_bench.method.{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [
        own
        for own in vars(module).values()
        if inspect.isclass(own)
        and issubclass(own, _BASES)
        and own.__module__ == module.__name__
        and not own.__name__.startswith("_")
    ]
    if not found:
        sys.exit(f"{file} defines no method.")
    return found


def as_yaml(method: Method) -> str:
    """Return a method's YAML: every option with its default, and the choices that it has."""
    hints = get_type_hints(method.__init__)
    lines = [f"_target_: fusion_bench.method.{method.__name__}"]
    for name, option in inspect.signature(method).parameters.items():
        if name in _COMMON:
            continue
        if name == "seed":
            value = "${oc.select:seed,null}"
        elif option.default is option.empty:
            value = "???"
        else:
            plain = list(option.default) if isinstance(option.default, tuple) else option.default
            value = yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
        others = ", ".join(str(choice) for choice in choices if choice != option.default)
        lines.append(f"{name}: {value}{f' # or {others}' if others else ''}")
    return "\n".join(lines) + "\n"


def group_of(method: Method) -> str:
    """Return the heading under which a method is listed."""
    if issubclass(method, LearningAlgorithm):
        return "With data"
    if issubclass(method, EnsembleAlgorithm):
        return "Ensembles"
    if method.heavy:
        return "Matrices"
    return "Task vectors" if method.needs_pretrained else "Averages and interpolation"


def _export(file: Path, name: str, classes: list[Method]) -> None:
    """Add the import and the names of ``__all__``, each in its order."""
    lines = file.read_text("utf-8").splitlines()
    begun = "from fusion_bench.method."
    places = [number for number, line in enumerate(lines) if line.startswith(begun)]
    modules = [lines[number].removeprefix(begun).split()[0] for number in places]
    if name not in modules:
        names = ", ".join(sorted(own.__name__ for own in classes))
        after = bisect(modules, name)
        place = places[after] if after < len(places) else places[-1] + 1
        lines.insert(place, f"{begun}{name} import {names}")
    start = lines.index("__all__ = [") + 1
    public = [line.strip(' ",') for line in lines[start : lines.index("]", start)]]
    for own in classes:
        if own.__name__ not in public:
            order = bisect(public, _order(own.__name__), key=_order)
            public.insert(order, own.__name__)
            lines.insert(start + order, f'    "{own.__name__}",')
    file.write_text("\n".join(lines) + "\n", "utf-8")


def _order(name: str) -> tuple[bool, str]:
    return not name.isupper(), name


def _row(file: Path, link: str, config: str, method: Method) -> None:
    """Add a row to the table of all methods."""
    if f"| `{config}` |" in file.read_text("utf-8"):
        return
    base = "yes" if not issubclass(method, EnsembleAlgorithm) and method.needs_pretrained else "no"
    data = "no"
    if issubclass(method, LearningAlgorithm):
        data = "labels" if method.uses_labels else "images"
    said = (inspect.getdoc(method) or "").partition("\n")[0].removesuffix(".")
    cells = [link, f"`{config}`", base, data, said[:1].lower() + said[1:]]
    row = f"| {' | '.join(cells)} |\n".replace("|  |", "| |")
    _append(file, f"### {group_of(method)}\n", "|", row)


def _reference(root: Path, method: Method) -> None:
    """Add a class to the reference, after the last one of its group."""
    file = root / "docs" / "reference.md"
    text = file.read_text("utf-8")
    if re.search(rf"^::: fusion_bench\.method\.{method.__name__}$", text, re.MULTILINE):
        return
    table = (root / "docs" / "methods" / "index.md").read_text("utf-8")
    rows = table.partition(f"### {group_of(method)}\n")[2].partition("\n#")[0]
    targets = [
        yaml.safe_load((root / "config" / "method" / f"{config}.yaml").read_text("utf-8"))
        for config in re.findall(r"\| `([\w/]+)` \|", rows)
    ]
    last = max(text.index(f"::: {node['_target_']}\n") for node in targets)
    end = text.index("\n\n", last) + 2
    entry = f"::: fusion_bench.method.{method.__name__}\n    options:\n      members: []\n\n"
    file.write_text(text[:end] + entry + text[end:], "utf-8")


def _append(file: Path, heading: str, begun: str, line: str) -> None:
    """Add a line after the last one below a heading that begins alike."""
    lines = file.read_text("utf-8").splitlines(keepends=True)
    if line in lines:
        return
    place = lines.index(heading) + 1
    while not lines[place].startswith(begun):
        place += 1
    while place < len(lines) and lines[place].startswith(begun):
        place += 1
    lines.insert(place, line)
    file.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    add_method(Path(__file__).parents[1], sys.argv[1])
