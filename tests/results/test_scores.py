from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pyarrow import parquet

from fusion_bench.results import (
    ACCURACY,
    LOSS,
    METRICS,
    Metric,
    SampleScores,
    array_texts,
    text_array,
    with_ones,
)
from fusion_bench.results.metrics import mean
from fusion_bench.results.scores import compact


def classified(size: int = 6) -> SampleScores:
    labels = np.arange(size) % 3
    predictions = np.arange(size) % 2
    losses = np.linspace(0.1, 2, size)
    return SampleScores.classified(np.arange(size) * 2, labels, predictions, losses)


class TestChecks:
    @pytest.mark.parametrize("samples", [[3, 3], [[1, 2]]])
    def test_samples(self, samples):
        with pytest.raises(ValueError, match="not a list of different numbers"):
            SampleScores(np.array(samples), {})

    @pytest.mark.parametrize("rows", [np.ones(2), np.ones((3, 2)), np.ones((2, 2, 2))])
    def test_statistics(self, rows):
        with pytest.raises(ValueError, match="'f1' does not have a row per sample"):
            SampleScores(np.arange(2), {"f1": rows})

    @pytest.mark.parametrize("entries", [np.ones(3), np.array(1.0)])
    def test_details(self, entries):
        with pytest.raises(ValueError, match="'labels' does not have an entry per sample"):
            SampleScores(np.arange(2), {}, {"labels": entries})

    def test_clusters(self):
        with pytest.raises(ValueError, match="'clusters' does not have an entry per sample"):
            SampleScores(np.arange(2), {}, clusters=np.arange(3))

    def test_details_may_have_more_dimensions(self):
        assert SampleScores(np.arange(2), {}, {"points": np.ones((2, 3, 4))}).num_samples == 2


def test_classified():
    scores = classified()
    assert scores.num_samples == 6
    assert scores.value(ACCURACY) == 1 / 3  # 0 and 1 of the six
    assert scores.value(LOSS) == pytest.approx(np.linspace(0.1, 2, 6).mean())
    assert list(scores.totals(ACCURACY)) == [2, 6]
    assert {a.dtype.name for a in (scores.samples, *scores.details.values())} == {"int64"}
    without = SampleScores.classified(np.arange(2), np.arange(2), np.arange(2))
    assert without.has(ACCURACY)
    assert not without.has(LOSS)


def test_recomputed_values_need_no_statistics():
    details = {"labels": np.array([0, 1, 1]), "predictions": np.array([0.1, 0.2, 0.3])}
    scores = SampleScores(np.arange(3), {}, details)
    assert scores.has(METRICS["auc"])
    assert scores.value(METRICS["auc"]) == 1


def test_at():
    clusters = np.arange(6) // 2
    scores = SampleScores(np.arange(6), {"loss": with_ones(np.arange(6))}, clusters=clusters)
    scores = scores.at(np.array([True, False, False, False, True, True]))
    assert list(scores.samples) == [0, 4, 5]
    assert scores.value(LOSS) == 3
    assert list(scores.clusters) == [0, 2, 2]
    some = classified().at(np.arange(6) >= 4)
    assert list(some.details["labels"]) == [1, 2]
    assert some.clusters is None


class TestMeasured:
    def test_it_adds_statistics(self):
        def measure(details):
            return with_ones(details["labels"] == details["predictions"])

        mine = Metric("mine", "%", True, value=mean, measure=measure)
        scores = classified()
        found = scores.measured([ACCURACY, mine])
        assert found.value(mine) == scores.value(ACCURACY)
        assert found.statistics["loss"] is scores.statistics["loss"]
        assert not scores.has(mine)

    def test_whole_numbers_become_floats(self):
        mine = Metric("mine", "", True, value=mean, measure=lambda details: [[1, 1]] * 6)
        assert classified().measured([mine]).statistics["mine"].dtype == np.float64

    def test_a_missing_detail_is_named(self):
        mine = Metric("mine", "", True, value=mean, measure=lambda details: details["depth"])
        with pytest.raises(ValueError, match="'mine' needs 'depth' of each sample"):
            classified().measured([mine])

    @pytest.mark.parametrize("shape", [(6,), (5, 2), ()])
    def test_it_needs_a_row_per_sample(self, shape):
        mine = Metric("mine", "", True, value=mean, measure=lambda details: np.ones(shape))
        with pytest.raises(ValueError, match="'mine' does not have a row per sample"):
            classified().measured([mine])


@st.composite
def any_scores(draw):
    size = draw(st.integers(0, 6))
    numbers = st.integers(0, 2**40)
    samples = sorted(draw(st.sets(numbers, min_size=size, max_size=size)))
    names = st.sampled_from(["accuracy", "within_11.25", "loss", "é/ü"])
    floats = st.floats(allow_nan=True, allow_infinity=True)
    rows = st.integers(1, 4).flatmap(lambda m: arrays(np.float64, (size, m), elements=floats))
    shapes = st.lists(st.integers(0, 2), max_size=2)
    detail = st.sampled_from([np.int64, np.float32, np.float64]).flatmap(
        lambda dtype: shapes.flatmap(lambda shape: arrays(dtype, (size, *shape)))
    )
    clusters = draw(st.none() | arrays(np.int64, size, elements=numbers))
    return SampleScores(
        np.array(samples, dtype=np.int64),
        draw(st.dictionaries(names, rows)),
        draw(st.dictionaries(names, detail)),
        clusters,
    )


@given(any_scores())
def test_arrays_and_back(scores):
    """All values stay; whole numbers come back as int64, floats with their values."""
    back = SampleScores.from_arrays(scores.arrays())
    same(back.samples, scores.samples)
    for name in ("statistics", "details"):
        one, other = getattr(back, name), getattr(scores, name)
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    assert (back.clusters is None) == (scores.clusters is None)
    if scores.clusters is not None:
        same(back.clusters, scores.clusters)
    assert all(rows.dtype == np.float64 for rows in back.statistics.values())
    for array in (back.samples, *back.details.values()):
        assert array.dtype.kind == "f" or array.dtype == np.int64


def same(one, other):
    assert one.shape == other.shape
    assert np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def test_arrays_are_small():
    found = {name: array.dtype.name for name, array in classified().arrays().items()}
    assert found == {
        ("samples",): "uint8",
        ("statistics", "accuracy"): "uint8",
        ("statistics", "loss"): "float64",
        ("details", "labels"): "uint8",
        ("details", "predictions"): "uint8",
    }


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 255], "uint8"),
        ([0, 256], "int32"),
        ([-1], "int32"),
        ([0.5], "float32"),
        ([0.1], "float64"),
        ([np.nan], "float32"),
        ([1e300], "float64"),
    ],
)
def test_compact(values, dtype):
    array = np.array(values)
    found = compact(array, (np.uint8, np.int32, np.float32))
    assert found.dtype == dtype
    same(found.astype(array.dtype), array)


def test_large_whole_numbers_stay():
    assert compact(np.array([2**53 + 1]), (np.uint8, np.int32)).dtype == np.int64


def test_samples_in_a_file_must_be_whole_numbers():
    content = {**classified().arrays(), ("samples",): np.linspace(0, 1, 6)}
    with pytest.raises(ValueError, match="not whole numbers"):
        SampleScores.from_arrays(content)
    with pytest.raises(LookupError):
        SampleScores.from_arrays({})


def columns(scores: SampleScores) -> dict[str, list]:
    return parquet.read_table(BytesIO(scores.parquet())).to_pydict()


class TestParquet:
    def test_classifier(self):
        found = columns(classified())
        assert list(found) == ["sample", "label", "prediction", "accuracy", "loss"]
        assert found["sample"] == [0, 2, 4, 6, 8, 10]
        assert found["accuracy"] == [1, 1, 0, 0, 0, 0]

    def test_sums_and_clusters(self):
        rows = {"perplexity": np.array([[1.5, 3], [2, 4]]), "f1": np.eye(3)[:2]}
        found = columns(SampleScores(np.arange(2), rows, clusters=np.array([7, 7])))
        assert found == {
            "sample": [0, 1],
            "cluster": [7, 7],
            "perplexity.0": [1.5, 2],
            "perplexity.1": [3, 4],
            "f1.0": [1, 0],
            "f1.1": [0, 1],
            "f1.2": [0, 0],
        }


class TestJoined:
    def test_rows_are_in_the_samples_order(self):
        whole = classified(8)
        even = np.arange(8) % 2 == 0
        joined = whole.at(~even).joined(whole.at(even))
        assert joined.samples.tolist() == whole.samples.tolist()
        for name, own in whole.statistics.items():
            np.testing.assert_array_equal(joined.statistics[name], own)
        for name, own in whole.details.items():
            np.testing.assert_array_equal(joined.details[name], own)

    def test_texts_of_other_lengths_and_documents(self):
        def written(sample, text):
            rows, texts = np.ones((1, 2)), text_array([text])
            return SampleScores(
                np.array([sample]), {"f": rows}, {"answers": texts}, np.array([sample // 2])
            )

        joined = written(3, "longer").joined(written(1, "é"))
        assert array_texts(joined.details["answers"]) == ["é", "longer"]
        assert joined.clusters is not None and joined.clusters.tolist() == [0, 1]

    def test_scores_that_do_not_fit(self):
        whole = classified()
        with pytest.raises(ValueError, match="not a list of different numbers"):
            whole.joined(whole)
        with pytest.raises(ValueError, match="other statistics"):
            whole.joined(SampleScores(np.array([99]), {}, whole.at(whole.samples == 0).details))
        with pytest.raises(ValueError, match="other details"):
            one = whole.at(whole.samples == 0)
            whole.joined(SampleScores(np.array([99]), one.statistics))
