"""List what there is to choose from, a line each.

Without a kind it says how many there are of each. With a word, only those whose name, summary or
paper contains it.

Columns: the name to type; what it does; for methods what they need beside the models, and how long
they take: low (up to 5 times a simple average), medium (up to 50), high, or learns (from data).
"""

import shutil
import sys
from argparse import ArgumentParser, Namespace

EXAMPLES = """
fusion_bench ls methods
fusion_bench ls methods sign
fusion_bench ls models llama
fusion_bench ls configs
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the kind and the word."""
    from fusion_bench.catalog import KINDS

    parser.add_argument("kind", nargs="?", choices=KINDS, help="what to list")
    parser.add_argument("word", nargs="?", help="part of the name, the summary or the paper")


def run(arguments: Namespace) -> int:
    """Print the lines; the exit code is 1 where there are none."""
    from fusion_bench.catalog import KINDS, of_kind

    if arguments.kind is None:
        for kind in KINDS:
            print(f"fusion_bench ls {kind:8}  {sum(1 for _ in of_kind(kind)):3}")
        return 0
    word = (arguments.word or "").lower()
    rows: list[tuple[str, ...]] = [
        (entry.name, entry.summary, entry.needs, entry.cost, entry.paper)
        for entry in of_kind(arguments.kind)
        if word in f"{entry.name} {entry.summary} {entry.paper}".lower()
    ]
    if not rows:
        print(f"No {arguments.kind} with '{arguments.word}'.", file=sys.stderr)
        return 1
    titles = ("name", "what it does", "needs", "cost", "paper")
    if arguments.kind != "methods":
        titles = ("name", "what it is", "from", "", "")
    print_table([titles, *rows] if sys.stdout.isatty() else rows)
    return 0


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print aligned columns; on a terminal each row is cut to its width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    # The last column goes first, then the end of the second.
    if sum(widths) + 2 * len(widths) > room and len(widths) > 2:
        widths[-1] = 0
    others = sum(width + 2 for width in widths if width) - widths[1]
    widths[1] = max(min(widths[1], room - others), 12)
    for row in rows:
        cells = (_cut(cell, width) for cell, width in zip(row, widths, strict=True) if width)
        print("  ".join(cells).rstrip())


def _cut(cell: str, width: int) -> str:
    return f"{cell:{width}}" if len(cell) <= width else f"{cell[: width - 1]}…"
