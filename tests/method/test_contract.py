"""What holds for every method under config/method, whatever its mathematics.

A new YAML is covered without a change here; where it differs from the rest, ``SPECIAL`` in
`fixtures_contract.py` says so.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import examples
from fixtures_contract import (
    LAYOUTS,
    SPECIAL,
    draw,
    family,
    kind,
    method,
    method_class,
    nodes,
    open_pool,
    special,
    takes,
    variants,
    write_family,
)
from fixtures_weights import all_bits, open_directory
from torch import Tensor, nn

import fusion_bench.method
from fusion_bench.method import checks
from fusion_bench.method.checks import (
    BASE,
    Pool,
    as_weights,
    assert_close,
    assert_same,
    chosen,
    entries,
    members,
)
from fusion_bench.modelpool import HFModelPool
from fusion_bench.weights import MergePolicy, write_checkpoint

METHODS = list(nodes())
PLAIN = [name for name in METHODS if kind(name) == "weights"]
RANDOM = [name for name in PLAIN if takes(name, "seed")]
VARIANTS = [variant for name in PLAIN for variant in variants(name)]

every = pytest.mark.parametrize("name", PLAIN)

pytestmark = pytest.mark.exhaustive


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test with other models too, where that is asked for."""
    if examples(1) > 1:
        metafunc.parametrize("drawn", range(examples(1)), indirect=True, scope="module")


@pytest.fixture(autouse=True, scope="module")
def drawn(request: pytest.FixtureRequest) -> Iterator[None]:
    """Draw the models."""
    draw(getattr(request, "param", 0))
    yield
    draw(0)


def fuse(name: str, models: Mapping[str, Any], **options: Any) -> Any:
    """Merge as many of the models, modules or weights, as the method takes."""
    return checks.fuse(method(name, **options), models, special(name))


def agree(name: str) -> Callable[[dict[str, Tensor], dict[str, Tensor]], None]:
    """Return how to compare the results of one computation that was cut in different ways."""
    return assert_same if method(name).elementwise else assert_close


def test_there_are_some() -> None:
    assert len(METHODS) >= 14 and "dare/ties_merging" in METHODS


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_is_is_known(name: str) -> None:
    assert callable(method_class(name).run)
    assert kind(name) is not None, "tell `kind` in fixtures_contract.py what it is"


def test_no_note_is_about_a_method_that_is_not_there() -> None:
    assert {name.split()[0] for name in SPECIAL} <= set(METHODS)
    assert {name for name in SPECIAL if " " in name} <= set(VARIANTS)


def id_of(value: object) -> str | None:
    return value.__name__ if callable(value) else None


@pytest.mark.parametrize("check", checks.MERGING, ids=id_of)
@every
def test_what_holds_for_methods_that_merge(name: str, check: checks.Check) -> None:
    check(method(name), family("net"), special(name))


#: What an option may break though the YAML's own choice does not.
OF_VARIANTS = (
    checks.equal_models,
    checks.unchanged,
    checks.order,
    checks.precision,
    checks.pieces,
    checks.finite,
)


@pytest.mark.parametrize("check", OF_VARIANTS, ids=id_of)
@pytest.mark.parametrize("name", VARIANTS)
def test_what_holds_with_other_options(name: str, check: checks.Check) -> None:
    check(method(name), family("net"), special(name))


@pytest.mark.parametrize("check", [checks.equal_models, checks.form], ids=id_of)
@pytest.mark.parametrize("models", ["clip", "llama"])
@every
def test_what_holds_for_real_models(name: str, models: str, check: checks.Check) -> None:
    check(method(name), family(models), special(name))


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_tells_what_is_drawn(name: str) -> None:
    weights = as_weights(family("net"))
    draws = special(name).draws
    drawn = [entries(fuse(name, weights, seed=seed, **draws)) for seed in range(6)]
    assert_same(entries(fuse(name, weights, seed=3, **draws)), drawn[3])
    assert len({str(all_bits(result)) for result in drawn}) > 1


@pytest.fixture(scope="module")
def checkpoints(
    drawn: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], HFModelPool]:
    """Write the families; return the function that opens as many of one as a method takes.

    Methods that take as many share the pool: to find the files takes longer than to merge.
    """
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def written(models: str, layout: str) -> dict[str, str]:
        return write_family(models, layout, root / models / layout)

    @cache
    def pool(models: str, layout: str, *names: str) -> HFModelPool:
        return open_pool(models, {name: written(models, layout)[name] for name in names})

    def opened(name: str, models: str, layout: str) -> HFModelPool:
        return pool(models, layout, *chosen(written(models, layout), special(name)))

    return opened


@every
@pytest.mark.parametrize("models", ["clip", "llama"])
def test_how_checkpoints_are_cut_into_files_changes_nothing(
    name: str, models: str, checkpoints: Callable[[str, str, str], HFModelPool]
) -> None:
    expected = entries(fuse(name, family(models)))
    for layout in LAYOUTS:
        found = entries(method(name).run(checkpoints(name, models, layout)))
        assert found
        agree(name)(found, {key: expected[key] for key in found})


@every
def test_how_the_merged_model_is_cut_into_files_changes_nothing(name: str, tmp_path: Path) -> None:
    weights = as_weights(family("net"))
    fused = fuse(name, weights)
    expected = entries(fused)
    for size in ("5GB", 300):
        for member, merged in members(fused).items():
            folder = tmp_path / f"{size}{member}"
            folder.mkdir()
            write_checkpoint(merged, folder, max_shard_size=size)
            written = open_directory(folder)
            assert (len(written.files) > 1) == (size == 300)
            found = {f"{member}:{key}": written[key] for key in written}
            agree(name)(found, {key: expected[key] for key in found})


@pytest.mark.parametrize("check", checks.LEARNING, ids=id_of)
@pytest.mark.parametrize("name", [name for name in METHODS if kind(name) == "data"])
def test_what_holds_for_methods_that_learn(name: str, check: checks.Check) -> None:
    check(method(name), family("net"), special(name))


@pytest.mark.parametrize("check", checks.ENSEMBLES, ids=id_of)
@pytest.mark.parametrize("name", [name for name in METHODS if kind(name) == "module"])
def test_what_holds_for_ensembles(name: str, check: checks.Check) -> None:
    check(method(name), family("net"), special(name))


def made(build: Callable[[Any], Any], models: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Merge models by a method that is built from `fusion_bench.method`, if it is there."""
    try:
        merging = build(fusion_bench.method)
    except AttributeError as error:
        if error.obj is not fusion_bench.method:
            raise
        pytest.skip(f"not there yet: {error.name}")
    return entries(merging.run(models))


#: What gives one and the same model, whatever the three models are.
IDENTITIES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "task arithmetic with 1/T is the average": (
        lambda m: m.TaskArithmeticAlgorithm(1 / 3),
        lambda m: m.SimpleAverageAlgorithm(),
    ),
    "equal weights give the average": (
        lambda m: m.WeightedAverageAlgorithm([2, 2, 2]),
        lambda m: m.SimpleAverageAlgorithm(),
    ),
    "constant layer weights give the weighted average": (
        lambda m: m.WeightedAverageAlgorithm([1, 1, 1], layer_weights={"*": [0.5, 0.3, 0.2]}),
        lambda m: m.WeightedAverageAlgorithm([0.5, 0.3, 0.2]),
    ),
    "ExPO of no step is the average": (
        lambda m: m.ExPOAlgorithm(0),
        lambda m: m.SimpleAverageAlgorithm(),
    ),
    "dropping nothing is task arithmetic": (
        lambda m: m.DareTaskArithmetic(0.4, sparsity_ratio=0),
        lambda m: m.TaskArithmeticAlgorithm(0.4),
    ),
    "dropping nothing is the average": (
        lambda m: m.DareSimpleAverage(sparsity_ratio=0),
        lambda m: m.SimpleAverageAlgorithm(),
    ),
    "dropping nothing is TIES": (
        lambda m: m.DareTiesMerging(0, scaling_factor=0.3, threshold=20, merge_func="sum"),
        lambda m: m.TiesMergingAlgorithm(0.3, threshold=20, merge_func="sum"),
    ),
    "DELLA that drops nothing is task arithmetic": (
        lambda m: m.DellaMerging(0.4, density=1, epsilon=0, merge="linear", merge_func="sum"),
        lambda m: m.TaskArithmeticAlgorithm(0.4),
    ),
    "DELLA that drops nothing is TIES that trims nothing": (
        lambda m: m.DellaMerging(0.4, density=1, epsilon=0),
        lambda m: m.TiesMergingAlgorithm(0.4, threshold=100),
    ),
    "all breadcrumbs are task arithmetic": (
        lambda m: m.ModelBreadcrumbs(0.4, density=1, gamma=0),
        lambda m: m.TaskArithmeticAlgorithm(0.4),
    ),
    "consensus of nobody is task arithmetic": (
        lambda m: m.ConsensusTaskArithmetic(0.4, k=0),
        lambda m: m.TaskArithmeticAlgorithm(0.4),
    ),
    "stitching whole task vectors is the average": (
        lambda m: m.LocalizeAndStitch(density=1),
        lambda m: m.SimpleAverageAlgorithm(),
    ),
    "LiNeS that does not grow is a factor": (
        lambda m: m.LiNeSAlgorithm(m.TaskArithmeticAlgorithm(0.4), alpha=0.5, beta=0),
        lambda m: m.TaskArithmeticAlgorithm(0.2),
    ),
    "LiNeS gives task arithmetic the size of the average": (
        lambda m: m.LiNeSAlgorithm(m.TaskArithmeticAlgorithm(0.4), alpha="auto", beta=0),
        lambda m: m.SimpleAverageAlgorithm(),
    ),
    "Iso-CTS without task spaces is Iso-C": (
        lambda m: m.ISO_CTS_Merge(common_space_fraction=1.0),
        lambda m: m.ISO_C_Merge(),
    ),
    "KnOTS that adds is task arithmetic": (
        lambda m: m.KnOTSMerging(m.TaskArithmeticAlgorithm(0.4)),
        lambda m: m.TaskArithmeticAlgorithm(0.4),
    ),
}


@pytest.mark.parametrize("identity", IDENTITIES)
def test_two_methods_are_one(identity: str) -> None:
    left, right = IDENTITIES[identity]
    for models in ("net", "clip"):
        modules = family(models)
        assert_close(made(left, modules), made(right, modules), 1e-6)


#: What makes of the base and one model that model.
ONE: dict[str, Callable[[Any], Any]] = {
    "average": lambda m: m.SimpleAverageAlgorithm(),
    "WiSE-FT": lambda m: m.LinearInterpolationAlgorithm(1),
    "SLERP": lambda m: m.SlerpMergeAlgorithm(1),
    "multi-SLERP": lambda m: m.MultiSlerpAlgorithm(),
    "Karcher mean": lambda m: m.KarcherMeanAlgorithm(),
    "ExPO": lambda m: m.ExPOAlgorithm(0),
    "task arithmetic": lambda m: m.TaskArithmeticAlgorithm(1),
    "TIES": lambda m: m.TiesMergingAlgorithm(1, threshold=100),
    "MagMax": lambda m: m.MagMaxAlgorithm(1),
    "SCE": lambda m: m.SCEAlgorithm(),
    "DARE": lambda m: m.DareTaskArithmetic(1, sparsity_ratio=0),
    "NuSLERP": lambda m: m.NuSlerpAlgorithm(),
    "DELLA": lambda m: m.DellaMerging(1, density=1, epsilon=0),
    "breadcrumbs": lambda m: m.ModelBreadcrumbs(1, density=1, gamma=0),
    "stitching": lambda m: m.LocalizeAndStitch(density=1),
    "TALL masks": lambda m: m.TallMaskTaskArithmeticAlgorithm(),
    "consensus": lambda m: m.ConsensusTaskArithmetic(1, k=1),
    "EMR": lambda m: m.EMRMerging(),
    "OPCM": lambda m: m.OPCM(),
    "WUDI": lambda m: m.WUDIMerging(),
    "WUDI in closed form": lambda m: m.WUDIMerging(solver="lstsq"),
    "LiNeS": lambda m: m.LiNeSAlgorithm(m.TaskArithmeticAlgorithm(1), alpha=1, beta=0),
    "TSV-M": lambda m: m.TaskSingularVectorMerging(),
}
#: What makes of the base and one model the base.
NONE: dict[str, Callable[[Any], Any]] = {
    "WiSE-FT": lambda m: m.LinearInterpolationAlgorithm(0),
    "SLERP": lambda m: m.SlerpMergeAlgorithm(0),
    "ExPO": lambda m: m.ExPOAlgorithm(-1),
    "task arithmetic": lambda m: m.TaskArithmeticAlgorithm(0),
    "TIES": lambda m: m.TiesMergingAlgorithm(0),
    "MagMax": lambda m: m.MagMaxAlgorithm(0),
    "DARE": lambda m: m.DareTaskArithmetic(1, sparsity_ratio=1),
}


@pytest.mark.parametrize(
    ("build", "end"),
    [
        pytest.param(build, end, id=f"{name}-{end}")
        for table, end in ((ONE, "a"), (NONE, BASE))
        for name, build in table.items()
    ],
)
def test_the_ends_of_a_method_are_its_models(build: Callable[[Any], Any], end: str) -> None:
    modules = family("net")
    found = made(build, {BASE: modules[BASE], "a": modules["a"]})
    expected = modules[end].state_dict()
    for name, tensor in found.items():
        key = name.partition(":")[2]
        if tensor.dtype.is_floating_point:
            torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-6)


@every
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_gives_about_the_same(name: str) -> None:
    weights = chosen(as_weights(family("clip")), special(name))
    here = entries(method(name).run(Pool(weights)))
    there = entries(method(name).run(Pool(weights, MergePolicy(device="cuda"))))
    assert_close(there, here, 1e-4)
