"""What a GPU gains, beside the CPU of the same machine, and how near it comes to its limit.

    python benchmarks/device.py --json device.json        # a quarter of an hour or more
    python benchmarks/device.py --small                   # tiny models, and every method
    python benchmarks/device.py --only merging answers    # some of the tables

Merging and learning take turns on CPU and GPU, after a first time that warms up; what takes long on
a device is timed that first time, as the column `rounds` says. Evaluating takes turns with the bare
forward pass on the same device. Files are in the page cache. The models of the merges
are a base and eight that differ from it by noise, the encoder that is evaluated has random weights,
the images are JPEGs of about 500×400. Each row is written as it is found, and rows that the file of
`--json` has are kept: a run that was stopped goes on. What fails is told and left out.
Where a GPU's result is another than the CPU's, there is no ratio of their times.

Without a GPU there is the CPU alone. The embedded models take minutes to build at first use.
"""

import argparse
import itertools
import logging
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from evaluate import dataset, write_files
from lightning.fabric import Fabric
from measure import (
    Record,
    Row,
    Times,
    alternate,
    own_cache,
    prepared,
    ratio,
    rounds_of,
    summary,
)
from methods import TWO_MODELS, write_models
from methods import methods as all_methods
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusion_bench.configs import composed
from fusion_bench.instantiate import instantiate
from fusion_bench.modelpool import CLIPVisionModelPool
from fusion_bench.programs.fusing import fuse
from fusion_bench.progress import quiet_libraries
from fusion_bench.results import ACCURACY
from fusion_bench.taskpool import CLIPVisionModelTaskPool
from fusion_bench.taskpool.images.evaluate import Loading, batches
from fusion_bench.weights import Weights, in_memory

MERGING = "merging eight {} encoders"
LEARNING = "learning from data, two {} encoders"
EVALUATING = "evaluating a {} encoder"
BATCHES = "evaluating in bf16-true, by batch size"
MEMORY = "where memory runs out"
ANSWERS = "answers on the embedded models"
RUNS = "learning from data, embedded models"
CPU, GPU = "cpu", "cuda"
#: Seconds beyond which a device's first time counts, and there is no other.
LONG = 3.0
#: The share of what merging changed, below which results of two devices are alike.
ALIKE = 1e-3
#: Quick ones first, so that a run that is cut off has many rows.
MERGES = {
    "simple_average": (),
    "task_arithmetic": (),
    "ties_merging": (),
    "dare/task_arithmetic": (),
    "isotropic_merging/iso_c": (),
    "wudi/wudi": ("method.iter_num=20",),
    "opcm/opcm": (),
    "task_singular_vector/TaskSingularVectorMerging": (),
    "isotropic_merging/iso_cts": (),
    "knots/knots": (),
}
LEARNERS = {
    "regmean/clip_regmean": ("method.num_regmean_examples=128",),
    "adamerging/layer_wise": ("method.max_steps=5",),
    "fisher_merging/clip_fisher_merging": ("method.num_fisher_examples=16",),
}
RUN_METHODS = {
    "regmean/clip_regmean": ("method.num_regmean_examples=64",),
    "adamerging/layer_wise": ("method.max_steps=20",),
    "fisher_merging/clip_fisher_merging": ("method.num_fisher_examples=16",),
}
#: Every other one, where models are tiny.
MORE_LEARNERS = {
    "adamerging/task_wise_plusplus": ("method.max_steps=2",),
    "regmean_plusplus/clip_regmean_plusplus": (),
    "model_soup/greedy": (),
    "model_soup/learned": ("method.max_steps=2",),
}
PRECISIONS = ("32-true", "32-true, TF32", "bf16-mixed", "bf16-true")


def main() -> None:
    """Measure what is asked for, print the tables and write them."""
    parser = measure.parser(__doc__, workdir=True)
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS], help="of the tables")
    parser.add_argument("--methods", nargs="+", help="of those that merge or learn")
    arguments = parser.parse_args()
    quiet_libraries()
    logging.getLogger("lightning").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        root = arguments.workdir or Path(scratch)
        bench = Bench(root, arguments)
        if not torch.cuda.is_available():
            print("There is no GPU here: the CPU alone is measured.", file=sys.stderr)
        else:
            warm_up()
        # The embedded models take minutes to build.
        small = [name for name in SECTIONS if name not in ("answers", "runs")]
        for name in arguments.only or (small if arguments.small else SECTIONS):
            SECTIONS[name](bench)
    bench.record.show()


class Bench:
    """The rows that there are, the devices to compare, and the files to measure on."""

    def __init__(self, root: Path, arguments: argparse.Namespace):
        self.root = root
        self.small = arguments.small
        self.rounds = rounds_of(arguments, 2)
        self.methods = arguments.methods
        self.devices = [CPU, *([GPU] if torch.cuda.is_available() else [])]
        self.images = {CPU: 32 if self.small else 256, GPU: 64 if self.small else 4096}
        self.record = Record(arguments, None, ("torch", "transformers"))

    def wants(self, method: str) -> bool:
        """Return whether a method is asked for."""
        return self.methods is None or method in self.methods

    def row(self, title: str, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a row, unless it is there, and write all that there are."""
        title = title.format("tiny" if self.small else "ViT-B/32")
        if self.record.has(title, name):
            return
        try:
            found = measure()
        except Exception:
            print(f"{title}: {name} is left out\n{traceback.format_exc()}", file=sys.stderr)
            return
        finally:
            free()
        self.record.row(title, name, found)

    @cache  # noqa: B019, there is one for the whole run
    def merge_files(self) -> Path:
        """Write the models of the merges, and return where."""
        write_models(self.root / "merge", small=self.small)
        return self.root / "merge"

    @cache  # noqa: B019
    def evaluation_files(self) -> Path:
        """Write models and datasets, one of which has the images of another many times."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        root = self.root / "evaluate"
        unique, count = (16, 64) if self.small else (256, 4096)
        write_files(root, unique, small=self.small)
        for seed, name in enumerate(("one", "two")):  # which are alike
            place = root / f"tuned-{name}"
            if not place.exists():
                shutil.copytree(root / name, place)
                generator = torch.Generator().manual_seed(seed)
                tensors = load_file(root / name / "model.safetensors")
                for key, tensor in tensors.items():
                    noise = torch.randn(tensor.shape, generator=generator)
                    tensors[key] = tensor + 1e-3 * noise
                save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        many = root / "datasets" / f"many-{count}" / "test.parquet"
        if not many.exists():
            many.parent.mkdir(parents=True)
            few = pq.read_table(root / "datasets" / f"one-{unique}" / "test.parquet")
            pq.write_table(pa.concat_tables([few] * (count // unique)), many, row_group_size=1024)
        return root


def warm_up() -> None:
    """Have CUDA load what products and factorisations need."""
    square = torch.randn(64, 64, device=GPU, dtype=torch.float64)
    torch.linalg.eigh(square @ square.T)
    torch.linalg.svd(square)
    (square.float() @ square.float()).sum().item()


def free() -> None:
    """Give back what the GPU's allocator holds."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def observed(peak: dict[str, float]) -> Iterator[None]:
    """Note by how many MB what is allocated on the GPU grows at most."""
    if not torch.cuda.is_available():
        yield
        return
    free()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    torch.cuda.synchronize()
    peak["MB"] = round((torch.cuda.max_memory_allocated() - before) / 1e6)


def fabric_on(device: str, precision: Any = "32-true") -> Fabric:
    """Return Fabric with one process on a device."""
    return Fabric(accelerator=device, devices=1, precision=precision)


def turns(work: Callable[[str], Any], devices: Sequence[str], rounds: int) -> Times:
    """Let devices take turns, warmed up; where one takes long its first time has to do."""
    contestants = {device: partial(work, device) for device in devices}
    times = alternate(contestants, 1, warm=True)
    quick = {name: contestants[name] for name in devices if times[name][0] < LONG}
    alone = len(quick) < len(contestants)
    return times | alternate(quick, 1 if alone else rounds, warm=True)


def compared(times: Times, peak: dict[str, float], *, alike: bool) -> dict[str, Any]:
    """Return the seconds on each device, and what the GPU gains where the results are alike."""
    found: dict[str, Any] = {
        f"{device}, seconds": summary(seconds)["seconds"] for device, seconds in times.items()
    }
    if GPU in times:
        found["times as fast"] = ratio(times, CPU, GPU) if alike else "results differ"
        found["GPU's peak MB"] = peak["MB"]
    found["rounds"] = len(times[CPU])
    return found


Models = dict[str, dict[str, Tensor]]


def difference(one: Models, other: Models, base: dict[str, Tensor]) -> tuple[float, float]:
    """Return how far models of two devices are apart, and as a share of what merging changed."""
    largest = apart = changed = 0.0
    for model, tensors in one.items():
        for key, tensor in tensors.items():
            own = tensor.double()
            gap = own - other[model][key].double()
            largest = max(largest, float(gap.abs().max()))
            apart += float(gap.square().sum())
            changed += float((own - base[key].double()).square().sum())
    return largest, (apart / changed) ** 0.5 if changed else apart**0.5


def beside(merged: Mapping[str, Models], base: dict[str, Tensor]) -> tuple[Row, bool]:
    """Return the columns of the difference of the devices' results, and whether it is small."""
    if GPU not in merged:
        return {}, True
    largest, share = difference(merged[CPU], merged[GPU], base)
    told = {"largest difference": f"{largest:.1e}", "share of the change": f"{share:.1e}"}
    return told, share < ALIKE


# --- merging --------------------------------------------------------------------------------------


def merging(bench: Bench) -> None:
    """Merge on either device. Methods that factorise follow Fabric, the others `policy.device`."""
    known: dict[str, Sequence[str]] = dict(MERGES)
    if bench.small:
        known |= {name: () for name in all_methods() if name not in known}
    for name, settings in known.items():
        if not bench.wants(name):
            continue
        method = method_of(name, settings)
        if getattr(method, "needs_data", False) or name.startswith("ensemble/"):
            continue
        shown = ", ".join([name, *(word.removeprefix("method.") for word in settings)])
        bench.row(MERGING, shown, lambda name=name, method=method: merge_row(bench, name, method))


def method_of(name: str, settings: Sequence[str]) -> Any:
    """Return a method with its defaults but for some settings."""
    return instantiate(composed(f"method={name}", "seed=0", *settings)["method"], "method")


def merge_row(bench: Bench, name: str, method: Any) -> dict[str, Any]:
    """Return one method's figures."""
    root = bench.merge_files()
    names = {"_pretrained_": "base"} | {
        f"m{number}": f"m{number}" for number in range(1 if name in TWO_MODELS else 8)
    }
    models = {own: str(root / place) for own, place in names.items()}
    merged: dict[str, Models] = {}
    peak: dict[str, float] = {}

    def work(device: str) -> None:
        heavy = getattr(method, "heavy", False)
        pool = CLIPVisionModelPool(models, policy={"device": CPU if heavy else device})
        made = fuse(method, pool, fabric_on(device), None)
        merged[device] = {
            own: in_memory(weights) for own, weights in made.items() if isinstance(weights, Weights)
        }

    with observed(peak):
        times = turns(work, bench.devices, bench.rounds)
    told, alike = beside(merged, dict(CLIPVisionModelPool(models).weights("_pretrained_")))
    return compared(times, peak, alike=alike) | told


# --- learning -------------------------------------------------------------------------------------


def learning(bench: Bench) -> None:
    """Learn from images on either device."""
    known = LEARNERS | (MORE_LEARNERS if bench.small else {})
    for name, settings in known.items():
        if not bench.wants(name):
            continue
        shown = ", ".join([name, *(word.removeprefix("method.") for word in settings)])
        bench.row(
            LEARNING,
            shown,
            lambda name=name, settings=settings: learning_row(bench, name, settings),
        )


def learning_row(bench: Bench, name: str, settings: Sequence[str]) -> dict[str, Any]:
    """Return one method's figures."""
    files = bench.evaluation_files()
    models = {
        "_pretrained_": str(files / "one"),
        "one": str(files / "tuned-one"),
        "two": str(files / "tuned-two"),
    }
    images = {task: dataset(files, task) for task in ("one", "two")}
    merged: dict[str, Models] = {}
    peak: dict[str, float] = {}

    def work(device: str) -> float:
        fabric = fabric_on(device)
        pool = CLIPVisionModelPool(models)
        tasks = CLIPVisionModelTaskPool(images, clip_model=str(files / "clip"))
        data = tasks.tuning(images, fabric, "modelpool.train_datasets")
        for own in data.values():  # so that images and text heads are ready
            own.classify(fabric.to_device(pool.load_model("one")))
            for index in range(len(own)):
                own.images.pixels(index)
        start = time.perf_counter()
        made = fuse(method_of(name, settings), pool, fabric, data)
        merged[device] = {
            own: in_memory(weights) for own, weights in made.items() if isinstance(weights, Weights)
        }
        return time.perf_counter() - start

    with own_cache(bench.root / "cache"), observed(peak):
        times = turns(work, bench.devices, bench.rounds)
    told, alike = beside(merged, dict(CLIPVisionModelPool(models).weights("_pretrained_")))
    return compared(times, peak, alike=alike) | told


# --- evaluating -----------------------------------------------------------------------------------


@contextmanager
def arithmetic(precision: str) -> Iterator[Any]:
    """Yield what Fabric calls a precision of ours; `TF32` lets float32 products use it."""
    name, _, tf32 = precision.partition(", ")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield name
    finally:
        torch.set_float32_matmul_precision("highest")


def evaluating(bench: Bench) -> None:
    """Evaluate an encoder, beside its bare forward pass, in each precision."""
    cases = itertools.chain(
        itertools.product([CPU], ["32-true", "bf16-true"]), itertools.product([GPU], PRECISIONS)
    )
    for device, precision in cases:
        if device in bench.devices:
            bench.row(
                EVALUATING,
                f"{device}, {precision}",
                lambda device=device, precision=precision: speed_row(bench, device, precision),
            )
    if GPU not in bench.devices:
        return
    for size in (8, 32) if bench.small else (32, 128, 512, 2048):
        bench.row(BATCHES, f"{size} images", lambda size=size: batch_row(bench, size))
    sizes = {64: 0.05} if bench.small else {4096: 3.0}
    for size, room in sizes.items():
        bench.row(
            MEMORY,
            f"batches of {size}, {room:g} GB of memory",
            lambda size=size, room=room: memory_row(bench, size, room),
        )


class Encoder:
    """An encoder with random weights, and the task pool that evaluates it on some device."""

    def __init__(self, bench: Bench, device: str, precision: Any, batch: int | None = None):
        from transformers import CLIPVisionModel

        self.root = bench.evaluation_files()
        self.count = bench.images[device]
        self.fabric = fabric_on(device, precision)
        self.batch = {} if batch is None else {"batch_size": batch}
        loaded = CLIPVisionModel.from_pretrained(self.root / "one").eval()
        module = self.fabric.strategy.precision.convert_module(loaded)
        self.module = self.fabric.to_device(module)
        self.pool = self.fresh(self.count)

    def fresh(self, count: int) -> CLIPVisionModelTaskPool:
        """Return a pool that has its text head, and of the cache what there is."""
        pool = CLIPVisionModelTaskPool(
            {"many": dataset(self.root, "many")},
            clip_model=str(self.root / "clip"),
            dataloader_kwargs=self.batch,
            max_samples=count,
        )
        pool.prepare(self.fabric)
        pool.tasks["many"].classifier(self.module, "model", self.fabric)
        return pool

    def first_pass(self) -> float:
        """Return how many images a second are evaluated where none is prepared."""
        count = min(self.count, 1024)
        with tempfile.TemporaryDirectory() as empty, own_cache(Path(empty)):
            pool = self.fresh(count)
            start = time.perf_counter()
            pool.evaluate(self.module, self.fabric)
            return count / (time.perf_counter() - start)

    def evaluate(self) -> Any:
        """Evaluate by way of the pool."""
        return self.pool.evaluate(self.module, self.fabric)["many"]

    def bare(self, precision: str) -> Callable[[], None]:
        """Return the forward passes alone, on batches that lie ready on the device.

        Raises:
            ValueError: their answers are others than those of the pool; in float32 none may be.
        """
        images, samples = prepared(self.pool.tasks["many"]), self.pool._samples("many", None)
        classify = self.pool.tasks["many"].classifier(self.module, "model", self.fabric)
        convert = self.fabric.strategy.precision.convert_input
        size = Loading.for_device(self.batch, self.fabric).batch_size
        ready = []
        for part in np.split(samples, range(size, len(samples), size)):
            pixels = torch.from_numpy(np.stack([images.pixels(int(i)) for i in part]))
            ready.append(convert(images.preprocessor.finish(pixels.to(self.fabric.device))))

        with torch.inference_mode(), self.fabric.autocast():
            found = torch.cat([classify(batch).argmax(-1) for batch in ready]).cpu().numpy()
        same = float(np.mean(found == self.evaluate().details["predictions"]))
        if same < (1.0 if precision == "32-true" else 0.99):
            raise ValueError(f"The bare pass and the pool give the same answers to {same:.1%}.")

        def forward() -> None:
            with torch.inference_mode(), self.fabric.autocast():
                for batch in ready:
                    result = classify(batch)
            result.sum().item()

        return forward

    def load(self) -> None:
        """Bring the prepared images to the device and do nothing with them."""
        loading = Loading.for_device(self.batch, self.fabric)
        samples, size = self.pool._samples("many", None), loading.batch_size
        steps = np.split(samples, range(size, len(samples), size))
        for pixels in batches(prepared(self.pool.tasks["many"]), steps, loading):
            last = pixels.to(self.fabric.device, non_blocking=True)
        last.sum().item()


def speed_row(bench: Bench, device: str, precision: str) -> dict[str, Any]:
    """Return images a second of the bare pass, and of first and later passes of ours."""
    peak: dict[str, float] = {}
    with arithmetic(precision) as name, own_cache(bench.root / "cache"):
        with observed(peak):
            encoder = Encoder(bench, device, name)
            first = encoder.first_pass()
            encoder.evaluate()

        contestants: dict[str, Callable[[], object]] = {
            "bare": encoder.bare(precision),
            "later": encoder.evaluate,
        }
        times = alternate(contestants, bench.rounds)
    rate = {name: round(encoder.count / summary(s)["seconds"]) for name, s in times.items()}
    found = {
        "bare pass, images/s": rate["bare"],
        "later passes, images/s": rate["later"],
        "of the bare pass": round(1 / ratio(times, "later", "bare"), 2),
        "first pass, images/s": round(first),
    }
    if GPU in bench.devices:
        found["GPU's peak MB"] = peak["MB"] if device == GPU else "–"
    return found


def batch_row(bench: Bench, size: int) -> dict[str, Any]:
    """Return images a second for a size of batches."""
    peak: dict[str, float] = {}
    with own_cache(bench.root / "cache"):
        with observed(peak):
            encoder = Encoder(bench, GPU, "bf16-true", size)
            encoder.evaluate()
        contestants: dict[str, Callable[[], object]] = {
            "bare pass": encoder.bare("bf16-true"),
            "later passes": encoder.evaluate,
            "loading alone": encoder.load,
        }
        times = alternate(contestants, bench.rounds)
    rate = {
        f"{name}, images/s": round(encoder.count / summary(seconds)["seconds"])
        for name, seconds in times.items()
    }
    return {**rate, "GPU's peak MB": peak["MB"]}


def memory_row(bench: Bench, size: int, room: float) -> dict[str, Any]:
    """Let the program have some GB of the GPU's memory beside the model, and evaluate."""
    with own_cache(bench.root / "cache"):
        expected = Encoder(bench, GPU, "32-true").evaluate()
        encoder = Encoder(bench, GPU, "32-true", size)
        free()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, (torch.cuda.memory_reserved() + room * 1e9) / total)
        )
        try:
            score = encoder.evaluate()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        "images at a time in the end": encoder.pool._room.most or size,
        "same answers, %": percent(score.details["predictions"] == expected.details["predictions"]),
    }


def percent(same: Any) -> float:
    """Return the share of true values."""
    return round(100 * float(np.mean(same)), 3)


# --- the embedded models --------------------------------------------------------------------------


def answers(bench: Bench) -> None:
    """Compare each device's answers with those of the CPU in float32."""
    settings = [(CPU, "bf16-true"), *((GPU, precision) for precision in PRECISIONS)]
    settings.insert(1, (GPU, "32-true, no TF32 in convolutions"))
    samples = 10 if bench.small else None
    expected = cache(lambda: all_answers(CPU, "32-true", samples))
    for device, precision in settings:
        if device in bench.devices:
            bench.row(
                ANSWERS,
                f"{device}, {precision}",
                lambda device=device, precision=precision: answers_row(
                    expected(), all_answers(device, precision, samples)
                ),
            )


def all_answers(device: str, precision: str, samples: int | None) -> dict[str, Any]:
    """Return what the pretrained and the fine-tuned models answer on all tasks."""
    name, _, rest = precision.partition(", ")
    config = composed("++taskpool.cache=false", f"++taskpool.max_samples={samples or 'null'}")
    models = instantiate(config["modelpool"], "modelpool")
    tasks = instantiate(config["taskpool"], "taskpool")
    convolutions = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = not rest.startswith("no ")
    found = {}
    try:
        with arithmetic(precision if rest == "TF32" else name) as known:
            fabric = fabric_on(device, known)
            for model in ("_pretrained_", *models.model_names):
                scores = tasks.evaluate(models.load_model(model), fabric, name=model)
                found |= {f"{model} on {task}": score for task, score in scores.items()}
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
    return found


def answers_row(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return how many answers are the same, and how far losses are apart."""
    pairs = [(found[name], expected[name]) for name in expected]
    same = np.concatenate(
        [one.details["predictions"] == other.details["predictions"] for one, other in pairs]
    )
    apart = max(
        float(np.abs(one.statistics["loss"] - other.statistics["loss"]).max())
        for one, other in pairs
    )
    return {
        "same answers, %": percent(same),
        "others": f"{(~same).sum()} of {len(same)}",
        "largest difference of a loss": f"{apart:.1e}",
        "right": sum(int(one.totals(ACCURACY)[0]) for one, _ in pairs),
        "right on cpu, 32-true": sum(int(other.totals(ACCURACY)[0]) for _, other in pairs),
    }


def runs(bench: Bench) -> None:
    """Run the default config with methods that learn, on either device."""
    for name, settings in RUN_METHODS.items():
        if not bench.wants(name):
            continue
        few = tuple(f"{word.partition('=')[0]}=2" for word in settings)
        chosen = few if bench.small else settings
        shown = ", ".join([name, *(word.removeprefix("method.") for word in chosen)])
        bench.row(RUNS, shown, lambda name=name, chosen=chosen: run_row(bench, name, chosen))


def run_row(bench: Bench, name: str, settings: Sequence[str]) -> dict[str, Any]:
    """Return the seconds of fusing, and the accuracies."""
    accuracies: dict[str, float] = {}
    right: dict[str, tuple[float, ...]] = {}
    peak: dict[str, float] = {}

    def work(device: str) -> float:
        words = [f"method={name}", *settings, f"fabric.accelerator={device}", "seed=0"]
        words += [
            "method.split=validation",
            "baselines=none",
            "similarity=false",
            "++taskpool.cache=false",
        ]
        words += ["++taskpool.max_samples=10"] if bench.small else []
        with tempfile.TemporaryDirectory() as place:
            report = instantiate(composed(*words), output_dir=place).run()
        (model,) = report.models.values()
        scores = [task.main.value for task in model.tasks.values()]
        accuracies[device] = round(100 * float(np.mean(scores)), 1)
        right[device] = tuple(scores)
        return float(report.run.seconds.fuse)

    with observed(peak):
        times = turns(work, bench.devices, bench.rounds)
    found = compared(times, peak, alike=len(set(right.values())) == 1)
    found |= {f"{device}, accuracy": value for device, value in accuracies.items()}
    return found


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "answers": answers,
    "evaluating": evaluating,
    "learning": learning,
    "merging": merging,
    "runs": runs,
}

if __name__ == "__main__":
    main()
