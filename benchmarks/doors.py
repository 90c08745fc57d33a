"""How long the command takes to answer: help, lists, mistakes and completion.

    python benchmarks/doors.py
    python benchmarks/doors.py --small     # some of them once, to try it out

Each is the real console script in a process of its own, started from an empty folder, all in turns.
For comparison: Python that imports nothing, and torch alone.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import measure
from measure import Record, alternate, rounds_of, summary

SCRIPT = Path(sys.executable).parent / "fusion_bench"
COMPLETION = {
    "_ARGCOMPLETE": "1",
    "_ARGCOMPLETE_IFS": "\n",
    "_ARGCOMPLETE_SHELL": "fish",
    "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
    "COMP_TYPE": "",
    "COMP_LINE": "fusion_bench method=ties method.",
    "COMP_POINT": "32",
}
COMMANDS = {
    "--help": ["--help"],
    "--version": ["--version"],
    "ls methods": ["ls", "methods"],
    "show ties": ["show", "ties"],
    "cp ties my.yaml": ["cp", "ties", "my.yaml", "--overwrite"],
    "validate my.yaml seed=abc (a mistake)": ["validate", "my.yaml", "seed=abc"],
    "my.yaml seed=abc (the same, run)": ["my.yaml", "seed=abc"],
    "my.yaml --cfg job": ["my.yaml", "--cfg", "job"],
    "validate my.yaml (sound, zoo built)": ["validate", "my.yaml"],
}
#: Those that import little.
SMALL = ("--help", "--version")


def main() -> None:
    """Time the commands, print the table."""
    arguments = measure.parser(__doc__).parse_args()
    rounds = rounds_of(arguments, 10)
    record = Record(arguments, rounds, ["hydra"])
    commands = {name: COMMANDS[name] for name in SMALL} if arguments.small else COMMANDS
    with tempfile.TemporaryDirectory() as folder:
        run = partial(_run, folder, {})
        contestants: dict[str, Callable[[], object]] = {
            "python -c pass": partial(run, [sys.executable, "-c", "pass"]),
        }
        for name, words in commands.items():
            contestants[name] = partial(run, [str(SCRIPT), *words])
        answer = {"_ARGCOMPLETE_STDOUT_FILENAME": f"{folder}/answer"}
        asked = partial(_run, folder, COMPLETION | answer, [str(SCRIPT)])
        contestants["completion of 'method=ties method.'"] = asked
        for code in ("import fusion_bench", "import torch"):
            contestants[f"python -c '{code}'"] = partial(run, [sys.executable, "-c", code])
        for work in contestants.values():  # reads the files once, and writes my.yaml
            work()
        record.table(
            "answers",
            lambda: {
                name: summary(seconds)
                for name, seconds in alternate(contestants, rounds, warm=True).items()
            },
        )
    record.show()


def _run(folder: str, environment: dict[str, str], command: list[str]) -> None:
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True)
    if done.returncode not in (0, 2):  # 2 is the answer to a mistake
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr.decode()}")


if __name__ == "__main__":
    main()
