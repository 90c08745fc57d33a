"""Every YAML under config/ composes, and what it names takes the keys that it gives."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fusion_bench.instantiate import check, instantiate

CONFIG = Path(__file__).parents[2] / "config"
FILES = [
    str(path.relative_to(CONFIG).with_suffix(""))
    for path in sorted(CONFIG.rglob("*.yaml"))
    if not path.name.startswith("_")  # templates lack what the files that build on them give
]
#: What a config needs from the command line; its own comment says so.
NEEDS = {
    "merge_llm": ["+modelpool.models.a=owner/a"],
    "search_winner": ["sweep=multirun/sweep"],
}
#: What is made without loading anything; the rest is bound to its signature.
LIGHT = ("method/", "modelpool/", "taskpool/", "fabric/")


def test_there_are_some() -> None:
    assert len(FILES) > 100 and "_get_started/clip_simple_average" in FILES


@pytest.mark.parametrize("name", FILES)
def test_it_composes_and_binds(name: str, tmp_path: Path) -> None:
    with initialize_config_dir(str(CONFIG), version_base="1.3"):
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
        assert instantiate({**resolved, "dry_run": True}, output_dir=tmp_path).run() is None
        assert list(tmp_path.iterdir()) == []
