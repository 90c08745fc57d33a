"""How long mergekit's recipes take, here and in mergekit itself, and how much memory.

    python benchmarks/recipes.py --peer /path/to/the/python/with/mergekit
    python benchmarks/recipes.py --small     # small files, without mergekit unless it is given

The models are made on the spot: a Llama with random weights, and others that are a step away from
it. Both programs run the same file of YAML: as a command that is typed, with all that it imports,
and once more in a process of their own which has imported all that it needs (``warm``); there the
first round warms up and does not count. Each merge ends when its files are on the disk. Memory is
the most anonymous memory of the typed command. Then the two results are compared: ``difference`` is
the largest one, in steps of the output's type (1 is its rounding), and the share of the elements
that are further apart. Changes of bfloat16 models have many equal magnitudes, of which TIES and
Breadcrumbs keep others here than there.
Methods that draw random masks are not compared. Rows that the file of ``--json`` has are kept.

The ``floor`` is what no program can save: all cores read every byte that the recipe needs once, and
write as many bytes as its result has, until they are on the disk; for typed commands a process that
imports torch, and nothing else, comes before that. The table tells how many times the floor both
programs take. The package is compiled first, as an installer does it.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
from fuse import read_once, size, write_file
from measure import Record, alternate, ratio, rounds_of, watched
from recipe_peers import to_the_disk
from safetensors.torch import save_file
from tokenizers import Tokenizer

from fusion_bench.weights import TensorWeights, open_checkpoint

#: The scripts of mergekit's commands.
SCRIPTS = {
    "run_yaml": "mergekit-yaml",
    "extract_lora": "mergekit-extract-lora",
    "moe": "mergekit-moe",
}
#: So many elements of noise are drawn; larger tensors repeat them, to be quick.
NOISE = 2**22
#: Tokens that only the second model has.
ADDED = 100
MERGES = {
    "linear": {"weight": 0.5},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.2},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"weight": 0.5, "density": 0.9, "gamma": 0.01},
}
RANDOM = ("dare_ties", "della")
#: Models that a recipe reads, or none if it copies what it needs of them; the others read the base
#: and two models.
READS: dict[str, tuple[str, ...]] = {
    "linear": ("a", "b"),
    "slerp": ("a", "b"),
    "passthrough slices": (),
    "moe": (),
    "union tokenizer": ("a", "wide"),
    "extract-lora": ("base", "a"),
}


def main() -> None:
    """Make the models, measure each recipe, print the table and write it after each row."""
    parser = measure.parser(__doc__, workdir=True)
    parser.add_argument("--only", nargs="*", help="these recipes")
    parser.add_argument("--peer", help="a Python that has mergekit")
    arguments = parser.parse_args()
    rounds = rounds_of(arguments, 3)
    measure.compile_package()
    record = Record(arguments, rounds, ("torch", "transformers", "safetensors"))
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        root = (arguments.workdir or Path(scratch)).absolute()
        models = Models(root, small=arguments.small)
        recipes = {
            name: own
            for name, own in written(models, root).items()
            if not arguments.only or name in arguments.only
        }
        pythons = {"fusion_bench": sys.executable}
        if arguments.peer:
            pythons["mergekit"] = arguments.peer
        programs = {
            name: Program(python, stack.enter_context(process(python, name)))
            for name, python in pythons.items()
        }
        for name, words in recipes.items():
            if not record.has("recipe", name):
                record.row("recipe", name, measured(name, words, programs, root, rounds))
    record.show()


class Models:
    """A base, two models that are near to it, and one with more tokens; in bfloat16."""

    def __init__(self, root: Path, *, small: bool):
        from transformers import LlamaConfig

        self.tokens = 512 if small else 32000
        self.layers = 4 if small else 16
        config = {
            "vocab_size": self.tokens,
            "hidden_size": 64 if small else 1024,
            "intermediate_size": 128 if small else 2816,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 4 if small else 16,
            "num_key_value_heads": 2 if small else 4,
            "tie_word_embeddings": False,
        }
        self.base, self.a, self.b, self.wide = (root / name for name in ("base", "a", "b", "wide"))
        for step, place in enumerate((self.base, self.a, self.b)):
            self._write(place, LlamaConfig(**config), step)
        wider = LlamaConfig(**{**config, "vocab_size": self.tokens + ADDED})
        self._write(self.wide, wider, 3)

    def _write(self, place: Path, config: Any, step: int) -> None:
        if (place / "config.json").exists():
            return
        from transformers import LlamaForCausalLM

        place.mkdir(parents=True, exist_ok=True)
        with torch.device("meta"):
            module = LlamaForCausalLM._from_config(config)
        base, own = (
            torch.randn(NOISE, generator=torch.Generator().manual_seed(seed)) for seed in (0, step)
        )
        values = base * 0.02 + (own * 0.002 if step else 0)
        tensors = {
            key: values.repeat(-(-tensor.numel() // NOISE))[: tensor.numel()]
            .view(tensor.shape)
            .bfloat16()
            for key, tensor in module.state_dict().items()
        }
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
        config.save_pretrained(place)
        _write_tokenizer(place, config.vocab_size)


def _write_tokenizer(place: Path, size: int) -> None:
    """Write a tokenizer of whole words."""
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    words |= {f"w{number}": number for number in range(3, size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )  # fmt: skip
    whole.save_pretrained(place)


def written(models: Models, root: Path) -> dict[str, dict[str, list[str]]]:
    """Write the recipes; return the words of each program's command, without the output."""
    exact = {"dtype": "float32", "out_dtype": "bfloat16"}
    a, b, base, wide = map(str, (models.a, models.b, models.base, models.wide))
    half = models.layers // 2
    documents: dict[str, dict[str, Any]] = {}
    for method, parameters in MERGES.items():
        documents[method] = {
            "merge_method": method,
            "models": [{"model": model, "parameters": parameters} for model in (a, b)],
            **({} if method == "linear" else {"base_model": base}),
            **exact,
        }
    documents["slerp"] = {
        "merge_method": "slerp",
        "models": [{"model": a}, {"model": b}],
        "base_model": a,
        "parameters": {
            "t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": 0.3},
                  {"value": 0.5}]
        },
        **exact,
    }  # fmt: skip
    documents["passthrough slices"] = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": a, "layer_range": [0, half + 2]}]},
            {"sources": [{"model": b, "layer_range": [half - 2, models.layers]}]},
        ],
        "dtype": "bfloat16",
    }
    documents["union tokenizer"] = {
        "merge_method": "linear",
        "models": [{"model": model, "parameters": {"weight": 0.5}} for model in (a, wide)],
        "base_model": a,
        "tokenizer": {"source": "union"},
        **exact,
    }
    commands = {}
    for name, document in documents.items():
        file = root / f"{name.replace(' ', '_')}.yaml"
        file.write_text(json.dumps(document))  # YAML contains JSON
        commands[name] = {
            "fusion_bench": ["merge", str(file), "{out}"],
            "mergekit": ["run_yaml", str(file), "{out}", "--lazy-unpickle", "--quiet"],
        }
    extraction = ["--out-path={out}", "--max-rank=16", f"--model={a}", f"--base-model={base}"]
    commands["extract-lora"] = {
        "fusion_bench": ["extract-lora", a, "--base", base, "--out", "{out}", "--rank", "16"],
        "mergekit": ["extract_lora", *extraction],
    }
    file = root / "moe.yaml"
    experts = [
        {"source_model": model, "positive_prompts": [word]}
        for model, word in ((a, "w5"), (b, "w6"))
    ]
    file.write_text(
        json.dumps(
            {"base_model": base, "gate_mode": "cheap_embed", "dtype": "bfloat16",
             "experts": experts}
        )
    )  # fmt: skip
    commands["moe"] = {
        "fusion_bench": ["merge", str(file), "{out}"],
        "mergekit": ["moe", str(file), "{out}"],
    }
    return commands


@contextmanager
def process(python: str, name: str) -> Iterator["subprocess.Popen[str]"]:
    """Start a process that runs one command after the other."""
    script = Path(__file__).with_name("recipe_peers.py")
    with subprocess.Popen(
        [python, str(script), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as started:
        yield started
        assert started.stdin
        started.stdin.close()


class Program:
    """A program that merges, as a command or in a process that is there already.

    Attributes:
        peaks: the most anonymous memory of each command that was typed, in MB.
    """

    def __init__(self, python: str, process: "subprocess.Popen[str]"):
        self._scripts = Path(python).parent
        self._process = process
        self.peaks: list[float] = []

    def warm(self, words: list[str]) -> float:
        """Run a command in the process that is there, and return its seconds."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def typed(self, words: list[str]) -> float:
        """Run a command as it is typed, and return its seconds."""
        start = time.perf_counter()
        script, *rest = words if words[0] in SCRIPTS else ["fusion_bench", *words]
        command = [str(self._scripts / SCRIPTS.get(script, script)), *rest]
        megabytes, _, _ = watched(command)
        self.peaks.append(megabytes)
        to_the_disk(words)
        return time.perf_counter() - start


def measured(
    name: str,
    words: Mapping[str, list[str]],
    programs: Mapping[str, Program],
    root: Path,
    rounds: int,
) -> dict[str, Any]:
    """Return the row of a recipe."""
    outputs = {own: root / f"out_{own}" for own in programs}
    read = [root / model for model in READS.get(name, ("base", "a", "b"))]
    for running in programs.values():
        running.peaks.clear()

    def contestants(how: str) -> dict[str, Callable[[], object]]:
        found = {own: partial(run, own, getattr(programs[own], how)) for own in programs}
        return {**found, "floor": partial(floor, read, outputs["fusion_bench"], how == "typed")}

    def run(own: str, how: Callable[[list[str]], float]) -> float:
        shutil.rmtree(outputs[own], ignore_errors=True)
        return how([word.replace("{out}", str(outputs[own])) for word in words[own]])

    row: dict[str, Any] = {}
    for how, mark in (("warm", ", warm"), ("typed", "")):
        times = alternate(contestants(how), rounds, warm=how == "typed")
        found = {f"{own}{mark}, s": round(statistics.median(times[own]), 2) for own in times}
        found |= {f"{own} of the floor{mark}": ratio(times, own, "floor") for own in programs}
        if "mergekit" in programs:
            found[f"times as fast{mark}"] = ratio(times, "mergekit", "fusion_bench")
        row = found | row
    row |= {f"{own}, MB": round(max(running.peaks)) for own, running in programs.items()}
    if "mergekit" in programs:
        row["difference"] = "random" if name in RANDOM else difference(*outputs.values())
    for output in outputs.values():
        shutil.rmtree(output, ignore_errors=True)
    return row


def floor(models: list[Path], output: Path, starts: bool) -> None:
    """Read all bytes of the models, and write as many as the output has; after a start of torch.

    Without models as many bytes are read as are written.
    """
    if starts:
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
    read_once(models or [output])
    with tempfile.NamedTemporaryFile(dir=output.parent) as file:
        write_file(Path(file.name), size([output]))


def difference(one: Path, other: Path) -> str:
    """Return the largest difference of two models in steps of the output's type, and its share.

    The share is that of elements that differ by more than one step.
    """
    largest = 0.0
    apart = count = 0
    ours, theirs = (opened(place) for place in (one, other))
    if set(ours) != set(theirs):  # experts are saved one by one, or together
        ours, theirs = (loaded(place) for place in (one, other))
    if missing := sorted(set(ours) ^ set(theirs)):
        return f"other entries: {missing[0]}"
    rows = same_rows(one, other)
    for key in ours:
        mine, its = ours[key], theirs[key]
        if mine.shape != its.shape:
            return f"other shapes: {key}"
        if rows is not None and len(its) == len(rows):
            its = its[rows]
        step = torch.finfo(its.dtype).eps * its.double().abs().clamp_min(1e-6)
        steps = (mine.double() - its.double()).abs() / step
        largest = max(largest, float(steps.max()))
        apart += int((steps > 1).sum())
        count += steps.numel()
    return f"{largest:.2g} steps" + (f", {apart / count:.2g} of all apart" if apart else "")


def same_rows(one: Path, other: Path) -> torch.Tensor | None:
    """Return which row of the other model's embedding has the token of each row."""
    files = [place / "tokenizer.json" for place in (one, other)]
    if not all(file.exists() for file in files):
        return None
    mine, its = (Tokenizer.from_file(str(file)).get_vocab() for file in files)
    return torch.tensor([its[token] for token in sorted(mine, key=mine.__getitem__)])


def opened(place: Path) -> TensorWeights:
    """Return the entries of a model or an adapter."""
    index, adapter = place / "model.safetensors.index.json", place / "adapter_model.safetensors"
    file = next((own for own in (index, adapter) if own.exists()), place / "model.safetensors")
    return open_checkpoint(file)


def loaded(place: Path) -> TensorWeights:
    """Return the entries of a model as transformers names them."""
    from transformers import AutoModelForCausalLM

    return TensorWeights(AutoModelForCausalLM.from_pretrained(place).state_dict())


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
