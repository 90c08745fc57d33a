"""Runs commands of one program, a list of words in JSON a line; answers with the seconds.

python recipe_peers.py fusion_bench
python recipe_peers.py mergekit
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

#: Where mergekit's commands are.
MODULES = {
    "run_yaml": "mergekit.scripts.run_yaml",
    "extract_lora": "mergekit.scripts.extract_lora",
    "moe": "mergekit.scripts.moe",
}


def ours(words: list[str]) -> None:
    """Run a verb of fusion_bench."""
    from fusion_bench.scripts import verbs

    verbs.run(words[0], words[1:])


def mergekit(words: list[str]) -> None:
    """Run a command of mergekit."""
    command = importlib.import_module(MODULES[words[0]]).main
    command.main(args=words[1:], standalone_mode=False)


def to_the_disk(words: list[str]) -> None:
    """Wait until the files in a command's output are on the disk."""
    places = [Path(word.partition("=")[2] or word) for word in words]
    for place in places:
        for file in place.iterdir() if place.is_dir() and "out_" in place.name else ():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


if __name__ == "__main__":
    say = os.fdopen(os.dup(1), "w")  # the libraries may print what they like elsewhere
    os.dup2(2, 1)
    work = {"fusion_bench": ours, "mergekit": mergekit}[sys.argv[1]]
    for line in sys.stdin:
        command = json.loads(line)
        start = time.perf_counter()
        work(command)
        to_the_disk(command)
        print(time.perf_counter() - start, file=say, flush=True)
