"""What becomes of a run in a hostile or failing world.

    python benchmarks/faults.py kills      # killed at random moments, started again
    python benchmarks/faults.py network    # a Hub that refuses, stalls, cuts off and lies
    python benchmarks/faults.py fuzz       # damaged and crafted files
    python benchmarks/faults.py hostile    # configs that want to run code

Each writes its figures to ``benchmarks/results``. The seed makes a round the same each time.
"""

import argparse
from importlib import import_module
from pathlib import Path

PARTS = ("kills", "network", "fuzz", "hostile")


def main() -> None:
    """Run one part; the process fails where an outcome is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int, help="how many trials, where they are random")
    parser.add_argument("--kind", action="append", default=[], help="of files; by default all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, help="kept files; by default a temporary directory")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="where tables go"
    )
    arguments = parser.parse_args()
    part = import_module(f"faults_{arguments.part}")
    more = [arguments.kind] if arguments.part == "fuzz" else []
    part.run(arguments.count, arguments.seed, arguments.workdir, arguments.results, *more)


if __name__ == "__main__":
    main()
