"""Names point where they should, and what cannot be read is said in one plain line."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from commandline import python
from fixtures_clip import BASE, write_hub
from hub import Fault, Hub, client_environment, closed_endpoint, hub_stand_in
from huggingface_hub import HfApi

from fusion_bench import sources, zoo
from fusion_bench.problems import EnvironmentProblem, FusionBenchError
from fusion_bench.sources import load, reading, resolve

SUN = "tanganke/clip-vit-base-patch32_sun397"


# --- what a name points to


def test_zoo_names_are_directories_of_the_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "model_path", lambda name: Path("/zoo") / name, raising=False)
    assert Path(resolve("zoo:clip-tiny")) == Path("/zoo/clip-tiny")


def test_existing_paths_are_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("owner/model", "./owner/model", "~/owner/model", str(tmp_path / "owner/model")):
        assert Path(resolve(name)).is_absolute()
        assert Path(resolve(name)).samefile(tmp_path / "owner" / "model")


@pytest.mark.parametrize("name", [BASE, "gpt2", "a-b.c/d_e"])
def test_repositories_keep_their_names(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve(name) == name


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("{root}/models/clip-tony", "{root}/models/clip-tiny"),
        ("{root}/model/clip-tiny", "{root}/models"),
        ("./models/clip-tinny", "models/clip-tiny"),
        ("models/nested/once/more", None),
        ("~/nothing-like-it", None),
        ("~nobody-of-this-name/model", None),
        ("models\\clip-tiny", None),
    ],
)
def test_missing_paths(
    name: str, nearest: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "clip-tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    name = name.format(root=tmp_path)
    for look in (resolve, lambda name: reading("dataset", name).__enter__()):
        with pytest.raises(FusionBenchError) as raised:
            look(name)
        message = f"There is no such directory: '{name}'."
        if nearest:
            message += f" Did you mean '{nearest.format(root=tmp_path)}'?"
        assert str(raised.value) == message


@pytest.mark.parametrize("name", ["", "two words", "owner/", "a--b/c", "owner/name.git"])
def test_what_can_be_no_repository(name: str) -> None:
    with pytest.raises(FusionBenchError, match=f"'{name}' is neither an existing path nor a repo"):
        resolve(name)


@pytest.mark.cold
def test_importing_is_light() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'huggingface_hub'} & set(sys.modules)"
    code = f"import sys, fusion_bench.sources; sys.exit(str({heavy} or 0) if {heavy} else 0)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- what becomes of exceptions, and of the libraries' offline mode


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Let the Hub answer, or not."""

    def answer(yes: bool) -> None:
        monkeypatch.setattr(sources, "_hub_answers", lambda endpoint, minute: yes)

    answer(True)
    return answer


@pytest.mark.parametrize(
    "error",
    [TypeError("x"), KeyError("x"), ValueError("x"), RuntimeError("x"), FusionBenchError("x")],
)
def test_errors_of_the_program_pass_through(error: Exception, answers: Any) -> None:
    with pytest.raises(type(error)) as raised, reading("model", "owner/name"):
        raise error
    assert raised.value is error


def test_cause_is_kept(answers: Any) -> None:
    error = OSError("No space left on device")
    with pytest.raises(FusionBenchError) as raised, reading("model", "owner/name"):
        raise error
    assert str(raised.value) == "Cannot read the model 'owner/name': No space left on device"
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    ("status", "words"), [(503, "cannot serve it at the moment"), (429, "status 429")]
)
def test_a_hub_that_fails(status: int, words: str, answers: Any, tmp_path: Path) -> None:
    with hub_stand_in(tmp_path) as hub:
        hub.fail("owner/name", status)
        with pytest.raises(FusionBenchError, match=words), reading("model", "owner/name"):
            try:
                HfApi(endpoint=hub.endpoint).model_info("owner/name")
            except OSError as error:
                raise OSError("We couldn't connect to the Hub") from error


def test_the_cache_alone_is_read_for_one_context_only(
    answers: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    def offline() -> bool:
        return huggingface_hub.constants.is_offline_mode()

    with reading("model", "owner/name"):
        assert not offline()
    answers(False)
    with caplog.at_level("INFO"), reading("model", "owner/name"):
        assert offline()
    assert "Read the model 'owner/name' only from the local cache." in caplog.text
    assert not offline()
    with pytest.raises(ZeroDivisionError), reading("model", "owner/name"):
        raise ZeroDivisionError
    assert not offline()


@pytest.mark.parametrize("name", ["zoo:clip-tiny", "{here}", "digits", "taskpool.clip_model"])
def test_what_is_not_on_the_hub_needs_none(
    name: str, tmp_path: Path, answers: Callable[[bool], None]
) -> None:
    answers(False)
    with reading("model", name.format(here=tmp_path)):
        assert not huggingface_hub.constants.is_offline_mode()


def test_the_hub_is_looked_for_once_a_minute(tmp_path: Path) -> None:
    sources._hub_answers.cache_clear()
    with hub_stand_in(tmp_path) as hub:
        assert sources._hub_answers(hub.endpoint, 1) and sources._hub_answers(hub.endpoint, 1)
        assert len(hub.requests) == 1
        hub.fail("", 503)
        assert sources._hub_answers(hub.endpoint, 1)
        assert not sources._hub_answers(hub.endpoint, 2)
    assert not sources._hub_answers(closed_endpoint(), 2)


def test_nodes_name_what_they_read(answers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_BENCH_ALLOW", "builtins,shutil")
    node = {"_target_": "builtins.dict", "path": "owner/name"}
    assert load("dataset", node, "taskpool.test_datasets.a") == {"path": "owner/name"}
    node = {"_target_": "shutil.copyfile", "src": "no-such-file", "dst": "nowhere"}
    with pytest.raises(FusionBenchError, match=r"the dataset 'taskpool\.test_datasets\.a'"):
        load("dataset", node, "taskpool.test_datasets.a")


# --- what the real libraries raise, with the stand-in of the Hub and without any

READ_ALL = """
import json, sys
from datasets import load_dataset
from transformers import CLIPImageProcessorPil, CLIPTokenizer, CLIPVisionModel
from fusion_bench import network
from fusion_bench.problems import FusionBenchError
from fusion_bench.sources import load, reading, resolve

network.PATIENCE = 0
for kind, name, options in json.loads(sys.argv[1]):
    try:
        with reading(kind, name):
            if name == "owner/flipped":
                node = {"_target_": "datasets.load_dataset", "path": name, **options}
                load("dataset", node, "taskpool.test_datasets.flipped")
            elif kind == "dataset":
                load_dataset(name, **options)
            elif kind == "processor":
                CLIPImageProcessorPil.from_pretrained(resolve(name))
                CLIPTokenizer.from_pretrained(resolve(name))
            else:
                CLIPVisionModel.from_pretrained(resolve(name))
    except FusionBenchError as error:
        print(json.dumps(str(error)))
    else:
        print(json.dumps(None))
"""

Case = tuple[str, str, tuple[tuple[str, str], ...]]  # kind, name, options
CASES: dict[Case, str | None] = {}


def case(kind: str, repository: str, said: str | None, **options: str) -> None:
    CASES[kind, repository, tuple(options.items())] = said


def denied(owner_and_name: str, prefix: str = "") -> str:
    return f"the Hub denies access to {{hub}}/{prefix}{owner_and_name}. Log in with"


MISSING = "there is no such directory here and no such repository on the Hub, or it is private and"
DAMAGED = "its weights are damaged. Delete this copy and fetch it again."
GATED = "it is gated. Ask for access at {hub}/"

case("model", SUN, None)
case("model", BASE, None)
case("processor", BASE, None)
case("dataset", "tanganke/sun397", None, split="test")
case("model", "x/sun39", f"{MISSING} needs 'hf auth login'.")
case("model", SUN[:-1], f"{MISSING} needs 'hf auth login'. Did you mean '{SUN}'?")
case("processor", SUN[:-1], f"{MISSING} needs 'hf auth login'. Did you mean '{SUN}'?")
case(
    "dataset", "tanganke/sun39", f"{MISSING} needs 'hf auth login'. Did you mean 'tanganke/sun397'?"
)
case("dataset", "tanganke/sun397", "Revision 'v2' doesn't exist for dataset", revision="v2")
case("dataset", "tanganke/sun397", "it has no split 'tset'. Did you mean 'test'?", split="tset")
case("dataset", "tanganke/sun397", "its split cannot be understood (test[:x]).", split="test[:x]")
case("dataset", "tanganke/sun397", "it has no configuration 'all'. Known: default.", name="all")
case("dataset", "owner/two", "it has several configurations; choose one as 'name': 'a', 'full'.")
case("dataset", "owner/two", "it has no configuration 'ful'. Did you mean 'full'?", name="ful")
case("dataset", "owner/empty", "it holds no data files.")
case("dataset", "owner/broken", "its files are damaged (Could not open Parquet input source")
FLIPPED = "what came was damaged: its hash is not the one that the Hub states. It is deleted."
case("dataset", "owner/flipped", FLIPPED, split="test")
case("dataset", "owner/flipped", None, split="test[:5]")  # nothing of it was kept
case("model", "owner/gated", f"{GATED}owner/gated, then run 'hf auth login'.")
case("processor", "owner/gated", f"{GATED}owner/gated, then run 'hf auth login'.")
case("dataset", "owner/gated", f"{GATED}datasets/owner/gated, then run 'hf auth login'.")
case("model", "owner/denied", denied("owner/denied"))
case("dataset", "owner/denied", denied("owner/denied", "datasets/"))
case("model", "owner/no-weights", "it does not have a file named pytorch_model.bin or model.safe")
case("processor", SUN, "it comes without an image processor.")
case("model", "owner/bad-json", "config.json' is not valid JSON.")
case("model", "owner/bad-config", "its config.json does not fit (Validation error for field 'hid")
case("model", "owner/nonsense", DAMAGED)
case("model", "owner/truncated", DAMAGED)
case("model", "owner/nonsense-bin", DAMAGED)
case("model", "owner/truncated-bin", DAMAGED)
case("model", "owner/empty-bin", DAMAGED)
case(
    "model", "owner/code", "its weights hold pickled objects, which can run code; they are refused."
)
case("model", "owner/other-shapes", "its weights have other shapes than its config.json says.")

CACHED = [key for key, said in CASES.items() if said is None and key[1] != "owner/flipped"]
NOT_CACHED: list[Case] = [
    ("model", "tanganke/clip-vit-base-patch32_stanford-cars", ()),
    ("processor", "openai/clip-vit-large-patch14", ()),
    ("dataset", "tanganke/stanford_cars", (("split", "test"),)),
]


class Caller:
    """Unpickling one runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must not be seen",)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repositories of the fixtures, and beside them some that are broken in all ways."""
    root = tmp_path_factory.mktemp("hub")
    write_hub(root)
    models, datasets = root / "models", root / "datasets"

    def copy(of: Path, name: str) -> Path:
        return Path(shutil.copytree(of, of.parent.parent / "owner" / name))

    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:5000])

    (copy(models / SUN, "no-weights") / "model.safetensors").unlink()
    (copy(models / SUN, "bad-json") / "config.json").write_text("{this is no JSON")
    (copy(models / SUN, "nonsense") / "model.safetensors").write_bytes(b"nonsense" * 99)
    cut(copy(models / SUN, "truncated") / "model.safetensors")
    for name, width in (("bad-config", '"broad"'), ("other-shapes", "48")):
        config = copy(models / SUN, name) / "config.json"
        config.write_text(config.read_text().replace('size": 24', f'size": {width}'))
    (copy(models / BASE, "nonsense-bin") / "pytorch_model.bin").write_bytes(b"nonsense" * 99)
    (copy(models / BASE, "empty-bin") / "pytorch_model.bin").write_bytes(b"")
    cut(copy(models / BASE, "truncated-bin") / "pytorch_model.bin")
    torch.save({"a": Caller()}, copy(models / BASE, "code") / "pytorch_model.bin")

    sun = datasets / "tanganke" / "sun397"
    (copy(sun, "broken") / "data" / "test-00000-of-00001.parquet").write_bytes(b"PAR1 or not")
    empty = copy(sun, "empty")
    shutil.rmtree(empty / "data")
    (empty / "README.md").write_text("Nothing here yet.\n")
    copy(sun, "flipped")
    (copy(sun, "two") / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: a, data_files: data/test-*}\n"
        "- {config_name: full, data_files: data/*}\n---\n"
    )
    return root


@contextmanager
def hub_with_refusals(root: Path) -> Iterator[Hub]:
    with hub_stand_in(root) as hub:
        hub.fail("owner/gated", 403, "GatedRepo")
        hub.fail("owner/denied", 403)
        hub.spoil(Fault(r"flipped/resolve/.*test-.*\.parquet", "flip", times=1, methods=("GET",)))
        yield hub


def read_all(cases: list[Case], environment: dict[str, str]) -> tuple[list[str | None], str]:
    """Let a fresh process read all cases; return what it said of each, and its standard error."""
    arguments = [(kind, name, dict(options)) for kind, name, options in cases]
    process = python(READ_ALL, json.dumps(arguments), env=environment)
    assert process.returncode == 0, process.stderr
    assert "this must not be seen" not in process.stdout
    return [json.loads(line) for line in process.stdout.splitlines()], process.stderr


@pytest.fixture(scope="module")
def online(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is said of every case while the Hub is there, and the cache that this leaves."""
    cache = tmp_path_factory.mktemp("cache")
    with hub_with_refusals(root) as hub:
        said, stderr = read_all(list(CASES), hub.environment(cache))
    return {
        "said": dict(zip(CASES, said, strict=True)),
        "stderr": stderr,
        "endpoint": hub.endpoint,
        "cache": cache,
    }


@pytest.mark.parametrize("key", CASES, ids=str)
def test_the_hub_is_there(key: Case, online: dict[str, Any]) -> None:
    expected, said = CASES[key], online["said"][key]
    if expected is None:
        assert said is None
    else:
        assert said.startswith(f"Cannot read the {key[0]} '{key[1]}': ")
        assert expected.format(hub=online["endpoint"]) in said
        assert "\n" not in said


def test_nothing_was_retried(online: dict[str, Any]) -> None:
    assert "Retrying" not in online["stderr"]


@pytest.mark.parametrize("where", ["closed port", "unknown host", "HF_HUB_OFFLINE"])
def test_the_hub_is_not_there(where: str, online: dict[str, Any]) -> None:
    endpoint = "http://no-such-host.invalid" if where == "unknown host" else closed_endpoint()
    environment = client_environment(endpoint, online["cache"], offline=where == "HF_HUB_OFFLINE")
    said, stderr = read_all(CACHED + NOT_CACHED, environment)
    assert "Retrying" not in stderr
    assert said[: len(CACHED)] == [None] * len(CACHED)
    fact, fix = (
        ("HF_HUB_OFFLINE is set", "Unset it")
        if where == "HF_HUB_OFFLINE"
        else (f"the Hub ({endpoint}) cannot be reached", "Check the network")
    )
    assert said[len(CACHED) :] == [
        f"Cannot read the {kind} '{name}': {fact}, and the local cache does not hold all of it. "
        f"{fix}, or run 'fusion_bench' without arguments, which needs no network."
        for kind, name, _ in NOT_CACHED
    ]


def test_a_cache_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "file" / "cache"))
    node = {"_target_": "fusion_bench.zoo.load_dataset", "name": "digits"}
    with pytest.raises(EnvironmentProblem, match=r"FUSION_BENCH_CACHE") as caught:
        load("dataset", node, "taskpool.test_datasets.digits")
    assert str(tmp_path / "file" / "cache") in str(caught.value)
