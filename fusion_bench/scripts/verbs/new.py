"""Start a method of your own, outside of any checkout: a module, its YAML and its test.

The module is a small method that works. Change it step by step, and run the test after each step.
The commands to test and to run it are printed.
"""

import keyword
import re
from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from pathlib import Path

from fusion_bench.catalog import unambiguous
from fusion_bench.problems import FusionBenchError
from fusion_bench.storage import write_text

EXAMPLES = """
fusion_bench new method soft_ties
fusion_bench new method soft_ties --dir my_methods
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("kind", choices=["method"], help="what to start")
    parser.add_argument(
        "module", metavar="NAME", help="of the module and of the YAML, such as soft_ties"
    )
    parser.add_argument("--dir", default=".", help="where to write the files; here by default")


def run(arguments: Namespace) -> None:
    """Write the files, and tell what to do next.

    Raises:
        FusionBenchError: the name does not serve, or a file is there already.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    name, folder = arguments.module, Path(arguments.dir)
    check_name(name)
    files = {
        "method.py.j2": folder / f"{name}.py",
        "method.yaml.j2": folder / "method" / f"{name}.yaml",
        "test_method.py.j2": folder / f"test_{name}.py",
    }
    for file in files.values():
        if file.exists():
            raise FusionBenchError(f"'{file}' is there already.", "Choose another name or --dir.")
    loader = PackageLoader("fusion_bench.scripts")
    templates = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True)
    class_name = "".join(part.capitalize() for part in name.split("_"))
    for template, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        text = templates.get_template(template).render(name=name, class_name=class_name)
        write_text(file, text)
    module, config, test = files.values()
    print(
        f"{module}: the method; start here\n"
        f"{config}: its options\n"
        f"{test}: its test, with the rules for all methods\n"
        "\nTest it, then merge and evaluate the built-in models with it:\n\n"
        + ("" if find_spec("pytest") else "  python -m pip install pytest\n")
        + f"  python -m pytest {test}\n"
        f"  fusion_bench --plugins {module} method={name}"
    )


def check_name(name: str) -> None:
    """Refuse a name that cannot be a module's or is that of another.

    Raises:
        FusionBenchError: with a name that can.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        plain = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
        plain = plain.strip("_").lstrip("0123456789_") or "my"
        better = f"{plain}_merging" if keyword.iskeyword(plain) or plain == name else plain
        raise FusionBenchError(f"'{name}' is not a name for a module.", f"Try '{better}'.")
    if known := unambiguous(name, ["methods"]):
        raise FusionBenchError(f"'{name}' is a method already: {known.name}.", f"Try 'my_{name}'.")
    if find_spec(name) is not None:
        raise FusionBenchError(
            f"a module that is installed is called '{name}'.", f"Try 'my_{name}'."
        )
