"""The wheel, installed alone, is the whole program."""

import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from commandline import REPOSITORY

pytestmark = pytest.mark.cold


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel and install it outside the checkout; return that environment's Python."""
    root = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(root)]
    subprocess.run([*build, str(REPOSITORY)], check=True, capture_output=True)
    (wheel,) = root.glob("*.whl")
    venv.create(root / "venv", with_pip=True)
    interpreter = root / "venv" / "bin" / "python"
    install = [str(interpreter), "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    # What it depends on is borrowed from here; nothing is fetched. An editable install of the
    # checkout is a .pth file, which does not count in a borrowed directory.
    (packages,) = (root / "venv" / "lib").glob("python*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    return interpreter


def test_it_is_the_wheel_that_runs(python: Path, tmp_path: Path) -> None:
    code = "import fusion_bench; print(fusion_bench.__file__)"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith(str(python.parents[1])), done.stderr


def test_the_wheel_carries_the_configs(python: Path, tmp_path: Path) -> None:
    script = python.parent / "fusion_bench"
    pool = "modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8"
    done = subprocess.run(
        [script, "--cfg", "job", pool], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "tanganke/clip-vit-base-patch32_sun397" in done.stdout


def test_the_wheel_carries_the_templates(python: Path, tmp_path: Path) -> None:
    command = [python.parent / "fusion_bench", "new", "method", "soft_ties"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "soft_ties.py").is_file()


def test_the_wheel_fuses_and_evaluates(
    python: Path, tmp_path: Path, program_config: dict[str, object]
) -> None:
    import yaml

    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "small.yaml").write_text(yaml.safe_dump(program_config))
    script = python.parent / "fusion_bench"
    done = subprocess.run(
        [script, "--config-path", "conf", "--config-name", "small"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "merged" in done.stdout
    assert list(tmp_path.glob("outputs/*/*/report.json"))
