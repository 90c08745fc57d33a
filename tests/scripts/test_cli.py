import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import SCRIPT, fusion_bench, python

from fusion_bench.report import Report
from fusion_bench.scripts import process
from fusion_bench.storage import claimed

HEAVY = ("torch", "transformers", "datasets", "lightning", "sklearn", "skimage", "matplotlib")


@pytest.fixture
def conf(tmp_path: Path, program_config: dict[str, Any]) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "small.yaml").write_text(yaml.safe_dump(program_config))
    return tmp_path / "conf"


def small(conf: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return fusion_bench(
        *("--config-path", str(conf), "--config-name", "small"), *arguments, cwd=conf.parent
    )


@pytest.mark.cold
@pytest.mark.parametrize(
    "code",
    [
        "import fusion_bench, fusion_bench.scripts.cli",
        "import sys; sys.argv = ['fusion_bench', '--help']\n"
        "from fusion_bench.scripts.cli import main\n"
        "try: main()\nexcept SystemExit: pass",
        "import sys; sys.argv = ['fusion_bench', '--cfg', 'job', '--resolve']\n"
        "from fusion_bench.scripts.cli import main\nmain()",
    ],
)
def test_nothing_heavy_is_imported_early(code: str, tmp_path: Path) -> None:
    check = f"loaded = [m for m in {HEAVY} if m in sys.modules]\nassert not loaded, loaded"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\n{check}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_printing_a_config_builds_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSION_BENCH_CACHE", str(tmp_path / "cache"))
    for arguments in (["--cfg", "job"], ["--cfg", "job", "--resolve"], ["--help", "seed=1"]):
        done = fusion_bench(*arguments, cwd=tmp_path)
        assert done.returncode == 0 and "SimpleAverageAlgorithm" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_and_version_are_ours(tmp_path: Path) -> None:
    for flag in ("--help", "-h"):
        done = fusion_bench(flag, cwd=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith("fusion_bench fuses fine-tuned")
        assert "Hydra" not in done.stdout and len(done.stdout.splitlines()) <= 50
    done = fusion_bench("--version", cwd=tmp_path)
    assert done.stdout.split() == ["fusion_bench", version("fusion_bench")]


def test_a_config_file_may_be_the_first_word(conf: Path) -> None:
    done = fusion_bench(str(conf / "small.yaml"), "seed=3", "--cfg", "job", cwd=conf.parent)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["seed"] == 3


def test_a_run_from_a_users_own_config(conf: Path) -> None:
    done = small(conf, "seed=3", "fabric.precision=bf16-mixed", "report_save_path=r.json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # bars are silent without a terminal
    for word in ("pretrained", "individual", "merged", "normalised"):
        assert word in done.stdout
    (out,) = (conf.parent / "outputs").glob("*/*")
    report = Report.load(out / "report.json")
    assert report == Report.load(conf.parent / "r.json")
    assert (report.run.seed, report.run.precision) == (3, "bf16-mixed")
    assert yaml.safe_load((out / "config.yaml").read_text())["seed"] == 3


def test_two_processes_from_the_command_line(conf: Path) -> None:
    counts = []
    for devices in (1, 2):
        done = small(conf, f"fabric.devices={devices}", "report_save_path=${fabric.devices}.json")
        assert done.returncode == 0, done.stderr
        models = Report.load(conf.parent / f"{devices}.json").models
        counts.append({(n, t): r.main.value for n, m in models.items() for t, r in m.tasks.items()})
    assert counts[0] == counts[1] and len(counts[0]) == 6
    assert len(list((conf.parent / "outputs").glob("*/*/report.json"))) == 2


def test_multirun(conf: Path) -> None:
    done = small(conf, "-m", "seed=1,2", "baselines=none", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    places = [conf.parent / "sweep" / f"seed={seed}" for seed in (1, 2)]
    reports = [Report.load(place / "report.json") for place in places]
    assert [report.run.seed for report in reports] == [1, 2]


def test_our_groups_serve_a_users_own_config(conf: Path) -> None:
    config = yaml.safe_load((conf / "small.yaml").read_text())
    del config["method"]
    defaults = {"defaults": [{"/method": "task_arithmetic"}, "_self_"]}
    (conf / "small.yaml").write_text(yaml.safe_dump(defaults | config))
    done = small(conf, "method.scaling_factor=0.5", "report_save_path=r.json")
    assert done.returncode == 0, done.stderr
    assert Report.load(conf.parent / "r.json").run.config["method"]["scaling_factor"] == 0.5


@pytest.mark.cold
def test_both_module_forms_work(tmp_path: Path) -> None:
    for module in ("fusion_bench", "fusion_bench.scripts.cli"):
        done = subprocess.run(
            [sys.executable, "-m", module, "--cfg", "job"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and "FabricModelFusionProgram" in done.stdout


@pytest.mark.cold
def test_nothing_is_imported_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by a child, nor by an empty entry of PYTHONPATH; what it names stays."""
    monkeypatch.chdir(tmp_path)
    other = str(tmp_path / "other")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.setenv("PYTHONPATH", f":{other}:")
    monkeypatch.setattr(sys, "path", [str(tmp_path), other, str(tmp_path), *sys.path])
    process.leave_working_directory()
    assert str(tmp_path) not in sys.path and other in sys.path
    assert os.environ["PYTHONPATH"] == other and os.environ["PYTHONSAFEPATH"] == "1"
    for name in ("pickle", "socket", "runpy", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("print('evil')")
    code = (
        "import multiprocessing as m, pickle, runpy\n"
        "if __name__ == '__main__':\n"
        "    p = m.get_context('spawn').Process(target=print, args=('child',))\n"
        "    p.start(); p.join(); print('parent', p.exitcode)"
    )
    for command in (["-c", code], ["-m", "pickletools", "--help"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        assert done.returncode == 0 and "evil" not in done.stdout, done
    monkeypatch.setenv("PYTHONPATH", f":{tmp_path}")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    process.leave_working_directory()
    assert str(tmp_path) in sys.path and os.environ["PYTHONPATH"] == str(tmp_path)


BAD = [
    (["seed=1,2"], "seed=1,2", "add -m"),
    (["hydra.mode=nonsense"], "hydra.mode", "RUN"),
    (["hydra.verbose=1"], "hydra.verbose", "the name of a logger"),
    (["hydra.run.dir=/dev/null/x"], "hydra.run.dir", "Choose another directory"),
    (["--experimental-rerun", "x.pickle"], "pickle", "--config-path"),
    (["method@x=simple_average"], "method@x", "+method@x=simple_average"),
    (["--config-name", "smal"], "smal", "Did you mean 'small'?"),
    (["metod=x"], "metod", "Did you mean 'method'?"),
    (["+metod=x"], "metod", "Did you mean 'method'?"),
    (["+method.inplce=true"], "method.inplce", "Did you mean 'inplace'?"),
    (["method.inplce=true"], "method.inplce", "Did you mean 'inplace'?"),
    (["method.where=[{mtch: head, inplace: true}]"], "method.where[0].mtch", "'match'"),
    (
        ["method._target_=fusion_bench.method.SimpleAverage"],
        "SimpleAverage",
        "SimpleAverageAlgorithm",
    ),
    (["~modelpool.models.a", "~modelpool.models.b"], "modelpool.models", "the pool is empty"),
    (["modelpool.models.a=/no/such"], "/no/such", "no such"),
    (["modelpool.models.a=???"], "modelpool.models.a", "issing"),
    (["fabric.accelerator=abacus"], "abacus", "cpu"),
    (["taskpool.test_datasets.a.split=tst"], "tst", "Did you mean 'test'?"),
    (["baselines=all"], "all", "all_tasks"),
    (["seed=abc"], "seed", "whole number"),
    (["fabric.precision=foo"], "fabric.precision: ", "'bf16-mixed'"),
    (["modelpool._target_=fusion_bench.modelpool.No"], "modelpool._target_: ", "cannot find"),
    (["merged_model_save_path='{logdir}/m'"], "{logdir}", "Did you mean 'log_dir'?"),
    (["report_save_path={log_dir}/r.json"], "{log_dir}", "Quote it"),
    (["seed=[1"], "[1", "input"),
]


@pytest.mark.parametrize(("arguments", "culprit", "fix"), BAD, ids=lambda v: str(v)[:40])
def test_bad_input_ends_with_one_message(
    conf: Path, arguments: list[str], culprit: str, fix: str
) -> None:
    done = small(conf, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("fusion_bench: ") and done.stderr.count("fusion_bench: ") == 1
    assert culprit in done.stderr and fix in done.stderr
    assert "[ERROR]" not in done.stdout  # a library's log
    written = {path.name for path in conf.parent.glob("outputs/*/*/*")}
    assert written <= {".hydra", "cli.log"}  # what Hydra itself keeps of a run


def test_a_seed_that_the_method_takes_over_is_told_once(conf: Path) -> None:
    (conf / "opcm.yaml").write_text("defaults: [small, {method: opcm/opcm}]")
    done = small(conf, "--config-name", "opcm", "seed=x")
    assert done.stderr == "fusion_bench: seed: 'x' is not a whole number or null.\n"
    done = small(conf, "--config-name", "opcm", "seed=x", "method.seed=y")
    assert "\n  method.seed: 'y' is not a whole number or null.\n" in done.stderr


def test_a_method_is_given_whole(conf: Path) -> None:
    target = "fusion_bench.method.TaskArithmeticAlgorithm"
    whole = f"method={{_target_: {target}, scaling_factor: 0.5, show_pbar: false}}"
    done = small(conf, whole, "--cfg", "job")
    method = {"_target_": target, "scaling_factor": 0.5, "show_pbar": False}
    assert yaml.safe_load(done.stdout)["method"] == method


def test_the_traceback_is_there_for_who_asks(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    main = "from fusion_bench.scripts.cli import main\nmain()"
    words = ["--config-path", str(conf), "--config-name", "small", "baselines=all"]
    done = python(main, *words, cwd=conf.parent)
    assert done.returncode == 1  # Python's own
    assert "Traceback" in done.stderr and "ConfigError: baselines" in done.stderr


OWN = """
from fusion_bench.method import SimpleAverageAlgorithm


class Mine(SimpleAverageAlgorithm):
    def run(self, modelpool):
        return super().run(modelpool)


class Broken(SimpleAverageAlgorithm):
    def run(self, modelpool):
        raise ZeroDivisionError("of mine, with hf_abcdefghijklmnopqrstuvwx")
"""


@pytest.fixture
def own(conf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (conf.parent / "my_methods.py").write_text(OWN)
    config = yaml.safe_load((conf / "small.yaml").read_text())
    del config["taskpool"]
    (conf / "small.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(conf.parent), *sys.path]))
    return conf


def test_a_method_of_the_users_own(own: Path) -> None:
    word = "method._target_=my_methods.Mine"
    refused = small(own, word)
    assert refused.returncode == 2 and "--allow my_methods" in refused.stderr
    done = small(own, "--allow", "my_methods", word)
    assert done.returncode == 0, done.stderr
    assert "my_methods.Mine" in next(own.parent.glob("outputs/*/*/config.yaml")).read_text()


def test_what_is_unexpected_is_a_line_and_a_traceback_in_the_log(own: Path) -> None:
    word = "method._target_=my_methods.Broken"
    done = small(own, "--allow=my_methods", word)
    (log,) = own.parent.glob("outputs/*/*/cli.log")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == [
        "fusion_bench: ZeroDivisionError: of mine, with ***",
        f"  This is unexpected, so please report it. The traceback is in {log}.",
    ]
    written = log.read_text()
    assert "Traceback" in written and "ZeroDivisionError: of mine, with ***" in written
    assert "hf_abc" not in done.stdout + done.stderr + written


def test_a_token_is_refused_before_anything_is_written(conf: Path) -> None:
    token = "hf_" + "abcdefgh" * 4
    done = small(conf, f"++modelpool.token={token}")
    assert done.returncode == 2 and "modelpool.token: looks like a token" in done.stderr
    assert token not in done.stdout + done.stderr
    assert {path.name for path in conf.parent.iterdir()} == {"conf"}


@pytest.mark.cold
def test_the_report_is_written_though_nobody_listens(conf: Path) -> None:
    command = f"{SCRIPT} --config-path {conf} --config-name small report_save_path=r.json"
    script = f"{command} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=conf.parent, capture_output=True, text=True, check=False
    )
    _is_written(conf, done)


@pytest.mark.parametrize("streams", [["stdout"], ["stdout", "stderr"]])
def test_the_report_is_written_though_the_disk_is_full(conf: Path, streams: list[str]) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has none")
    words = ("--config-path", str(conf), "--config-name", "small", "report_save_path=r.json")
    to = dict.fromkeys(streams, full)
    _is_written(conf, fusion_bench(*words, cwd=conf.parent, **to))


def _is_written(conf: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0 and "Traceback" not in done.stderr
    (out,) = (conf.parent / "outputs").glob("*/*")
    assert Report.load(out / "report.json") == Report.load(conf.parent / "r.json")
    assert "Report: " in (out / "cli.log").read_text()


def test_a_strangers_model_writes_no_control_characters(conf: Path, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[31mx\u202e\u2028\r\nfusion_bench: all is well"
    config = yaml.safe_load((conf / "small.yaml").read_text())
    name = f"m\x1b[2J{evil[:9]}"
    model = tmp_path / "model"
    shutil.copytree(config["modelpool"]["models"]["a"], model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "model_type": evil}))
    config["modelpool"]["models"] = {name: f"{model}", "_pretrained_": f"{tmp_path}/no\x1b[1m"}
    config["modelpool"]["model_class"] = evil
    (conf / "small.yaml").write_text(yaml.safe_dump(config))
    for words in ((), ("--cfg", "job"), (f"+{name}=1",), (f"method.{name}=1",)):
        done = small(conf, *words)
        logs = "".join(log.read_text() for log in conf.parent.glob("outputs/*/*/*.log"))
        for text in (done.stdout, done.stderr, logs):
            assert all(c.isprintable() or c in "\n\t" for c in text), ascii(text)
            assert not [line for line in text.splitlines()[1:] if line.startswith("fusion_bench:")]


def test_a_folder_that_another_run_has_claimed(conf: Path) -> None:
    place = conf.parent / "here"
    with claimed(place, "hydra.run.dir", inside=True):
        done = small(conf, f"hydra.run.dir={place}")
        assert done.returncode == 3
        assert f"hydra.run.dir: '{place}' is in use by another run (process " in done.stderr
    with claimed(place, "hydra.sweep.dir", inside=True):
        done = small(conf, "-m", "seed=1,2", f"hydra.sweep.dir={place}")
        assert done.returncode == 3 and "hydra.sweep.dir: " in done.stderr
    assert not list(place.glob("seed*"))


@pytest.mark.parametrize("ending", ["", ".yaml"])
def test_a_word_longer_than_a_name_of_a_file_is_no_file(tmp_path: Path, ending: str) -> None:
    from fusion_bench.command import file_as_options
    from fusion_bench.scripts.verbs.merge import separated

    word = f"where=[{{match: {'a' * 300}}}]{ending}"
    assert separated(["m", word], "method") == (["m"], [f"++method.{word}"])
    assert file_as_options([word]) == [word]
    done = fusion_bench(f"{'a' * 300}.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "is not there" in done.stderr
    done = fusion_bench("index", "a" * 300, cwd=tmp_path)
    assert done.returncode == 2
    assert "it is too long for the name of a file" in done.stderr
