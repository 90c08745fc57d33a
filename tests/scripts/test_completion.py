"""What a shell is offered when the user presses TAB."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import fusion_bench

from fusion_bench.scripts import verbs

SETTINGS = {
    "_ARGCOMPLETE": "1",
    "_ARGCOMPLETE_IFS": "\n",
    "_ARGCOMPLETE_SHELL": "fish",
    "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
    "COMP_TYPE": "",
}


def offered(line: str, cwd: Path) -> list[str]:
    answer = cwd / ".answer"
    env = os.environ | SETTINGS | {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = fusion_bench(cwd=cwd, env=env | {"_ARGCOMPLETE_STDOUT_FILENAME": str(answer)})
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    words = answer.read_text().split("\n")
    answer.unlink()
    return [word.strip() for word in words if word.strip()]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("fusion_bench sh", ["show"]),
        ("fusion_bench method=ti", ["method=ties_merging"]),
        ("fusion_bench -m method=simple_average,ti", ["method=simple_average,ties_merging"]),
        ("fusion_bench modelpool=CausalLMPool/zoo_", ["modelpool=CausalLMPool/zoo_tied"]),
        ("fusion_bench method=ties method.thr", ["method.threshold="]),
        (
            "fusion_bench method=ties method.merge_func=",
            ["method.merge_func=mean", "method.merge_func=sum", "method.merge_func=max"],
        ),
        ("fusion_bench method=lines/lines method.al", ["method.alpha="]),
        ("fusion_bench method=lines/lines method@", ["method@method.base_method="]),
        # The YAML of LiNeS has task arithmetic in it.
        (
            "fusion_bench method=lines/lines method.base_method.sc",
            ["method.base_method.scaling_factor="],
        ),
        (
            "fusion_bench method=lines/lines method@method.base_method=ties method.base_method.k",
            ["method.base_method.keep="],
        ),
        ("fusion_bench mine.yaml method.k", ["method.keep="]),
        ("fusion_bench --config-name search method.sc", ["method.scaling_factor="]),
        ("fusion_bench base", ["baselines="]),
        ("fusion_bench baselines=a", ["baselines=all_tasks"]),
        ("fusion_bench fast_dev_run=t", ["fast_dev_run=true"]),
        ("fusion_bench mi", ["mine.yaml"]),
        ("fusion_bench --config-name demo_l", ["demo_language"]),
        ("fusion_bench show ties", ["ties_merging"]),
        ("fusion_bench cp scaling_study_", ["scaling_study_language"]),
        ("fusion_bench merge a b --method dare/t", ["dare/task_arithmetic", "dare/ties_merging"]),
        ("fusion_bench ls da", ["datasets"]),
        ("fusion_bench cache pr", ["prune"]),
        ("fusion_bench no_such_thing", []),
    ],
)
def test_what_is_offered(line: str, wanted: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [fabric_model_fusion, {override method: ties_merging}]"
    )
    assert offered(line, tmp_path) == wanted


def test_it_is_installed_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".bashrc").write_text("alias a=b")
    for shell in ("bash", "zsh", "fish"):
        monkeypatch.setenv("SHELL", f"/bin/{shell}")
        verbs.run("completion", ["install"])
        verbs.run("completion", ["install"])  # twice is once
    assert "open a new terminal" in capsys.readouterr().out
    script = tmp_path / ".local/share/fusion_bench/completion.bash"
    line = f'source "{script}" # completion of fusion_bench\n'
    assert (tmp_path / ".bashrc").read_text() == f"alias a=b\n{line}"
    assert (tmp_path / ".config/fish/completions/fusion_bench.fish").is_file()
    code = (
        f"source '{script}'; COMP_LINE='fusion_bench method=ti'; COMP_POINT=${{#COMP_LINE}}; "
        '_python_argcomplete fusion_bench ti =; echo "${COMPREPLY[@]}"'
    )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "--norc", "-c", code],
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "ties_merging", done.stderr
    for shell in ("bash", "zsh", "fish"):
        verbs.run("completion", ["uninstall", shell])
    assert (tmp_path / ".bashrc").read_text() == "alias a=b\n"
    assert not script.exists()


def test_an_unknown_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    with pytest.raises(Exception, match="'tcsh' is none of bash, zsh, fish"):
        verbs.run("completion", ["install"])
