"""Kills at random moments: every restart must end as if nothing had happened.

`python kills.py COUNT SEED DIRECTORY` prints, as JSON, a row for each kind of run, and what went
wrong; ``test_kills.py`` calls it.

A trial forks from this process, which has imported everything but computes nothing itself, into a
process group of its own; runs the real command line there; kills the group at a moment drawn evenly
over what the run takes undisturbed; and starts the same command again, which must end right. The
zoo is the package's, from fewer images and by fewer steps of training: a whole one takes minutes.
"""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fusion_bench import zoo
from fusion_bench.programs import fabric_model_fusion
from fusion_bench.scripts import cli
from fusion_bench.zoo import Recipe, build
from fusion_bench.zoo.images import Split

#: Only so that they are imported before a process forks.
_IMPORTED = (CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, CLIPVisionModel, load_dataset)

SMALL = Recipe(
    width=64, layers=2, pretrain_steps=6, pretrain_batch=16, finetune_steps=4, finetune_batch=16
)
IMAGES = {"train": 96, "validation": 8, "test": 40}
TASKS = ("digits", "faces", "shapes")
#: All that the repetition of a run may have otherwise.
TIMES = ("created_at", "seconds")
#: Empty files that stay: a lock ends with its holder.
LOCKS = (".lock",)
LONGEST = 120


@dataclass
class Scenario:
    """What is killed.

    Attributes:
        title: for the table.
        share: of the kills, in percent.
        command: the words of the command line; empty to build the zoo.
        cache: is there when a trial begins.
        from_publishing: whether moments are drawn from when the report begins to be written.
    """

    title: str
    share: int
    command: list[str]
    cache: Path | None = None
    from_publishing: bool = False
    seconds: float = 0.0
    expected: dict[str, Any] = field(default_factory=dict)


def run(count: int, seed: int, place: Path) -> None:
    """Kill ``count`` runs in ``place``, an empty directory."""
    drawn = random.Random(seed)
    _small_zoo()
    rows: dict[str, Any] = {}
    wrong: list[str] = []
    for scenario in _scenarios(place):
        own = -(-count * scenario.share // 100)
        rows[scenario.title] = _trials(scenario, own, drawn, place / "trial", wrong)
    print(json.dumps({"rows": rows, "wrong": wrong}))


def _scenarios(place: Path) -> list[Scenario]:
    """Return them, each with what its undisturbed run takes and leaves."""
    cold, warm = place / "cold", place / "warm"
    llm = [
        *("--config-name", "merge_llm", "method=task_arithmetic", "seed=0"),
        *("modelpool.max_shard_size=8MB", "merged_model_save_path=merged"),
        *("report_save_path=report.json",),
    ]
    for number, name in enumerate(("_pretrained_", "a", "b")):
        writer = multiprocessing.get_context("fork").Process(
            target=_write_llm, args=(place / name, number)
        )  # so that this process has no threads of torch's
        writer.start()
        writer.join()
        llm.append(f"modelpool.models.{name}={place / name}")
    clip = [
        *("method=task_arithmetic", "seed=0", "report_save_path=report.json"),
        "merged_model_save_path=merged",
        *(f"~modelpool.models.{task}" for task in zoo.TASKS if task not in TASKS),
        *(f"~taskpool.test_datasets.{task}" for task in zoo.TASKS if task not in TASKS),
        *(f"~taskpool.tasks.{task}" for task in zoo.TASKS if task not in TASKS),
    ]
    scenarios = [
        Scenario("building the zoo (a shortened recipe)", 10, []),
        Scenario("merging language models to disk, in shards", 36, llm),
        Scenario("fusing and evaluating CLIP, empty caches", 14, clip, cold),
        Scenario("the same, caches filled", 20, clip, warm),
        Scenario("writing the reports", 20, clip, warm, from_publishing=True),
    ]
    for scenario in scenarios:
        _reset(scenario, place / "trial")
        began = time.monotonic()
        child = _start(scenario, place / "trial")
        if scenario.from_publishing:
            child.wait_for_publishing()
            began = time.monotonic()
        status = child.wait()
        scenario.seconds = time.monotonic() - began
        if status != 0:
            sys.exit(f"{scenario.title}: fails undisturbed.\n{child.output()}")
        scenario.expected = _left(place / "trial")
        made = place / "trial" / "cache"
        if not scenario.command:  # what was built is what the others begin with
            shutil.copytree(made, cold)
        elif scenario.cache == cold:
            shutil.copytree(made, warm)
    return scenarios


def _trials(
    scenario: Scenario, count: int, drawn: random.Random, trial: Path, wrong: list[str]
) -> dict[str, Any]:
    """Kill and restart until there were ``count`` kills."""
    right = kills = 0
    while kills < count:
        _reset(scenario, trial)
        child = _start(scenario, trial)
        if scenario.from_publishing:
            child.wait_for_publishing()
        moment = drawn.uniform(0, scenario.seconds)
        time.sleep(moment)
        if not child.kill():
            continue  # it was done before; that is no trial
        kills += 1
        again = _start(scenario, trial)
        status = again.wait()
        left = _left(trial)
        if status == 0 and left == scenario.expected:
            right += 1
            continue
        differing = {
            key: (scenario.expected.get(key), left.get(key))
            for key in {*scenario.expected, *left}
            if scenario.expected.get(key) != left.get(key)
        }
        wrong.append(
            f"{scenario.title}, killed after {moment:.3f} s: exit code {status}, {differing}\n"
            + again.output()
        )
    return {
        "kills": kills,
        "over seconds": round(scenario.seconds, 2),
        "restarts that ended right": right,
    }


class _Child:
    """A run in a process group of its own."""

    def __init__(self, pid: int, publishing: int, log: Path):
        self._pid = pid
        self._publishing = publishing
        self._log = log
        self._status: int | None = None

    def wait_for_publishing(self) -> None:
        """Return when the report begins to be written, or the run has ended."""
        os.read(self._publishing, 1)

    def wait(self) -> int:
        """Return the exit status; it takes no longer than ``LONGEST`` seconds."""
        end = time.monotonic() + LONGEST
        while self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
                os.close(self._publishing)
            elif time.monotonic() > end:
                self.kill()
            else:
                time.sleep(0.005)
        return self._status

    def kill(self) -> bool:
        """Kill the whole group; tell whether it was still running."""
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        self._status = os.waitstatus_to_exitcode(status)
        os.close(self._publishing)
        return self._status == -signal.SIGKILL

    def output(self) -> str:
        """Return the end of what the run printed."""
        return self._log.read_text(errors="replace")[-3000:]


def _start(scenario: Scenario, trial: Path) -> _Child:
    publishing, told = os.pipe()
    log = trial.with_name("output.txt")
    pid = os.fork()
    if pid:
        os.close(told)
        with suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)  # here too, so that it is so from now on
        return _Child(pid, publishing, log)
    status = 1
    try:
        os.setpgid(0, 0)
        os.close(publishing)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(trial)
        os.environ["FUSION_BENCH_CACHE"] = str(trial / "cache")
        _work(scenario.command, told)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        print(end.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _work(command: list[str], told: int) -> None:
    """Do in the child what is to be killed."""
    if "merge_llm" not in command:
        torch.set_num_threads(1)  # threads that wait for each other suffer from busy neighbours
    if not command:
        zoo.model_path(zoo.PRETRAINED)
        return
    real = fabric_model_fusion.publish

    def announced(*arguments: Any) -> None:
        os.write(told, b".")
        real(*arguments)

    fabric_model_fusion.publish = announced
    sys.argv = ["fusion_bench", *command]
    cli.main()


def _reset(scenario: Scenario, trial: Path) -> None:
    shutil.rmtree(trial, ignore_errors=True)
    trial.mkdir()
    if scenario.cache is not None:
        shutil.copytree(scenario.cache, trial / "cache")


def _left(trial: Path) -> dict[str, Any]:
    """Return what a run has left: each file's hash, or what a report says besides times.

    An output directory bears the time of its run; what a killed run has written there stays, and of
    these only the whole report counts. Prepared images and what is known of files by their dates
    differ from run to run, and are checked as they are read.
    """
    found: dict[str, Any] = {}
    for file in sorted(trial.rglob("*")):
        name = file.relative_to(trial).as_posix()
        if not file.is_file() or name.endswith(LOCKS) or "/arrow/" in name:
            continue
        if name.startswith("outputs/"):
            if file.name == "report.json":
                found["outputs/report.json"] = _report(file)
        elif name.startswith(("cache/images/", "cache/file_sha256/")):
            if name.endswith(".part"):
                found[name] = "left over"
        elif name == "report.json":
            found[name] = _report(file)
        else:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def _report(file: Path) -> Any:
    report = json.loads(file.read_text())
    for key in TIMES:
        del report["run"][key]
    return report


def _small_zoo() -> None:
    """Have this process, and those that fork from it, build the zoo in a second."""
    splits = {task: build.make(task) for task in zoo.TASKS}
    few = {
        task: {
            name: Split(*(part[: IMAGES[name]] for part in vars(split).values()))
            for name, split in own.items()
        }
        for task, own in splits.items()
    }
    build.make = few.__getitem__
    zoo._RECIPES = {zoo.PRETRAINED: SMALL}
    Recipe.__init__.__defaults__ = astuple(SMALL)


def _write_llm(directory: Path, seed: int) -> None:
    """Write a small language model in several files."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in LlamaForCausalLM(config).state_dict().items()}
    random = torch.Generator().manual_seed(seed)
    directory.mkdir(exist_ok=True)
    index = {}
    for number, keys in enumerate([list(shapes)[i::3] for i in range(3)], start=1):
        name = f"model-{number:05d}-of-00003.safetensors"
        tensors = {k: torch.randn(shapes[k], generator=random).bfloat16() for k in keys}
        save_file(tensors, directory / name, metadata={"format": "pt"})
        index |= dict.fromkeys(keys, name)
    whole = {"metadata": {}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(whole))
    config.save_pretrained(directory)


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
