import math
from pathlib import Path
from typing import Any

import pytest
from fixtures_method import merged
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fusion_bench.instantiate import instantiate

CONFIG = Path(__file__).parents[2] / "config"
START = [10.0, 20.0]


def method(name: str, *overrides: str) -> Any:
    with initialize_config_dir(str(CONFIG), version_base="1.3"):
        config = compose("merge_llm", overrides=[f"method=rlhf/{name}", *overrides])
    return instantiate(OmegaConf.to_container(config.method, resolve=True))


def test_warm_averages_reward_models() -> None:
    models = [[1.0, 2.0], [3.0, 6.0], [2.0, 1.0]]
    assert merged(method("warm"), models).tolist() == [2, 3]
    assert merged(method("warm"), models, START).tolist() == [2, 3]


def test_averaged_heads_give_averaged_rewards() -> None:
    features, heads = [0.5, -2.0, 4.0], [[1.0, 2, 3], [-3.0, 4, 1]]
    rewards = [sum(h * x for h, x in zip(head, features, strict=True)) for head in heads]
    soup = merged(method("warm"), heads).tolist()
    assert sum(h * x for h, x in zip(soup, features, strict=True)) == sum(rewards) / 2


def test_warp_goes_along_the_arc_of_the_changes() -> None:
    policies = [[11.0, 20.0], [10.0, 22.0]]
    result = merged(method("warp_slerp"), policies, START)
    assert result.tolist() == pytest.approx([10 + math.sqrt(0.5), 20 + 2 * math.sqrt(0.5)])
    # Of three, which are 30 degrees apart, each has a third: it is the one in the middle.
    policies = [[math.cos(a), math.sin(a)] for a in map(math.radians, (0, 30, 60))]
    result = merged(method("warp_slerp"), policies, [0.0, 0.0])
    assert result.tolist() == pytest.approx(policies[1])


def test_warp_then_goes_back_towards_the_start() -> None:
    assert merged(method("warp_liti"), [[11.0, 30.0]], START).tolist() == pytest.approx([10.3, 23])
    half = method("warp_liti", "method.t=0.5")
    assert merged(half, [[11.0, 30.0]], START).tolist() == [10.5, 25]


def test_salsa_averages_two_fine_tuned_models() -> None:
    models = [[1.0, 2.0], [3.0, 6.0]]
    assert merged(method("salsa"), models).tolist() == [2, 4]
    uneven = method("salsa", "method.weights=[0.75,0.25]")
    assert merged(uneven, models, START).tolist() == [1.5, 3]
