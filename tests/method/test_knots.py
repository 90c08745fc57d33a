from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from fixtures_method import merged
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

from fusion_bench.configs import register
from fusion_bench.instantiate import instantiate
from fusion_bench.method import (
    DareTiesMerging,
    EMRMerging,
    GreedySoupAlgorithm,
    KnOTSMerging,
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
    knots,
)
from fusion_bench.problems import FusionBenchError
from fusion_bench.weights import MergePolicy, TensorWeights, Weights, entries, in_memory

CONFIG = Path(__file__).parents[2] / "config"
BASE = "_pretrained_"
SPECS: dict[str, tuple[int, ...]] = {
    "bias": (5,),
    "long.weight": (4, 9),
    "scale": (),
    "tall.weight": (11, 3),
    "wide.weight": (6, 4),
}
State = dict[str, Tensor]


class Pool:
    """Tensors as a model pool."""

    vocabulary = None

    def __init__(self, models: Mapping[str, State], policy: MergePolicy | None = None):
        self._models = models
        self.policy = policy or MergePolicy()
        self.model_names = [name for name in models if name != BASE]
        self.has_pretrained = BASE in models

    def weights(self, name: str) -> Weights:
        return TensorWeights(self._models[name])


def family(models: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, State]:
    generator = torch.Generator().manual_seed(seed)
    names = [BASE, *"abcdefg"[:models]]
    return {
        name: {
            key: torch.randn(shape, generator=generator, dtype=dtype)
            for key, shape in SPECS.items()
        }
        for name in names
    }


def fused(method: Any, models: Mapping[str, State], **policy: Any) -> State:
    return in_memory(method.run(Pool(models, MergePolicy(**policy))))


def assert_close(found: State, expected: Mapping[str, Any], atol: float = 3e-6) -> None:
    for key, tensor in found.items():
        np.testing.assert_allclose(
            tensor.double().numpy(), np.asarray(expected[key], np.float64), atol=atol
        )


def by_formula(models: Mapping[str, State], method: Any) -> dict[str, Any]:
    """Align with numpy's SVD, merge the aligned task vectors as models, and turn back."""
    base, names = models[BASE], [name for name in models if name != BASE]
    aligned: dict[str, State] = {name: {} for name in models}
    directions = {}
    for key, start in base.items():
        vectors = [(models[name][key] - start).double().numpy() for name in names]
        if start.ndim == 2:
            u, s, _ = np.linalg.svd(np.hstack(vectors), full_matrices=False)
            directions[key] = u = u[:, s > 1e-5 * s[0]]
            vectors = [u.T @ vector for vector in vectors]
        for name, vector in zip(names, vectors, strict=True):
            aligned[name][key] = torch.tensor(vector)
        aligned[BASE][key] = torch.zeros_like(aligned[names[0]][key])
    result: dict[str, Any] = {}
    for key, tensor in in_memory(method.run(Pool(aligned))).items():
        change = tensor.numpy()
        turned = directions[key] @ change if key in directions else change
        result[key] = base[key].double().numpy() + turned
    return result


@settings(deadline=None, max_examples=examples(25))
@given(models=st.integers(1, 4), seed=st.integers(0, 2**20), percent=st.integers(5, 100))
def test_ties_trims_the_aligned_model_as_a_whole(models: int, seed: int, percent: int) -> None:
    tasks = family(models, seed, torch.float64)
    ties = TiesMergingAlgorithm(threshold=percent)
    assert_close(fused(KnOTSMerging(ties), tasks), by_formula(tasks, ties))


@pytest.mark.parametrize("method", [TiesMergingAlgorithm(threshold=40), DareTiesMerging()])
@pytest.mark.parametrize("models", [1, 3, 4])
def test_large_tall_matrices_are_merged_in_rows(
    models: int, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "LARGE", 30)
    monkeypatch.setattr(knots, "_AT_ONCE", 2)
    tasks = family(models, 3, torch.float64)
    cut = KnOTSMerging(method).inputs(Pool(tasks)).cut
    assert cut("tall.weight") == "rows" and cut("wide.weight") == "whole"
    assert_close(fused(KnOTSMerging(method), tasks), by_formula(tasks, method))
    single = {name: {key: w.float() for key, w in state.items()} for name, state in tasks.items()}
    assert_close(fused(KnOTSMerging(method), single), by_formula(single, method), 3e-5)


def test_rows_of_several_pieces_and_fewer_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "LARGE", 2**18)
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(6000, 64, generator=generator)}
    change = torch.randn(6000, 5, generator=generator) @ torch.randn(5, 64, generator=generator)
    tasks = {BASE: base, **{name: {"w": base["w"] + n * change} for n, name in enumerate("ab", 1)}}
    method = TiesMergingAlgorithm(threshold=30)
    assert_close(fused(KnOTSMerging(method), tasks), by_formula(tasks, method), 1e-4)


def test_smaller_directions_than_products_resolve_need_the_whole_matrix() -> None:
    shape = (2**18, 64)
    assert KnOTSMerging().cut("w", shape) == "rows"
    assert KnOTSMerging(rank_tol=1e-7).cut("w", shape) == "whole"
    assert KnOTSMerging(exclude_keys=["w"]).cut("w", shape) == "whole"


def test_ties_is_the_default() -> None:
    tasks = family(3)
    assert_close(fused(KnOTSMerging(), tasks), fused(KnOTSMerging(TiesMergingAlgorithm()), tasks))


@pytest.mark.parametrize("models", [1, 2, 4])
def test_task_arithmetic_is_task_arithmetic(models: int) -> None:
    tasks, method = family(models), TaskArithmeticAlgorithm(0.3)
    assert_close(fused(KnOTSMerging(method), tasks), fused(method, tasks))


def test_an_average_is_an_average() -> None:
    tasks, method = family(3), SimpleAverageAlgorithm()
    assert_close(fused(KnOTSMerging(method), tasks), fused(method, tasks))


def test_a_single_model_that_is_not_trimmed_stays_as_it_is() -> None:
    tasks = family(1)
    assert_close(fused(KnOTSMerging(TiesMergingAlgorithm(threshold=100)), tasks), tasks["a"])


def test_by_hand() -> None:
    # Both models changed along one direction, so that two elements of each are left to merge.
    one, other = [[3.0, 1.0], [3.0, 1.0]], [[1.0, -2.0], [1.0, -2.0]]
    method = KnOTSMerging(TiesMergingAlgorithm(threshold=50))
    result = merged(method, [one, other], [[0.0, 0], [0, 0]])
    np.testing.assert_allclose(result.numpy(), [[3, -2], [3, -2]], atol=1e-6)


def test_the_scaling_factor_is_one_more() -> None:
    tasks = family(3)
    found = fused(KnOTSMerging(TaskArithmeticAlgorithm(0.3), 2), tasks)
    assert_close(found, fused(TaskArithmeticAlgorithm(0.6), tasks), atol=1e-5)


def test_excluded_matrices_are_merged_as_they_are() -> None:
    tasks, ties = family(3), TiesMergingAlgorithm(threshold=30)
    assert_close(fused(KnOTSMerging(ties, exclude_keys=["*"]), tasks), fused(ties, tasks))


def test_equal_to_the_base_is_exactly_the_base() -> None:
    base = family(1)[BASE]
    tasks = {BASE: base, "a": base, "b": {key: tensor.clone() for key, tensor in base.items()}}
    found = fused(KnOTSMerging(), tasks)
    assert all(torch.equal(found[key], base[key]) for key in SPECS)


def test_a_task_that_changes_nothing_does_no_harm() -> None:
    tasks = family(2)
    tasks["b"] = tasks[BASE]
    tasks["a"]["tall.weight"] = tasks[BASE]["tall.weight"]
    found = fused(KnOTSMerging(TiesMergingAlgorithm(threshold=100)), tasks)
    assert_close(found, tasks["a"])


def test_what_is_left_of_zero_is_left_out() -> None:
    column, row = torch.tensor([[1.0], [2], [2]]), torch.tensor([[3.0, 4, 1e-9, 1]])
    tasks = {BASE: {"w": torch.zeros(3, 4)}, "a": {"w": column @ row}}
    # Half of what is left: two of four elements, not six of twelve.
    found = fused(KnOTSMerging(TiesMergingAlgorithm(threshold=50)), tasks)
    assert_close(found, {"w": column @ torch.tensor([[3.0, 4, 0, 0]])})


def test_other_entries_and_types() -> None:
    tasks = family(2, dtype=torch.bfloat16)
    for number, state in enumerate(tasks.values()):
        state["ids"] = torch.tensor([[number, 2], [3, 4]])
        state["empty"] = torch.zeros(0, 3)
        state["double"] = torch.full((2, 2), number / 3, dtype=torch.float64)
        state["tied.weight"] = state["long.weight"]
    found = fused(KnOTSMerging(TaskArithmeticAlgorithm(0.5)), tasks)
    assert {key: tensor.dtype for key, tensor in found.items()} == {
        key: tensor.dtype for key, tensor in tasks[BASE].items()
    }
    assert torch.equal(found["ids"], tasks[BASE]["ids"])
    assert found["tied.weight"] is found["long.weight"]
    np.testing.assert_allclose(found["double"].numpy(), 0.5, atol=1e-12)


def test_each_entry_is_factorised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = knots.column_space

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(knots, "column_space", counted)
    fused(KnOTSMerging(), family(3))
    assert len(calls) == 3


def test_a_method_that_makes_several_models() -> None:
    found: Any = KnOTSMerging(EMRMerging()).run(Pool(family(2)))
    assert len(found) > 1
    assert all(in_memory(weights).keys() == SPECS.keys() for weights in found.values())


def test_random_draws_repeat() -> None:
    tasks = family(2)
    one, again, other = (fused(KnOTSMerging(DareTiesMerging(seed=s)), tasks) for s in (1, 1, 2))
    assert all(torch.equal(one[key], again[key]) for key in SPECS)
    assert not torch.equal(one["long.weight"], other["long.weight"])


def test_nan_in_a_model_is_named() -> None:
    tasks = family(2)
    tasks["b"]["wide.weight"][0, 0] = torch.nan
    with pytest.raises(FusionBenchError, match=r"b: 'wide\.weight'"):
        fused(KnOTSMerging(), tasks)
    found = fused(KnOTSMerging(), tasks, on_nonfinite="warn")
    assert found["long.weight"].isfinite().all()


def test_vocabularies_of_two_sizes() -> None:
    base, model = torch.zeros(4, 2), torch.tensor([[1.0, 2], [3, 4], [5, 7]])
    pool = Pool({BASE: {"e": base}, "a": {"e": model}}, MergePolicy(on_vocabulary="common"))
    pool.vocabulary = 4  # type: ignore[assignment]
    found: Any = KnOTSMerging(TaskArithmeticAlgorithm(1)).run(pool)
    np.testing.assert_allclose(found["e"].numpy(), [*model.tolist(), [0, 0]], atol=1e-6)


@pytest.mark.parametrize(
    ("override", "base_method"),
    [(None, TiesMergingAlgorithm), ("dare/ties_merging", DareTiesMerging)],
)
def test_the_base_method_is_chosen_by_its_config(override: str | None, base_method: type) -> None:
    overrides = ["method=knots/knots", "method.rank_tol=0.001"]
    if override is not None:
        overrides.append(f"method@method.base_method={override}")
    register()
    with initialize_config_dir(str(CONFIG), version_base="1.3"):
        config = compose("fabric_model_fusion", overrides=overrides)
    method = instantiate(OmegaConf.to_container(config.method, resolve=True), "method")
    assert isinstance(method.base_method, base_method) and method.rank_tol == 0.001


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"rank_tol: 2 is not"):
        KnOTSMerging(rank_tol=2)
    for method in (GreedySoupAlgorithm(), torch.nn.Identity()):
        with pytest.raises(FusionBenchError, match=r"base_method: .*Choose another"):
            KnOTSMerging(method)
