"""Which folders a run writes to, and what Hydra's own files do to what is there."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job
from hydra.types import HydraContext

from fusion_bench.problems import ConfigError, EnvironmentProblem
from fusion_bench.scripts import hydra_patches
from fusion_bench.storage import claimed

TARGET = {"_target_": "fusion_bench.programs.FabricModelFusionProgram"}


class Quiet:
    def on_job_start(self, **kwargs: Any) -> None: ...
    def on_job_end(self, **kwargs: Any) -> None: ...


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that has Hydra run a job of a config, in ``tmp_path``; it does nothing."""
    from hydra._internal import hydra as hydra_internal

    import fusion_bench.scripts.sweep  # noqa: F401 - which has a job's folder checked

    monkeypatch.setattr(hydra_internal, "ConfigLoaderImpl", hydra_internal.ConfigLoaderImpl)
    hydra_patches.set_up_hydra()
    (tmp_path / "conf").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = logging.root.handlers[:]

    def job(config: dict[str, Any], *words: str, does: Any = lambda config: None) -> Path:
        (tmp_path / "conf" / "main.yaml").write_text(yaml.safe_dump({**TARGET, **config}))
        monkeypatch.setattr(sys, "argv", ["fusion_bench", *words])
        with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3", job_name="cli"):
            loader = GlobalHydra.instance().config_loader()
            composed = compose("main", list(words), return_hydra_config=True)
            context = HydraContext(config_loader=loader, callbacks=Quiet())  # type: ignore[arg-type]
            ret = run_job(does, composed, "hydra.run.dir", None, context)
        assert ret.return_value is None
        return Path(ret.hydra_cfg.hydra.runtime.output_dir)  # type: ignore[union-attr]

    yield job
    for handler in [h for h in logging.root.handlers if h not in before]:
        logging.root.removeHandler(handler)
        handler.close()
    logging.root.handlers[:] = before
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


def here() -> dict[str, str]:
    files = [path for path in Path().rglob("*") if path.is_file()]
    return {str(path): path.read_text() for path in files}


FILE = {"class": "logging.FileHandler"}


def logs(**handler: Any) -> dict[str, Any]:
    return {"job_logging": {"handlers": {"file": {**FILE, **handler}}}}


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    "hydra",
    [
        {"run": {"dir": "."}, "output_subdir": "settings"},
        {"run": {"dir": "."}, "job": {"name": "training"}},
        {"run": {"dir": "."}},
        {"run": {"dir": ""}},
        {"run": {"dir": "settings/.."}},
        {"run": {"dir": "notes"}, "output_subdir": "settings"},
        {"run": {"dir": "settings"}, "output_subdir": None},
        {"run": {"dir": "hidden"}, "output_subdir": ".kept"},
    ],
    ids=str,
)
def test_a_folder_of_the_users_is_left_alone(
    job: Any, hydra: dict[str, Any], dry_run: bool
) -> None:
    for name in ("settings/config.yaml", "training.log", "notes/a.txt", "hidden/.kept/config.yaml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("mine")
    before = here()
    config = {"hydra": hydra, "dry_run": dry_run, "overwrite": True}
    if dry_run and "hidden" in hydra["run"].values():  # it would leave but a log
        job(config)
        Path("hidden/cli.log").unlink()
    else:
        with pytest.raises(ConfigError, match="which is not from a run"):
            job(config)
    assert here() == before


@pytest.mark.parametrize("files", [("hydra.yaml",), ("hydra.yaml", "config.yaml", "more.yaml")])
def test_what_only_looks_like_a_record_is_left_alone(job: Any, files: tuple[str, ...]) -> None:
    Path("settings").mkdir()
    for name in files:
        Path("settings", name).write_text("hydra: notes on fusion_bench")
    before = here()
    with pytest.raises(ConfigError, match="'settings', which is not from a run"):
        job({"hydra": {"run": {"dir": "."}, "output_subdir": "settings"}, "overwrite": True})
    assert here() == before


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (logs(filename="training.log", mode="w"), "training.log"),
        (logs(filename="${hydra.runtime.output_dir}/training.log", mode="w"), "training.log"),
        (
            logs(filename="${hydra.sweep.dir}/training.log") | {"sweep": {"dir": "."}},
            "training.log",
        ),
        ({"job": {"name": "training"}}, "training.log"),
    ],
    ids=str,
)
def test_logs_go_into_the_runs_folder(job: Any, settings: dict[str, Any], name: str) -> None:
    Path("training.log").write_text("mine")
    folder = job({"hydra": settings}, does=lambda config: logging.getLogger("a").info("first"))
    assert folder.parent.parent.name == "outputs"
    assert "first" in (folder / name).read_text()
    assert Path("training.log").read_text() == "mine"


def test_the_record_of_a_run_under_way_is_left_alone(job: Any) -> None:
    """Its results are not there yet, so that only its claim tells that it runs."""
    folder = job({"hydra": {"run": {"dir": "out"}}, "seed": 1})
    record = (folder / ".hydra" / "config.yaml").read_text()
    with (
        claimed(folder, "hydra.run.dir", inside=True),
        pytest.raises(EnvironmentProblem, match="is in use by another run"),
    ):
        job({"hydra": {"run": {"dir": "out"}}, "seed": 2})
    assert (folder / ".hydra" / "config.yaml").read_text() == record


def test_logs_are_appended(job: Any) -> None:
    hydra = {"run": {"dir": "out"}, **logs(filename="a.log", mode="w")}
    for word in ("first", "second"):
        job({"hydra": hydra}, does=lambda config, word=word: logging.getLogger("a").info(word))
    written = Path("out/a.log").read_text()
    assert "first" in written and "second" in written


@pytest.mark.parametrize("handler", ["RotatingFileHandler", "TimedRotatingFileHandler"])
def test_no_log_is_rotated(job: Any, handler: str) -> None:
    for number in ("", ".1", ".2"):
        Path(f"a.log{number}").write_text("mine")
    rotating = logs(**{"filename": "a.log", "class": f"logging.handlers.{handler}"})
    with pytest.raises(ConfigError, match=r"file\.class"):
        job({"hydra": rotating})
    assert set(here().values()) == {"mine"}


def test_hydras_own_messages_go_to_no_file(job: Any) -> None:
    """They are set up even for ``--help``, where there is no run's folder."""
    Path("a.log").write_text("mine")
    handlers = {"handlers": {"x": {**FILE, "filename": "a.log", "mode": "w"}}}
    with pytest.raises(ConfigError, match=r"hydra_logging\.handlers\.x\.filename"):
        job({"hydra": {"hydra_logging": handlers}})
    assert here() == {"a.log": "mine"}


@pytest.mark.parametrize("link", ["cli.log", "a.log", ".hydra", ".hydra/config.yaml"])
def test_no_link_is_followed(job: Any, tmp_path: Path, link: str) -> None:
    """A folder that seems to be a run's, with a link out of it."""
    target = tmp_path / "bashrc"
    if link == ".hydra":
        target.mkdir()
        (target / "config.yaml").write_text("mine")
    else:
        target.write_text("mine")
    Path("out/.hydra").mkdir(parents=True)
    Path("out/.hydra/hydra.yaml").write_text("fusion_bench")
    if link == ".hydra":
        Path("out/.hydra/hydra.yaml").unlink()
        Path("out/.hydra").rmdir()
    Path("out", link).symlink_to(target)
    with pytest.raises(ConfigError, match="Remove it"):
        job({"hydra": {"run": {"dir": "out"}, **logs(filename="a.log")}})
    kept = target / "config.yaml" if link == ".hydra" else target
    assert kept.read_text() == "mine"


def test_a_runs_own_folder_is_used_again(job: Any) -> None:
    out = {"run": {"dir": "out"}}
    job({"hydra": out, "dry_run": True})  # it leaves a log
    job({"hydra": out, "seed": 1})
    job({"hydra": out, "seed": 2})  # nothing had come of it
    assert yaml.safe_load(Path("out/.hydra/config.yaml").read_text())["seed"] == 2
    Path("out/report.md").write_text("a result")
    job({"hydra": out, "seed": 2})  # the same run, to go on
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir: .* belongs to another run"):
        job({"hydra": out, "seed": 3})
    assert yaml.safe_load(Path("out/.hydra/config.yaml").read_text())["seed"] == 2
    job({"hydra": out, "seed": 3, "overwrite": True})
    assert yaml.safe_load(Path("out/.hydra/config.yaml").read_text())["seed"] == 3


def test_who_types_overwrite_means_it(job: Any) -> None:
    Path("config.yaml").write_text("mine")
    job({}, "hydra.run.dir=.", "++overwrite=true")
    assert Path("cli.log").exists() and Path("config.yaml").read_text() == "mine"


def test_other_processes_of_a_run_find_the_first_ones_files(
    job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out").mkdir()
    Path("out/predictions").mkdir()
    monkeypatch.setenv("LOCAL_RANK", "1")
    job({"hydra": {"run": {"dir": "out"}, "output_subdir": None, "job": {"name": "rank1"}}})
    assert Path("out/rank1.log").exists()
