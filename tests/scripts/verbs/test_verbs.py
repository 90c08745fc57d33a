"""The verbs of the command line: each explains itself, and refuses what it does not know."""

import subprocess
import sys
from pathlib import Path

import pytest
from commandline import fusion_bench

from fusion_bench.scripts import verbs
from fusion_bench.scripts.verbs import VERBS, page, parser_of


def test_each_has_a_module_and_each_module_a_line() -> None:
    modules = {path.stem for path in Path(verbs.__file__).parent.glob("*.py")} - {"__init__"}
    assert modules == {verb.replace("-", "_") for verb in VERBS}


@pytest.mark.parametrize("verb", VERBS)
def test_each_explains_itself_with_examples(verb: str) -> None:
    text = parser_of(verb).format_help()
    before, _, examples = text.partition("\nexamples:\n")
    assert before.startswith(f"usage: fusion_bench {verb} ")
    assert all(line.startswith(f"  fusion_bench {verb}") for line in examples.splitlines() if line)
    assert max(map(len, text.splitlines())) <= 100
    assert f"\n  {verb} " in page()


@pytest.mark.cold
def test_help_imports_no_hydra(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom fusion_bench.scripts.cli import main\n"
        "for words in (['--help'], ['--version'], ['ls', 'methods'], ['show', 'ties']):\n"
        "    sys.argv = ['fusion_bench', *words]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code\n"
        "    sys.stdin = open('/dev/null')\n"
        "slow = {'torch', 'hydra', 'pydantic', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "assert not slow, slow"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    done = fusion_bench("ls", "foo", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("fusion_bench: kind: invalid choice: 'foo'")
    assert "'fusion_bench ls --help'" in done.stderr and done.stderr.count("\n") == 1
