import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusion_bench.instantiate import instantiate
from fusion_bench.problems import ConfigError
from fusion_bench.trust import allow_plugin, environment_variable, find, plugins, users_code

AVERAGE = "fusion_bench.method.SimpleAverageAlgorithm"


@pytest.mark.parametrize(
    "name",
    [
        AVERAGE,
        "fusion_bench.method.simple_average.SimpleAverageAlgorithm",
        "fusion_bench.method.FisherMergingForCLIPVisionModel",
        "fusion_bench.programs.FabricModelFusionProgram",
        "fusion_bench.zoo.load_dataset",
        "datasets.load_dataset",
        "datasets.load_from_disk",
        "lightning.Fabric",
        "lightning.fabric.strategies.DDPStrategy",
        "lightning.fabric.loggers.CSVLogger",
        "lightning.pytorch.loggers.CSVLogger",
        "torch.optim.AdamW",
        "torch.optim.lr_scheduler.CosineAnnealingLR",
        "transformers.CLIPVisionModel.from_pretrained",
        "transformers.AutoModelForCausalLM.from_pretrained",
        "transformers.AutoTokenizer.from_pretrained",
        "hydra.utils.get_method",
    ],
)
def test_what_a_config_may_name(name: str) -> None:
    assert find(name) is not None


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "posix.system",
        "builtins.eval",
        "builtins.open",
        "pickle.loads",
        "functools.partial",
        "subprocess.run",
        "pathlib.Path.write_text",
        "torch.load",
        "torch.hub.load",
        "torch.ops",
        "torch.nn",
        "torch.bfloat16",
        "torch.optim.lr_scheduler.partial",
        "torch.optim.Optimizer.load_state_dict",
        "numpy.load",
        "pandas.read_pickle",
        "hydra.utils.instantiate",
        "hydra.utils.log",
        "lightning.Fabric.launch",
        "lightning.fabric.strategies.os.system",
        "lightning.fabric.strategies.strategy.torch",
        "transformers.pipeline",
        "transformers.CLIPVisionModel",
        "transformers.CLIPVisionModel.from_pretrained.__func__",
        "transformers.modeling_utils.os.system.from_pretrained",
        "datasets.Dataset.from_generator",
        "fusion_bench.scripts.cli.hydra",
        "fusion_bench.scripts.cli.main",
        "fusion_bench.storage.write_text",
        "fusion_bench.instantiate.hydra_instantiate",
        "fusion_bench.method.base.torch.load",
        "fusion_bench.method.wudi.torch.hub.load",
        "fusion_bench.method.SimpleAverageAlgorithm.run",
        "fusion_bench.modelpool.__builtins__",
        "fusion_bench.programs.fabric_model_fusion.Path",
        "fusion_bench.method",
        "",
        ".",
        "os",
        "os.system ",
    ],
)
def test_what_a_config_may_not_name(name: str) -> None:
    with pytest.raises(ConfigError):
        find(name)


def test_a_name_is_looked_at_before_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"--allow stranger, or .* --plugins .*/stranger\.py"):
        find("stranger.run")
    assert "stranger" not in sys.modules


def test_the_user_allows_a_package_outside_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_for_trust.py").write_text(
        "import os\nfrom os import system\nclass Method:\n    def __init__(self, x):\n"
        "        self.x = x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FUSION_BENCH_ALLOW", "other, mine_for_trust")
    assert instantiate({"_target_": "mine_for_trust.Method", "x": 3}).x == 3
    for foreign in ("mine_for_trust.os.system", "mine_for_trust.system", "mine_for_trusty.Method"):
        with pytest.raises(ConfigError):
            find(foreign)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a file of the user's, which is not there to import for anyone else."""
    monkeypatch.setenv("FUSION_BENCH_PLUGINS", "")
    file = tmp_path / "my_plugin.py"
    file.write_text("from os import system\nclass Method:\n    x = 3\n")
    yield file
    sys.modules.pop("my_plugin", None)


def test_the_user_allows_a_file(plugin: Path) -> None:
    with pytest.raises(ConfigError, match="may not be called"):
        find("my_plugin.Method")
    allow_plugin(str(plugin))
    assert find("my_plugin.Method").x == 3
    with pytest.raises(ConfigError, match="may not be called"):
        find("my_plugin.system")  # which it merely imports
    with pytest.raises(ConfigError, match=r"in .*my_plugin.py. Did you mean 'Method'"):
        find("my_plugin.Methods")
    assert "my_plugin" not in {path.rpartition("/")[2] for path in sys.path}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.py", "no Python file"),
        ("my_plugin", "no Python file"),
        (".", "no Python file"),
        ("numpy.py", "another module is called 'numpy', so rename"),
        ("math.py", "another module is called 'math', so rename"),
        ("a-b.py", "cannot be imported, so rename"),
    ],
)
def test_files_that_cannot_be_plugins(
    plugin: Path, name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plugin.parent)
    for other in ("numpy.py", "math.py", "a-b.py"):
        Path(other).touch()
    with pytest.raises(ConfigError, match=said):
        allow_plugin(name)
    assert plugins() == {}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nowhere_at_all", "No module named 'nowhere_at_all' .*my_plugin.py, line 1"),
        ("x = 1 / 0", "ZeroDivisionError: division by zero .*my_plugin.py, line 1"),
        ("class A(:", "SyntaxError: .*my_plugin.py, line 1"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_line(plugin: Path, code: str, said: str) -> None:
    plugin.write_text(code)
    allow_plugin(str(plugin))
    with pytest.raises(ConfigError, match=f"cannot import 'my_plugin.Method': .*{said}"):
        find("my_plugin.Method")


def test_the_code_that_a_config_calls_is_known(plugin: Path) -> None:
    node = {"method": {"_target_": "my_plugin.Method"}, "other": [{"_target_": AVERAGE}]}
    assert users_code(node) == {}
    allow_plugin(str(plugin))
    (first,) = users_code(node).items()
    plugin.write_text("class Method:\n    x = 4\n")
    (second,) = users_code([node]).items()
    assert first[0] == second[0] == "my_plugin" and first[1] != second[1]


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": AVERAGE, "inplace": {"_target_": "os.system"}},
        {"_target_": AVERAGE, "inplace": [{"a": [{"_target_": "os.system"}]}]},
        {"_target_": AVERAGE, "_recursive_": False, "inplace": {"_target_": "os.system"}},
        {"_target_": "os.system", "_partial_": True},
        {"_target_": "hydra.utils.get_method", "path": "os.system"},
        {"_target_": "hydra.utils.get_class", "path": "subprocess.Popen"},
        {"_target_": "hydra.utils.get_object", "path": "fusion_bench.scripts.cli.os"},
        {"_target_": AVERAGE, "inplace": "${oc.create:'{_target_: os.system}'}"},
        {"_target_": "transformers.AutoModel.from_pretrained", "trust_remote_code": True},
        {"_target_": "transformers.AutoModel.from_pretrained", "weights_only": False},
        {"_target_": "transformers.AutoModel.from_pretrained", "attn_implementation": "a/b"},
        {"_target_": "transformers.AutoModel.from_pretrained", "weights_only": 0},
        {"_target_": "transformers.AutoModel.from_pretrained", "attn_implementation": {"": "a/b"}},
        {"_target_": "datasets.load_dataset", "path": "generator"},
        {"_target_": "datasets.load_dataset", "_args_": ["pandas"]},
        {"_target_": "datasets.load_dataset", "path": "a/b", "storage_options": {"hf": {"a": 1}}},
        {"_target_": "datasets.load_from_disk", "dataset_path": "a", "storage_options": {"a": 1}},
    ],
    ids=str,
)
def test_refused_at_every_depth(node: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        instantiate(node, "x")


def test_a_section_is_made_of_what_it_is_for() -> None:
    node = {"_target_": "lightning.fabric.loggers.CSVLogger", "root_dir": "/nowhere"}
    with pytest.raises(ConfigError, match=r"_target_: '.*CSVLogger' is not a method"):
        instantiate(node, "method")


def test_a_lookup_of_what_is_allowed() -> None:
    import torch

    assert instantiate({"_target_": "hydra.utils.get_object", "path": "torch.bfloat16"}) is (
        torch.bfloat16
    )
    method = instantiate({"_target_": "hydra.utils.get_class", "path": AVERAGE})
    assert method.__name__ == "SimpleAverageAlgorithm"


def test_environment_variables_stay_out_unless_they_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    with pytest.raises(ConfigError, match="FUSION_BENCH_ALLOW_ENV=SCRATCH"):
        environment_variable("SCRATCH")
    monkeypatch.setenv("FUSION_BENCH_ALLOW_ENV", "A,SCRATCH")
    assert environment_variable("SCRATCH") == "/scratch"
    assert environment_variable("A", "else") == "else"
