"""Extract a LoRA adapter from a model and the model that it was fine-tuned from.

The adapter's folder is in PEFT's layout. What the adapter misses of the change is told for each
kind of module, the worst first, and in the folder for each module and as a picture. Options of the
method are given as key=value, such as embeddings=factors.
"""

import math
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = """
fusion_bench extract-lora model --base base --out adapter
fusion_bench extract-lora model --base base --out adapter --rank 64
fusion_bench extract-lora owner/model --base owner/base --out adapter --energy 0.95
"""
#: So many rows are shown.
_ROWS = 20
#: The width of the columns of numbers.
_NUMBERS = 50


def add_arguments(parser: ArgumentParser) -> None:
    """Add the two models, the folder and how much is kept."""
    parser.add_argument("model", nargs="+", metavar="MODEL", help="the model, or key=value")
    parser.add_argument("--base", required=True, metavar="MODEL", help="what it was made from")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--rank", type=int, help="the largest rank; default: 32 without --energy")
    parser.add_argument("--energy", type=float, help="the share of the change to keep: 0.95")
    parser.add_argument("--epsilon", type=float, help="leave smaller singular values out")
    parser.add_argument("--overwrite", action="store_true", help="replace another adapter in DIR")
    parser.add_argument("--dry-run", action="store_true", help="only show the plan")


def run(arguments: Namespace) -> None:
    """Run the config ``merge_llm`` with the method that extracts, and print what is missing.

    Raises:
        FusionBenchError: not one model, or what stands in the way.
    """
    from fusion_bench.problems import FusionBenchError
    from fusion_bench.scripts.run import run_composed
    from fusion_bench.scripts.verbs.merge import pool_words, separated
    from fusion_bench.scripts.words import in_grammar

    given, settings = separated(arguments.model, "method")
    if len(given) != 1:
        raise FusionBenchError(f"there are {len(given)} models.", "Name one, and its --base.")
    out = Path(arguments.out).absolute()
    models = {"_pretrained_": arguments.base, "model": given[0]}
    for model in models.values():
        if out.exists() and out.resolve() == Path(model).resolve():
            raise FusionBenchError(
                f"--out: '{out}' is one of the models.", "Choose another folder."
            )
    own = {name: getattr(arguments, name) for name in ("rank", "energy", "epsilon")}
    words = [
        *pool_words(models, heads=True),
        "method=lora/extract",
        *(f"method.{name}={value}" for name, value in own.items() if value is not None),
        f"merged_model_save_path={in_grammar(str(out))}",
        f"overwrite={str(arguments.overwrite).lower()}",
        f"dry_run={str(arguments.dry_run).lower()}",
        *settings,
    ]
    run_composed(["--config-name", "merge_llm", *words])
    if not arguments.dry_run:
        _print(out)


def _print(folder: Path) -> None:
    """Print what an adapter misses."""
    from rich.console import Console

    from fusion_bench.companions import ADAPTER_ERRORS, ADAPTER_PICTURE
    from fusion_bench.storage import read_json

    console = Console()
    console.print(_table(read_json(folder / ADAPTER_ERRORS)["modules"], console.width))
    console.print(f"Each module: {folder / ADAPTER_ERRORS}", soft_wrap=True, highlight=False)
    console.print(f"As a picture: {folder / ADAPTER_PICTURE}", soft_wrap=True, highlight=False)


def _table(modules: Sequence[Mapping[str, object]], width: int) -> "Table":
    """Return a table with a row for each kind of module, the largest error first."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    kinds: dict[tuple[str, str], list[tuple[float, int, str]]] = {}
    for own in modules:
        name, how = str(own["module"]), str(own["how"])
        error = math.inf if own["error"] is None else float(str(own["error"]))
        one = error, int(str(own["rank"])), name
        kinds.setdefault((_kind_of(name), how), []).append(one)
    table = Table(box=box.SIMPLE, title="What the adapter misses of the change")
    table.add_column("module")
    for title in ("number", "rank", "error", "largest", "layer"):
        table.add_column(title, justify="right", no_wrap=True)
    # What is left beside the numbers; a name that is longer is broken behind a dot.
    widest = max(width - _NUMBERS, 20)
    rows = sorted(kinds.items(), key=lambda item: -max(item[1])[0])
    for (kind, how), found in rows[:_ROWS]:
        worst, ranks = max(found), [rank for _, rank, _ in found]
        span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"
        mean = sum(error for error, _, _ in found) / len(found)
        layer = ".".join(part for part in worst[2].split(".") if part.isdigit())
        table.add_row(
            Text(_broken(kind, widest)),
            str(len(found)),
            span if how == "factors" else how,
            f"{mean:.2%}",
            f"{worst[0]:.2%}",
            layer if worst[0] and len(found) > 1 else "",
        )
    if len(rows) > _ROWS:
        table.caption = f"and {len(rows) - _ROWS} more kinds of modules with smaller errors"
    return table


def _broken(name: str, widest: int) -> str:
    """Return a name in lines that are not wider, if its parts are not."""
    lines = [""]
    for part in re.split(r"(?<=\.)", name):
        if lines[-1] and len(lines[-1]) + len(part) > widest:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _kind_of(module: str) -> str:
    """Return a module's name with ``*`` for the numbers of layers and experts."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))
