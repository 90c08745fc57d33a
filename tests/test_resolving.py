"""Texts with dollar signs in configs that are written and read again."""

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


def test_plain_data_is_not_resolved() -> None:
    node = {"_target_": "fusion_bench.modelpool.CausalLMPool", "models": {"a": "x/${oc.env:HOME}"}}
    pool = instantiate({**node, "_recursive_": False, "chat_template": "${x}{{ messages }}"})
    assert pool.model_names == ["a"]
    assert instantiate({"a": "${x}"}) == {"a": "${x}"}
