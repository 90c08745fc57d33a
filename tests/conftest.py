"""What several packages' tests share: a small family of CLIP models and tasks on disk."""

import gc
import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from drawn import examples, exhaustively
from hypothesis import settings

if TYPE_CHECKING:  # what is heavy is of no use to a process that but hands out the tests
    from selenium import webdriver
    from torch import Tensor

#: What takes longest, begun first, so that no process is left with it at the end.
FIRST = (
    "end_to_end/test_default.py",
    *("scripts/test_sweep.py", "programs/test_tuning.py", "method/test_contract.py"),
    *("scripts/test_cli.py", "zoo/test_build.py", "programs/test_search.py"),
    *("docs/test_docs.py", "scripts/verbs/test_listing.py", "end_to_end/test_seed.py"),
    *("test_language_server.py", "config/test_all_configs.py", "scripts/verbs/test_new.py"),
    *("test_editor.py", "programs/test_tracking.py", "programs/test_evaluation.py"),
    *("scripts/verbs/test_running.py", "test_api.py", "test_fuzz.py", "taskpool/test_pool.py"),
    *("programs/test_reproduce.py", "report/test_page_browser.py", "test_add_method.py"),
    *("end_to_end/test_merge_llm.py", "test_network.py"),
)
CLASSES = {"a": ["abbey", "airplane_cabin", "beach"], "b": ["cat", "dog", "emu", "fox", "gnu"]}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let whoever runs the tests say in how many processes, and whether tables are written."""
    told = "run the tests in so many processes; auto is one more than there are cores"
    parser.addoption("--processes", metavar="N", type=_processes, default=0, help=told)
    told = "write what the page on reliability shows of the exhaustive tests"
    parser.addoption("--tables", action="store_true", help=told)


def _processes(word: str) -> int:
    """Return how many; ``auto`` is one more than there are cores, for many tests wait at times."""
    return (os.cpu_count() or 1) + 1 if word == "auto" else int(word)


def pytest_configure(config: pytest.Config) -> None:
    """Draw more cases where that is asked for; no test is imported yet."""
    if count := config.getoption("processes"):
        _hand_out(count)
    # To load a tiny model in threads takes twice the time.
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
    gc.disable()  # until all tests are imported: to look through what stays takes seconds
    if _exhaustive(config):
        exhaustively()
    if config.getoption("tables"):
        config.pluginmanager.register(_Tables())
    most = examples(settings.default.max_examples)
    settings.register_profile("ours", max_examples=most, deadline=None)  # machines may be busy
    settings.load_profile("ours")


def _hand_out(count: int) -> None:
    """Set what the processes with the tests inherit; they share one warm process."""
    # Processes that share the cores are no faster with more threads; torch reads it at import.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # The models are built with two threads, which else wait for each other at full speed. Those
    # that do not turn at all (OMP_WAIT_POLICY=PASSIVE) stay on one core, and take three times it.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    import commandline

    os.environ[commandline.SERVER] = commandline.serve(at_once=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run the tests in several processes, if that is asked for."""
    count = session.config.getoption("processes")
    if not count or session.config.option.collectonly or session.testsfailed:
        return None
    import workers

    workers.run(session, count)
    return True


def _exhaustive(config: pytest.Config) -> bool:
    words: str = config.option.markexpr
    return "exhaustive" in words and "not exhaustive" not in words


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what shows by itself, leave out what takes too long, and order the files.

    A test looks at pages in Chromium where it takes ``browser``, and draws cases where hypothesis
    runs it.
    """
    left_out = []
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
        if hasattr(getattr(item, "obj", None), "hypothesis"):
            item.add_marker("exhaustive")
        marked = item.get_closest_marker("exhaustive")
        if marked and marked.kwargs.get("only") and not _exhaustive(config):
            left_out.append(item)
    if _exhaustive(config):
        for item in items:
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(3600))
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]

    def place(item: pytest.Item) -> int:
        found = (n for n, file in enumerate(FIRST) if item.path.as_posix().endswith(file))
        return next(found, len(FIRST))

    items.sort(key=place)
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)  # what is imported later is much to look through as well
    gc.enable()


@pytest.fixture
def row(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Return a function that keeps a row for a table of ``faults/tables.py``."""

    def keep(table: str, **cells: Any) -> None:
        record_property("row", [table, cells])

    return keep


class _Tables:
    """Collects the rows, also those of other processes, and writes the tables in the end."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, dict[str, Any]]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self._rows += [value for name, value in report.user_properties if name == "row"]

    def pytest_sessionfinish(self) -> None:
        from faults.tables import write

        write(self._rows)


def scrambled(parameters: "dict[str, Tensor]", scale: float) -> "dict[str, Tensor]":
    """Return parameters with so much noise that the answers differ from image to image."""
    import torch

    random = torch.Generator().manual_seed(3)
    return {k: v + scale * torch.randn(v.shape, generator=random) for k, v in parameters.items()}


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield directories that are not there; to look for a free name takes longer each time."""
    root = tmp_path_factory.mktemp("caches")
    return (root / str(number) for number in count())


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the caches of all tests have their pictures, which take long to draw."""
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(autouse=True)
def own_cache(caches: Iterator[Path], pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test a cache of its own, which holds only the pictures of earlier tests."""
    place = next(caches)
    place.mkdir()
    (place / "pictures").symlink_to(pictures)
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(place))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test wait for long until the Hub is asked again."""
    from fusion_bench import network

    monkeypatch.setattr(network, "PATIENCE", 0.2)
    monkeypatch.setattr(network, "BRIEFLY", 0.05)
    monkeypatch.setattr(network, "_WAITS", (0.02,))


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write `base`, `a`, `b` under models/ and the tasks `a`, `b` under datasets/.

    The test splits have 23 samples, which no batch size and no number of processes divides.
    """
    from fixtures_clip import write_base, write_dataset, write_vision_encoder

    root = tmp_path_factory.mktemp("family")
    base = write_base(root / "models" / "base", weights="safetensors")
    vision = {
        key.removeprefix("vision_model."): value
        for key, value in base.items()
        if key.startswith("vision_model.") and value.is_floating_point()
    }
    for seed, (task, names) in enumerate(CLASSES.items(), start=1):
        write_vision_encoder(root / "models" / task, scrambled(vision, scale=0.5 * seed))
        write_dataset(root / "datasets" / task, names, splits={"train": 4, "test": 23}, seed=seed)
    return root


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator["webdriver.Chrome"]:
    """Return one Chromium for all tests that look at pages."""
    from browser import start

    yield from start(tmp_path_factory.mktemp("chromium"))


@pytest.fixture
def program_config(family: Path) -> dict[str, Any]:
    """Return a whole config over the family, as a user's YAML would have it."""
    base = str(family / "models" / "base")
    return {
        "_target_": "fusion_bench.programs.FabricModelFusionProgram",
        "_recursive_": False,
        "method": {"_target_": "fusion_bench.method.SimpleAverageAlgorithm"},
        "modelpool": {
            "_target_": "fusion_bench.modelpool.CLIPVisionModelPool",
            "models": {
                "_pretrained_": base,
                **{task: str(family / "models" / task) for task in CLASSES},
            },
        },
        "taskpool": {
            "_target_": "fusion_bench.taskpool.CLIPVisionModelTaskPool",
            "test_datasets": {
                task: {
                    "_target_": "datasets.load_dataset",
                    "path": str(family / "datasets" / task),
                    "split": "test",
                }
                for task in CLASSES
            },
            "clip_model": base,
            "processor": base,
            "dataloader_kwargs": {"num_workers": 0},
        },
        "fabric": {"accelerator": "cpu"},
    }
