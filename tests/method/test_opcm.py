import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from drawn import examples
from fixtures_method import merged
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.method import OPCM, OPCMForCLIP, opcm
from fusion_bench.problems import FusionBenchError

Array = NDArray[np.float64]
SHAPES = {
    "a.weight": (4, 3),
    "a.bias": (4,),
    "embed.weight": (5, 3),
    "scale": (),
    "b.weight": (3, 5),
}


class Model(nn.Module):
    def __init__(self, entries: dict[str, Array]):
        super().__init__()
        self.entries = {key: torch.tensor(value) for key, value in entries.items()}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {**self.entries, "count": torch.tensor(3)}


def draw(count: int, seed: int) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{key: np.array(rng.normal(size=s)) for key, s in SHAPES.items()} for _ in range(count)]


def run(method: OPCM, models: Mapping[str, nn.Module]) -> Any:
    return method.run(models)


def pool(models: Sequence[dict[str, Array]]) -> dict[str, nn.Module]:
    names = ["_pretrained_", *(f"m{number}" for number in range(1, len(models)))]
    return {name: Model(entries) for name, entries in zip(names, models, strict=True)}


def norm(entries: dict[str, Array]) -> float:
    return math.sqrt(sum(float((value**2).sum()) for value in entries.values()))


def changed(model: Any, base: dict[str, Array]) -> dict[str, Array]:
    return {key: np.asarray(model[key]) - base[key] for key in base}


def reference(models: Sequence[dict[str, Array]], alpha: float, rho: str) -> list[dict[str, Array]]:
    """Return the merged model's change after each step, as the paper's algorithm goes."""
    base, *rest = models
    taus = [changed(model, base) for model in rest]
    delta, factor = taus[0], 1.0
    steps = [delta]
    for step, tau in enumerate(taus[1:], 2):
        new = {}
        for key in base:
            clean = tau[key]
            if key in ("a.weight", "b.weight"):
                u, s, vh = np.linalg.svd(delta[key])
                shares = np.cumsum(s) / s.sum()
                if rho == "paper":
                    closed = next(n for n in range(len(s) + 1) if n and shares[n - 1] >= alpha)
                else:
                    closed = int(np.argmax(shares > alpha))
                p = u.T @ clean @ vh.T
                np.fill_diagonal(p, 0)
                p[:closed, :closed] = 0
                clean = u @ p @ vh
            new[key] = factor * delta[key] + clean
        mean = sum(norm(tau) for tau in taus[:step]) / step
        factor = norm(new) / mean
        delta = {key: value / factor for key, value in new.items()}
        steps.append(delta)
    return steps


@settings(deadline=None, max_examples=examples(30))
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 5),
    alpha=st.floats(0.05, 0.98),
    rho=st.sampled_from(["paper", "fusionbench"]),
)
def test_each_step_is_the_paper_s(seed: int, count: int, alpha: float, rho: Any) -> None:
    models = draw(count + 1, seed)
    family = run(OPCM(alpha=alpha, rho=rho, evaluate_on_every_step=True), pool(models))
    expected = reference(models, alpha, rho)
    assert list(family) == [f"step{n}_m{n}" for n in range(1, count + 1)]
    for step, model in enumerate(family.values()):
        for key, value in changed(model, models[0]).items():
            np.testing.assert_allclose(value, expected[step][key], rtol=1e-7, atol=1e-9)
    last = run(OPCM(alpha=alpha, rho=rho), pool(models))
    assert all(torch.equal(last[key], model[key]) for key in last)
    assert last["count"] == 3


def test_the_change_has_the_mean_norm_of_the_changes() -> None:
    models = draw(6, 1)
    family = run(OPCM(save_on_every_step=True), pool(models))
    norms = [norm(changed(model, models[0])) for model in models[1:]]
    for step, model in enumerate(family.values(), 1):
        expected = sum(norms[:step]) / step
        assert norm(changed(model, models[0])) == pytest.approx(expected)


DIAGONAL = np.diag([6.0, 3, 1]).tolist()
ONES = [[1.0] * 3] * 3
ZERO = [[0.0] * 3] * 3


def direction(tensor: Tensor) -> list[list[float]]:
    return (tensor / tensor[0, 0] * 6).round(decimals=5).tolist()


@pytest.mark.parametrize(
    ("rho", "alpha", "expected"),
    [
        ("paper", 0, [[6, 1, 1], [1, 3, 1], [1, 1, 1]]),
        ("paper", 0.5, [[6, 1, 1], [1, 3, 1], [1, 1, 1]]),
        ("paper", 0.7, [[6, 0, 1], [0, 3, 1], [1, 1, 1]]),
        ("paper", 1, [[6, 0, 0], [0, 3, 0], [0, 0, 1]]),
        ("fusionbench", 0.7, [[6, 1, 1], [1, 3, 1], [1, 1, 1]]),
        ("fusionbench", 0.95, [[6, 0, 1], [0, 3, 1], [1, 1, 1]]),
        ("fusionbench", 1, [[6, 1, 1], [1, 3, 1], [1, 1, 1]]),
    ],
)
def test_what_is_closed_by_hand(rho: Any, alpha: float, expected: list[list[float]]) -> None:
    method = OPCM(alpha=alpha, rho=rho)
    result = merged(method, [DIAGONAL, ONES], ZERO)
    assert direction(result) == expected
    mean = (math.sqrt(46) + 3) / 2
    assert float(result.norm()) == pytest.approx(mean, rel=1e-6)


def test_what_is_taken_lies_along_the_directions_so_far() -> None:
    torch.manual_seed(0)
    merged_so_far, vector = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    u, s, vh = torch.linalg.svd(merged_so_far)
    p = u.T @ OPCM(alpha=0.6).clean(vector, merged_so_far) @ vh.T
    closed = int((s.cumsum(0) / s.sum() < 0.6).sum()) + 1
    assert closed > 1
    torch.testing.assert_close(p.diagonal(), torch.zeros(4).double())
    torch.testing.assert_close(p[:closed, :closed], torch.zeros(closed, closed).double())
    whole = u.T @ vector @ vh.T
    torch.testing.assert_close(p[closed:, 0], whole[closed:, 0])


def test_the_same_model_again_changes_nothing() -> None:
    model = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    result = merged(OPCM(), [model.tolist()] * 3, [[0.0] * 4] * 3)
    torch.testing.assert_close(result, model)


def test_what_was_not_touched_so_far_is_open() -> None:
    first = torch.diag(torch.tensor([2.0, 0, 0]))
    second = torch.diag(torch.tensor([0.0, 2, 2]))
    result = merged(OPCM(alpha=1), [first.tolist(), second.tolist()], ZERO)
    assert direction(result * 3) == (torch.diag(torch.tensor([6.0, 6, 6]))).tolist()
    result = merged(OPCM(), [ZERO, second.tolist()], ZERO)
    torch.testing.assert_close(result, second / 2)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (3, 0), (2, 2, 2)])
def test_no_change_at_all_gives_the_pretrained_model(shape: tuple[int, ...]) -> None:
    base = torch.randn(shape)
    assert merged(OPCM(), [base.tolist()] * 3, base.tolist()).equal(base)


def test_one_model_stays_itself() -> None:
    model = torch.randn(3, 4)
    assert merged(OPCM(), [model.tolist()], [[0.0] * 4] * 3).equal(model)


def test_counters_alone_are_copied() -> None:
    models: list[dict[str, Array]] = [{}, {}]
    assert run(OPCM(), pool(models))["count"] == 3


def test_the_order_comes_from_the_seed() -> None:
    models = draw(6, 2)

    def steps(seed: int | None) -> list[str]:
        method = OPCM(shuffle_order=True, seed=seed, evaluate_on_every_step=True)
        return [name.split("_")[1] for name in run(method, pool(models))]

    assert steps(1) == steps(1)
    assert sorted(steps(1)) == [f"m{n}" for n in range(1, 6)]
    assert len({tuple(steps(seed)) for seed in range(6)}) > 3
    shuffled = run(OPCM(shuffle_order=True, seed=1), pool(models))
    named = pool(models)
    ordered = run(OPCM(), {"_pretrained_": named["_pretrained_"]} | {n: named[n] for n in steps(1)})
    assert all(torch.equal(shuffled[key], ordered[key]) for key in ordered)


@pytest.mark.parametrize("every", [False, True])
def test_each_sum_is_factorised_once(every: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    find = opcm.right_vectors

    def counted(matrix: Tensor) -> Any:
        calls.append(matrix)
        return find(matrix)

    monkeypatch.setattr(opcm, "right_vectors", counted)
    made = run(OPCM(evaluate_on_every_step=every), pool(draw(6, 3)))
    assert len(calls) == 2 * 4
    assert len(made) == 5 or not every


def test_nan_is_named() -> None:
    bad = [[math.nan] * 3] * 3
    for models in ([DIAGONAL, bad, ONES], [bad, ONES]):
        with pytest.raises(FusionBenchError, match=r"'weight'"):
            merged(OPCM(), models, ZERO)


def test_the_name_for_clip_is_the_same() -> None:
    assert OPCMForCLIP is OPCM


def test_bad_arguments() -> None:
    with pytest.raises(FusionBenchError, match=r"alpha"):
        OPCM(alpha=1.5)
    with pytest.raises(FusionBenchError, match=r"rho.*Did you mean 'paper'"):
        OPCM(rho="papr")  # type: ignore[arg-type]
