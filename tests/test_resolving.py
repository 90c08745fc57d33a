"""Texts with dollar signs in configs that are written and read again."""

import json

from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fusion_bench.instantiate import instantiate
from fusion_bench.resolving import to_container, yaml_of

TEXTS = st.text(st.sampled_from("\\${}ab:'\" \n,"), max_size=12)


@given(st.recursive(TEXTS, lambda inner: st.lists(inner) | st.dictionaries(st.just("k"), inner)))
def test_what_is_written_resolves_to_the_same(value: object) -> None:
    config = {"a": value}
    assert to_container(OmegaConf.create(yaml_of(config))) == config


@given(
    st.recursive(
        TEXTS | st.text() | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["k", "1", "no"]), inner),
    )
)
def test_configs_are_written_as_omegaconf_writes_them(value: object) -> None:
    escaped = json.loads(json.dumps({"a": value}).replace("$", ""))
    assert yaml_of(escaped) == OmegaConf.to_yaml(escaped)


def test_plain_data_is_not_resolved() -> None:
    node = {"_target_": "fusion_bench.modelpool.CausalLMPool", "models": {"a": "x/${oc.env:HOME}"}}
    pool = instantiate({**node, "_recursive_": False, "chat_template": "${x}{{ messages }}"})
    assert pool.model_names == ["a"]
    assert instantiate({"a": "${x}"}) == {"a": "${x}"}
