"""What ten settings of a method cost on the disk, beside one reading and ten writings.

    python benchmarks/family.py --json family.json --markdown family.md   # ViT-B/32, 3.5 GB of disk
    python benchmarks/family.py --small                                   # tiny models, to try it

A base and eight models that differ from it by noise are made on the spot. The floor is to read
their files once and to write ten models that are in memory. It takes turns with the family and with
ten merges one after the other, so that a busy moment meets all alike; before that the family's
models are compared with those. What is measured of a method is written when it is.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import alternate, peak, publish, ratio, rounds_of, summary
from methods import write_models

from fusion_bench.method import Family, TaskArithmeticAlgorithm, TiesMergingAlgorithm
from fusion_bench.method.contract import FusionMethod
from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.progress import quiet_libraries
from fusion_bench.storage import whole_directory
from fusion_bench.weights import TensorWeights, in_memory, write_checkpoint

COUNT = 10
BASES: dict[str, FusionMethod] = {
    "task arithmetic": TaskArithmeticAlgorithm(show_pbar=False),
    "TIES": TiesMergingAlgorithm(show_pbar=False),
}


def main() -> None:
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--workdir", type=Path, help="where the files go, on the disk to measure")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--markdown", type=Path, help="where the tables go as Markdown")
    parser.add_argument("--small", action="store_true", help="tiny models, to try it out")
    arguments = parser.parse_args()
    rounds = rounds_of(arguments, 3)
    quiet_libraries()
    torch.set_num_threads(2)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.workdir) as scratch:
        root = Path(scratch)
        write_models(root, small=arguments.small)
        for name, base in BASES.items():
            title = f"{COUNT} settings of {name}"
            results[title] = measured(base, root, rounds)
            publish(results, "family.py", rounds, arguments.json, arguments.markdown)


def measured(base: FusionMethod, root: Path, rounds: int) -> dict[str, Any]:
    """Return what a family of one method costs, beside the floor and merges one by one."""
    paths = {f"m{number}": str(root / f"m{number}") for number in range(8)}
    pool = CLIPVisionModelPool({"_pretrained_": str(root / "base"), **paths})
    factors = [round((number + 1) / COUNT, 1) for number in range(COUNT)]
    family = Family(base, {"scaling_factor": factors})
    ready = TensorWeights(in_memory(pool.weights("m0")))

    def together() -> None:
        fused = family.fuse(pool)
        config = {"method": "family"}
        pool.save_models([(own, root / "family" / name, config) for name, own in fused.items()])

    def one_by_one() -> None:
        for name, member in family.members.items():
            config = {"method": "one"}
            pool.save_model(member.method.fuse(pool), root / "single" / name, config)  # type: ignore[arg-type]

    def write() -> None:
        for number in range(COUNT):
            with whole_directory(root / "floor" / str(number)) as place:
                write_checkpoint(ready, place)

    def floor() -> None:
        read_files([Path(file) for name in pool.model_names for file in pool.weights(name).files])
        read_files([Path(file) for file in pool.weights("_pretrained_").files])
        write()

    together()
    one_by_one()
    for name in family.members:
        one, other = (pool.open_saved(root / kind / name) for kind in ("family", "single"))
        assert all(torch.equal(one[key], other[key]) for key in one), name
    contestants: dict[str, Callable[[], object]] = {
        "(a) one reading and ten writings": floor,
        "(b) ten writings alone": write,
        "(c) the family": together,
        "(d) one merge after the other": one_by_one,
    }
    processed: dict[str, list[float]] = {name: [] for name in contestants}
    clocked = {name: noting(work, processed[name]) for name, work in contestants.items()}
    times = alternate(clocked, rounds, before=lambda: forget(root), warm=True)
    forget(root)
    memory = {"(c) the family": peak(together), "(d) one merge after the other": peak(one_by_one)}
    first = next(iter(contestants))
    return {
        name: {
            **summary(seconds),
            "of (a)": ratio(times, name, first),
            "CPU seconds": round(statistics.median(processed[name]), 2),
            "memory, MB": round(memory[name] / 1e6) if name in memory else "",
        }
        for name, seconds in times.items()
    }


def noting(work: Callable[[], object], seconds: list[float]) -> Callable[[], object]:
    """Return ``work``, whose CPU seconds are noted."""

    def run() -> None:
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)

    return run


def forget(root: Path) -> None:
    """Remove what was written, and wait until the disk is at rest."""
    for kind in ("family", "single", "floor"):
        shutil.rmtree(root / kind, ignore_errors=True)
    os.sync()


def read_files(files: list[Path]) -> None:
    """Read files whole, in blocks, two at a time."""
    left, lock = iter(files), threading.Lock()

    def work() -> None:
        block = bytearray(2**20)
        while True:
            with lock:
                file = next(left, None)
            if file is None:
                return
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(block):
                    pass

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
