"""How fast a model is evaluated, beside its bare forward pass and the obvious loop.

    python benchmarks/evaluate.py            # some minutes on two cores
    python benchmarks/evaluate.py --small    # the same with a tiny model, to try it out

The model is a CLIP ViT-B/32 with random weights, the images are JPEGs of about 500×400. All is
measured in one run, one round after the other; ratios are of one round.
"""

import io
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
import yaml
from lightning.fabric import Fabric
from measure import Record, alternate, prepared, ratio, rounds_of
from torch.utils.data import DataLoader

from fusion_bench.progress import quiet_libraries
from fusion_bench.taskpool import CLIPVisionModelTaskPool

CLASSES = [f"thing {number}" for number in range(10)]
BATCH = 32


def main() -> None:
    """Make the files, measure, print the tables."""
    parser = measure.parser(__doc__, workdir=True)
    parser.add_argument("--images", type=int)
    arguments = parser.parse_args()
    rounds = rounds_of(arguments, 3)
    images = arguments.images or (34 if arguments.small else 128)
    record = Record(arguments, rounds)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        root = arguments.workdir or Path(scratch)
        write_files(root, images, small=arguments.small)
        for precision in ("32-true", "bf16-true"):
            title = f"evaluating, {precision}"
            record.table(title, lambda precision=precision: passes(root, precision, rounds))
        record.table("starting", lambda: starting(root, rounds))
        record.table("the whole command", lambda: commands(root))
    record.show()


def write_files(root: Path, images: int, *, small: bool) -> None:
    """Write a whole CLIP model, two vision encoders and two datasets, unless they are there."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    from fusion_bench.zoo.tokenizer import train

    if not (root / "clip").exists():
        tokenizer = train(f"a photo of a {name}." for name in CLASSES)
        text = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "num_hidden_layers": 2 if small else 12,
        }
        vision = {"patch_size": 32} | (
            {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1} if small else {}
        )
        vision |= {"num_attention_heads": 4} if small else {}
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
        for name in ("one", "two"):
            clip.vision_model.save_pretrained(root / name)
        clip.save_pretrained(root / "clip")
        tokenizer.save_pretrained(root / "clip")
        CLIPImageProcessorPil().save_pretrained(root / "clip")
    for seed, name in enumerate(("one", "two")):
        write_dataset(root / "datasets" / f"{name}-{images}", images, seed)


def write_dataset(place: Path, images: int, seed: int) -> None:
    """Write a dataset, unless it is there."""
    from datasets import ClassLabel, Dataset, Features, Image

    if (place / "test.parquet").exists():
        return
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES)})
    place.mkdir(parents=True)
    random = np.random.default_rng(seed)
    rows = {"image": [jpeg(random) for _ in range(images)]}
    rows["label"] = [int(label) for label in random.integers(0, len(CLASSES), images)]
    Dataset.from_dict(rows, features=features).to_parquet(place / "test.parquet")


def jpeg(random: np.random.Generator) -> dict[str, Any]:
    """Return a picture of about 500×400 with some structure, as a camera's would have."""
    from PIL import Image

    coarse = random.integers(0, 256, (10, 12, 3), dtype=np.uint8)
    size = (int(random.integers(480, 520)), int(random.integers(380, 420)))
    picture = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    noise = random.integers(-12, 13, picture.shape)
    content = io.BytesIO()
    Image.fromarray((picture + noise).clip(0, 255).astype(np.uint8)).save(content, "JPEG")
    return {"bytes": content.getvalue(), "path": None}


def dataset(root: Path, name: str) -> dict[str, Any]:
    """Return the config node of a dataset."""
    (path,) = (root / "datasets").glob(f"{name}-*")
    return {"_target_": "datasets.load_dataset", "path": str(path), "split": "test"}


def passes(root: Path, precision: Any, rounds: int) -> dict[str, Any]:
    """Time bare forward pass, first and later passes of ours, and the obvious loops."""
    from transformers import CLIPVisionModel

    fabric = Fabric(accelerator="auto", devices=1, precision=precision)

    def pool() -> CLIPVisionModelTaskPool:
        made = CLIPVisionModelTaskPool(
            {"one": dataset(root, "one")},
            clip_model=str(root / "clip"),
            dataloader_kwargs={"batch_size": BATCH},
        )
        made.prepare(fabric)
        return made

    def model() -> Any:
        loaded = CLIPVisionModel.from_pretrained(root / "one").eval()
        return fabric.to_device(fabric.strategy.precision.convert_module(loaded))

    own = tempfile.TemporaryDirectory()
    os.environ["FUSION_BENCH_CACHE"] = own.name
    warm, encoder = pool(), model()
    scores = warm.evaluate(encoder, fabric)
    images = prepared(warm.tasks["one"])
    head = warm.tasks["one"].classifier(encoder, "model", fabric)
    count = len(images.data.labels)
    everything = torch.from_numpy(np.stack([images.pixels(i) for i in range(count)]))
    ready = images.preprocessor.finish(everything).to(fabric.device)
    ready = fabric.strategy.precision.convert_input(ready)

    def forward() -> None:
        with torch.inference_mode():
            for batch in ready.split(BATCH):
                result = head(batch)
        result.sum().item()

    with torch.inference_mode():
        found = torch.cat([head(batch).argmax(-1) for batch in ready.split(BATCH)])
    expected = found.cpu().numpy()
    _alike(scores["one"].details["predictions"], expected, "fusion_bench")
    for size in (1, 32):
        _alike(obvious_loop(root, encoder, head, fabric, size)[1], expected, "obvious loop")

    def first_pass() -> float:
        with tempfile.TemporaryDirectory() as empty:
            os.environ["FUSION_BENCH_CACHE"] = empty
            fresh = pool()
            fresh.tasks["one"].classifier(encoder, "model", fabric)  # the text head is made before
            start = time.perf_counter()
            scores = fresh.evaluate(encoder, fabric)
            seconds = time.perf_counter() - start
        _alike(scores["one"].details["predictions"], expected, "first pass")
        os.environ["FUSION_BENCH_CACHE"] = own.name
        return seconds

    contestants: dict[str, Callable[[], object]] = {
        "(a) bare forward pass": forward,
        "(b) fusion_bench, first pass": first_pass,
        "(c) fusion_bench, later passes": lambda: warm.evaluate(encoder, fabric),
    }
    for size in (1, 32):
        contestants[f"(d) obvious loop, batches of {size}"] = lambda size=size: obvious_loop(
            root, encoder, head, fabric, size
        )[0]
    times = alternate(contestants, rounds)
    own.cleanup()
    return {
        name: {
            "images a second": round(count / float(np.median(seconds)), 1),
            "of the bare pass": round(1 / ratio(times, name, "(a) bare forward pass"), 2),
        }
        for name, seconds in times.items()
    }


def _alike(found: Any, expected: Any, name: str) -> None:
    """Refuse to compare times where answers differ: one in a hundred may, by rounding."""
    same = float(np.mean(np.asarray(found) == expected))
    if same < 0.99:
        raise SystemExit(
            f"{name}: {same:.1%} of the answers are those of the bare pass. Their times are not "
            "compared."
        )


def obvious_loop(
    root: Path, encoder: Any, head: Any, fabric: Fabric, batch_size: int
) -> tuple[float, list[int]]:
    """Return the seconds, and the answers, as one would compute them at first."""
    from datasets import load_dataset
    from transformers import CLIPImageProcessorPil, CLIPProcessor, CLIPTokenizer

    node = dataset(root, "one")
    data = load_dataset(node["path"], split="test")
    processor = CLIPProcessor(
        CLIPImageProcessorPil.from_pretrained(root / "clip"),
        CLIPTokenizer.from_pretrained(root / "clip"),
    )

    def collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = processor(images=[row["image"].convert("RGB") for row in rows], return_tensors="pt")
        return batch["pixel_values"], torch.tensor([row["label"] for row in rows])

    start, correct, answers = time.perf_counter(), 0, list[int]()
    with torch.no_grad():
        for pixels, labels in DataLoader(data, batch_size=batch_size, collate_fn=collate):
            pixels = fabric.strategy.precision.convert_input(pixels.to(fabric.device))
            found = head(pixels).argmax(-1).cpu()
            correct += (found == labels).sum().item()
            answers += found.tolist()
    return time.perf_counter() - start, answers


def content(root: Path, method: str) -> dict[str, Any]:
    """Return a config like the tutorial's, with a class of a method."""
    return {
        "_target_": "fusion_bench.programs.FabricModelFusionProgram",
        "_recursive_": False,
        "method": {"_target_": f"fusion_bench.method.{method}"},
        "modelpool": {
            "_target_": "fusion_bench.modelpool.CLIPVisionModelPool",
            "models": {
                "_pretrained_": str(root / "clip"),
                "one": str(root / "one"),
                "two": str(root / "two"),
            },
        },
        "taskpool": {
            "_target_": "fusion_bench.taskpool.CLIPVisionModelTaskPool",
            "test_datasets": {name: dataset(root, name) for name in ("one", "two")},
            "clip_model": str(root / "clip"),
            "processor": str(root / "clip"),
        },
    }


def config(content: dict[str, Any], directory: Path) -> list[str]:
    """Write a config; return the words that name it."""
    (directory / "own.yaml").write_text(yaml.safe_dump(content))
    return ["--config-path", str(directory), "--config-name", "own"]


def starting(root: Path, rounds: int) -> dict[str, Any]:
    """Time from the start of the process to the first batch, beside the imports alone."""
    imports = "import torch; from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel"
    to_first_batch = textwrap.dedent(
        """
        import os, sys
        from fusion_bench.scripts.cli import main
        import fusion_bench.taskpool.images.preprocess as preprocess

        calls = []
        def finish(self, pixels, real=preprocess.Preprocessor.finish):
            if pixels.shape[-1] != 16:  # the table that is read off the processor is no batch
                os._exit(0)
            return real(self, pixels)

        preprocess.Preprocessor.finish = finish
        main()
        """
    )
    with tempfile.TemporaryDirectory() as directory:
        words = config(content(root, "SimpleAverageAlgorithm"), Path(directory))
        env = os.environ | {"FUSION_BENCH_CACHE": directory + "/cache"}

        def run(code: str, *arguments: str) -> None:
            subprocess.run(
                [sys.executable, "-c", code, *arguments],
                cwd=directory,
                env=env,
                check=True,
                capture_output=True,
            )

        contestants = {
            "importing torch and the CLIP classes": lambda: run(imports),
            "fusion_bench, to the first batch": lambda: run(to_first_batch, *words),
        }
        times = alternate(contestants, rounds)
    first = next(iter(contestants))
    return {
        name: {
            "seconds": round(float(np.median(seconds)), 2),
            "of the imports": ratio(times, name, first),
        }
        for name, seconds in times.items()
    }


def commands(root: Path) -> dict[str, Any]:
    """Time the tutorial's command, and again with nothing changed."""
    with tempfile.TemporaryDirectory() as directory:
        words = config(content(root, "SimpleAverageAlgorithm"), Path(directory))
        env = os.environ | {"FUSION_BENCH_CACHE": directory + "/cache"}
        seconds = {}
        for name in ("first run", "again, nothing changed"):
            start = time.perf_counter()
            command = [sys.executable, "-m", "fusion_bench", *words]
            subprocess.run(command, cwd=directory, env=env, check=True, capture_output=True)
            seconds[name] = {"seconds": round(time.perf_counter() - start, 2)}
    return seconds


if __name__ == "__main__":
    main()
