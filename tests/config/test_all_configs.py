"""Every YAML under config/ composes, and what it names takes the keys that it gives."""

from collections.abc import Iterator
from copy import deepcopy
from inspect import isclass, signature
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from fusion_bench.configs import datasets, register, suites
from fusion_bench.instantiate import check, instantiate
from fusion_bench.method.per_model import per_model_options
from fusion_bench.problems import FusionBenchError
from fusion_bench.scripts.hydra_patches import set_up_hydra
from fusion_bench.scripts.shared_files import SharedRepository

CONFIG = Path(__file__).parents[2] / "config"
#: Whoever types one of these is to get what it was: groups, and the choices in them.
NAMES = Path(__file__).with_name("names.txt").read_text(encoding="utf-8").split()
#: Of these one file stands for several choices.
SEVERAL = ("dataset/", "suite/")
FILES = sorted(
    {
        str(path.relative_to(CONFIG).with_suffix(""))
        for path in CONFIG.rglob("*.yaml")
        if not path.name.startswith("_")  # templates lack what the files that build on them give
    }
    | {f"{group}/{name}" for group, name, _ in (*datasets(), *suites())}
)
FILES = [
    name for name in FILES if not (name.startswith(SEVERAL) and (CONFIG / f"{name}.yaml").exists())
]
HYDRAS_OWN = [name for name in FILES if name.startswith(("hydra/", "launcher/"))]
#: What a config needs from the command line; its own comment says so.
NEEDS = {
    "compare": ["reports=[a/report.json,b/report.json]"],
    "evaluate": ["modelpool=CLIPVisionModelPool/zoo", "taskpool=CLIPVisionModelTaskPool/zoo"],
    "merge_llm": ["+modelpool.models.a=owner/a"],
    "method/stacked_layers": ["method.slices=[{models:{a:[0,1]}}]"],
    "repeat": ["report=report.json"],
    "search_winner": ["sweep=multirun/sweep"],
}
#: A dry run would look for their models there.
ON_HUB = ("merge_llm",)
#: A dry run looks for the earlier results that they name.
ON_RESULTS = ("compare", "repeat", "search_winner")
#: Groups of files that differ in names alone, and refer to nothing outside.
MANY = ("dataset/", "model/")
#: What is made without loading anything; the rest is bound to its signature.
LIGHT = ("method/", "modelpool/", "taskpool/", "fabric/auto")
#: What refers to the folder of a run.
IN_A_RUN = ("path/",)


def test_there_are_some() -> None:
    assert len(FILES) > 100 and "_get_started/clip_simple_average" in FILES


@pytest.fixture
def hydra_as_we_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Plugins.instance()  # they put their own into the store
    monkeypatch.setattr(ConfigStore.instance(), "repo", deepcopy(ConfigStore.instance().repo))
    set_up_hydra()


@pytest.mark.usefixtures("hydra_as_we_have_it")
@pytest.mark.parametrize("name", HYDRAS_OWN)
def test_hydras_own_settings_compose(name: str) -> None:
    group, _, choice = f"hydra/{name.removeprefix('hydra/')}".rpartition("/")
    with initialize_config_dir(str(CONFIG), version_base="1.3"):
        config = compose("fabric_model_fusion", [f"{group}={choice}"], return_hydra_config=True)
    section = config.hydra[group.removeprefix("hydra/")] if group != "hydra/output" else {}
    target = (section.get(choice) or section).get("_target_")
    if target is None:
        assert OmegaConf.is_missing(config.hydra.sweep, "dir")
        return
    pytest.importorskip(target.rpartition(".")[0], reason="its extra is not installed")
    taken = signature(get_object(target)).parameters
    given = {key for key in section if not (section.get(choice) or key == "_target_")}
    assert given <= set(taken) or any(p.kind is p.VAR_KEYWORD for p in taken.values())


@pytest.mark.usefixtures("hydra_as_we_have_it")
def test_every_name_that_was_ever_there_is_there() -> None:
    with initialize_config_dir(str(CONFIG), version_base="1.3"):
        repository = GlobalHydra.instance().config_loader().repository
        lost = [
            name
            for name in NAMES
            if not (repository.config_exists(name) or repository.group_exists(name))
        ]
    assert len(NAMES) > 250 and lost == []


@pytest.fixture(scope="module")
def registered() -> None:
    """Give Hydra our choices once, which takes as long as to compose with them."""
    register()


@pytest.fixture(scope="module")
def composing(registered: None) -> Iterator[None]:
    """Let tests compose from our folder, each file of which is read once."""
    with initialize_config_dir(str(CONFIG), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        loader.repository = SharedRepository(loader.get_search_path())
        yield


@pytest.fixture(scope="module")
def together(composing: None) -> DictConfig:
    """Compose what is small and many at once, which takes as long as one; by place in FILES."""
    words = []
    for number, name in enumerate(FILES):
        if name.startswith(MANY):
            group, _, choice = name.rpartition("/")
            words.append(f"+{group}@n{number}.{group.replace('/', '.')}={choice}")
    return compose(overrides=words)


@pytest.mark.parametrize(
    "name", [name for name in FILES if name not in HYDRAS_OWN and not name.startswith(IN_A_RUN)]
)
def test_it_composes_and_binds(name: str, together: DictConfig, tmp_path: Path) -> None:
    if name.startswith(MANY):
        config = together[f"n{FILES.index(name)}"]
    else:
        config = compose(name, overrides=NEEDS.get(name, []))
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict) and resolved
    check(resolved)
    node = resolved
    for part in name.split("/")[:-1]:
        node = node.get(part, node)
    if name.startswith(LIGHT):
        assert instantiate({"_recursive_": False, **node}) is not None
    elif "_target_" in resolved:
        program = instantiate({**resolved, "dry_run": True}, output_dir=tmp_path)
        if name in ON_RESULTS:
            with pytest.raises(FusionBenchError, match=str(Path.cwd())):
                program.run()
        else:
            assert name in ON_HUB or program.run() is None
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("composing")
@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("method/")])
def test_a_value_for_each_model_fits_every_preset(name: str) -> None:
    own = OmegaConf.load(CONFIG / f"{name}.yaml")
    made = get_object(own._target_)
    options = per_model_options(made) if isclass(made) else ()
    method = name.removeprefix("method/")
    for value in ({"a": 0.7, "b": 0.3}, [0.7, 0.3], 0.5) if options else ():
        words = [f"++method.{option}={value}".replace("'", "") for option in options]
        words += [f"method={method}", "+modelpool.models.a=owner/a"]
        found = compose("merge_llm", overrides=words)
        for option in options:
            assert found.method[option] == value
            # A file that builds on the preset.
            assert OmegaConf.merge(own, {option: value})[option] == value
