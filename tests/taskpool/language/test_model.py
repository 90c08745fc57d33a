"""The model's answers against one request at a time in float64, and what is kept of them."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from fixtures_language import (
    BOS,
    CPU,
    LENGTH,
    asked,
    counting,
    greedy,
    letters,
    reference,
    tiny,
)
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric import Fabric
from tokenizers import normalizers
from torch import nn

from fusion_bench.method.ensemble import ensemble_of
from fusion_bench.problems import EnvironmentProblem, FusionBenchError
from fusion_bench.programs.environment import launch
from fusion_bench.results import requests as stored
from fusion_bench.taskpool.language.model import windows
from fusion_bench.taskpool.language.requests import Generation, Likelihood

KINDS = ("Llama", "Mistral", "GPT2", "Bloom", "T5")


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {kind: tiny(kind) for kind in KINDS}


def questions(count: int = 12, longest: int = 30) -> list[Likelihood]:
    """Return questions with four answers each, some of one token."""
    drawn = random.Random(0)

    def text(least: int, most: int) -> tuple[int, ...]:
        return tuple(drawn.randrange(40, 120) for _ in range(drawn.randint(least, most)))

    contexts = [text(3, longest) for _ in range(count)]
    return [
        Likelihood(context, text(1, 1 if i % 3 == 0 else 7))
        for i, context in enumerate(contexts)
        for _ in range(4)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_are_those_of_each_request_alone(
    models: dict[str, nn.Module], kind: str
) -> None:
    requests = questions()
    found = asked(models[kind], batch_size=5).log_likelihoods(requests)
    expected = [reference(models[kind], own) for own in requests]
    np.testing.assert_allclose(found[0], [value for value, _ in expected], rtol=1e-5, atol=1e-4)
    assert found[1].tolist() == [likeliest for _, likeliest in expected]


@pytest.mark.parametrize("kind", ("Llama", "T5"))
def test_the_batch_size_does_not_matter(models: dict[str, nn.Module], kind: str) -> None:
    requests = questions()
    one, many = (asked(models[kind], batch_size=n).log_likelihoods(requests) for n in (1, 32))
    np.testing.assert_allclose(one[0], many[0], rtol=1e-6, atol=1e-5)
    assert (one[1] == many[1]).all()


def test_a_context_is_read_once_for_all_its_answers(models: dict[str, nn.Module]) -> None:
    read: list[int] = []
    module = models["Llama"]

    def note(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        read.append(kwargs["input_ids"].numel())

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    context = tuple(range(40, 60))
    requests = [Likelihood(context, (60, i, 70)) for i in range(80, 84)]
    asked(module, batch_size=1).log_likelihoods(requests)
    handle.remove()
    together, *compared = read
    assert together == 20 + 4 * 2  # the context, and all but the last token of each answer
    assert sum(compared) == 4 * 22  # once a model: that it reads them so as one by one


def test_what_cannot_branch_is_read_one_by_one(
    models: dict[str, nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    """A model that looks at neighbours by their place in the row, whatever the mask says."""

    class Neighbours(nn.Module):
        config = models["Llama"].config

        def __init__(self) -> None:
            super().__init__()
            self.inner = models["Llama"]

        def forward(
            self, input_ids: torch.Tensor, attention_mask: Any = None, position_ids: Any = None
        ) -> torch.Tensor:
            logits: torch.Tensor = self.inner(input_ids=input_ids).logits
            return logits

    requests = questions(4)
    found, _ = asked(Neighbours()).log_likelihoods(requests)
    expected = [reference(models["Llama"], own)[0] for own in requests]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert "one by one" in caplog.text


def test_long_contexts_lose_their_beginnings_and_that_is_told(
    models: dict[str, nn.Module],
) -> None:
    long = Likelihood(tuple(range(40, 40 + 60)), tuple(range(60, 70)))
    short = Likelihood((50, 51), (52,))
    model = asked(models["Llama"])
    found, _ = model.log_likelihoods([short, long])
    cut = Likelihood(long.context[-(LENGTH + 1 - 10) :], long.continuation)
    assert found[1] == pytest.approx(reference(models["Llama"], cut)[0], abs=1e-4)
    assert model.truncated == {1}
    assert model.overlong == set()


def test_an_overlong_continuation_is_read_in_parts(models: dict[str, nn.Module]) -> None:
    own = Likelihood((50, 51), tuple(40 + i % 60 for i in range(100)))
    model = asked(models["Llama"])
    found, _ = model.log_likelihoods([own])
    parts = windows(own.context + own.continuation, 2, LENGTH, LENGTH)
    expected = sum(reference(models["Llama"], part)[0] for part in parts)
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert model.overlong == {0}


@given(
    length=st.integers(2, 60),
    first=st.integers(1, 4),
    longest=st.integers(4, 20),
    share=st.floats(0.1, 1),
)
def test_windows_score_each_token_once(length: int, first: int, longest: int, share: float) -> None:
    tokens = tuple(range(length))
    found = windows(tokens, first, longest, max(1, int(share * longest)))
    assert [token for own in found for token in own.continuation] == list(tokens[first:])
    for own in found:
        whole = own.context + own.continuation
        assert own.context
        assert whole == tuple(range(whole[0], whole[-1] + 1))
        assert len(whole) - 1 <= longest


@pytest.mark.parametrize("kind", ("Llama", "GPT2", "T5"))
def test_generation_is_greedy_and_stops(models: dict[str, nn.Module], kind: str) -> None:
    contexts = [own.context for own in questions(6, 20)[::4]]
    requests = [Generation(context, (), 9) for context in contexts]
    expected = [
        letters().decode(greedy(models[kind], own), skip_special_tokens=True) for own in requests
    ]
    assert asked(models[kind], batch_size=4).generate(requests) == expected
    letter = next(text[3] for text in expected if len(text) > 3)
    stopped = [Generation(own, (letter,), 9) for own in contexts]
    cut = [text.partition(letter)[0] for text in expected]
    assert asked(models[kind], batch_size=4).generate(stopped) == cut


@pytest.mark.parametrize("of", ("outputs", "logits", "probabilities"))
def test_ensembles_answer_too(models: dict[str, nn.Module], of: Any) -> None:
    """Two times the same model answers as the model does."""
    both = ensemble_of({"a": models["GPT2"], "b": models["GPT2"]}, [0.5, 0.5], of)
    likelihoods = questions(4)
    found, _ = asked(both).log_likelihoods(likelihoods)
    expected, _ = asked(models["GPT2"]).log_likelihoods(likelihoods)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    prompts = [Generation(own.context, ("x",), 6) for own in likelihoods[::4]]
    assert asked(both).generate(prompts) == asked(models["GPT2"]).generate(prompts)
    with pytest.raises(FusionBenchError, match="can only write greedily"):
        asked(both).generate([Generation((50,), (), 3, {"do_sample": True})])


def test_a_models_generation_config_changes_nothing() -> None:
    module: Any = tiny("Llama", seed=3)
    requests = [Generation((50, 60, 70), (), 8), Generation((90, 91), (), 8)]
    expected = asked(module).generate(requests)
    own = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 9.0, "max_length": 5}
    for name, value in own.items():
        setattr(module.generation_config, name, value)
    before = module.generation_config
    assert asked(module).generate(requests) == expected
    assert module.generation_config is before


def test_sampling_is_the_same_each_time_and_leaves_the_callers_numbers_alone(
    models: dict[str, nn.Module],
) -> None:
    request = Generation((50, 60, 70), (), 12, {"do_sample": True, "temperature": 5.0})
    state = torch.get_rng_state()
    first, second = (asked(models["Llama"]).generate([request]) for _ in range(2))
    assert first == second
    assert torch.equal(state, torch.get_rng_state())
    assert first != asked(models["Llama"]).generate([Generation((50, 60, 70), (), 12)])


def test_more_tokens_than_the_model_reads(models: dict[str, nn.Module]) -> None:
    with pytest.raises(FusionBenchError, match="asks for 64 new tokens"):
        asked(models["Llama"]).generate([Generation((50,), (), LENGTH)])
    model = asked(models["Llama"])
    model.generate([Generation(tuple([50] * 70), (), 4), Generation((50,), (), 4)])
    assert model.truncated == {0}


def test_values_that_are_no_numbers_are_refused() -> None:
    module = tiny("Llama", seed=1)
    with torch.no_grad():
        next(module.parameters()).fill_(float("nan"))
    with pytest.raises(FusionBenchError, match=r"'model' gives values that are no numbers"):
        asked(module).log_likelihoods(questions(1))


def test_tokens_beyond_the_embedding(models: dict[str, nn.Module]) -> None:
    with pytest.raises(FusionBenchError, match="a token 500, and the embedding of 'model' has 128"):
        asked(models["Llama"]).log_likelihoods([Likelihood((50,), (500,))])


def test_memory_that_runs_out_halves_the_batch(
    models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, sizes = models["Llama"], []
    forward = module.forward

    def small(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("out of memory")
        return forward(*args, **kwargs)

    requests = questions()
    expected = asked(module).log_likelihoods(requests)[0]
    small.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "forward", small)
    np.testing.assert_allclose(asked(module).log_likelihoods(requests)[0], expected, atol=1e-4)
    assert max(sizes) == 8

    def never(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    never.__signature__ = small.__signature__  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "forward", never)
    with pytest.raises(EnvironmentProblem, match="one sample at a time"):
        asked(module).log_likelihoods(requests)


def test_nothing_is_asked_twice() -> None:
    module = tiny("Llama", seed=2)
    calls = counting(module)
    requests, prompts = questions(), [Generation((50, 51), ("x",), 5), Generation((60,), ("x",), 5)]
    first = asked(module, computation="a")
    found, texts = first.log_likelihoods(requests), first.generate(prompts)
    done = calls()
    again = asked(module, computation="a", batch_size=3)
    np.testing.assert_array_equal(again.log_likelihoods(requests)[0], found[0])
    assert (again.log_likelihoods(requests[::-1])[1] == found[1][::-1]).all()
    assert again.generate(prompts) == texts
    assert calls() == done
    # Another model, another tokenizer, another length, other settings: other answers.
    asked(module, computation="b").log_likelihoods(requests[:1])
    asked(module, computation="a", max_length=32).log_likelihoods(requests[:1])
    asked(module, computation="a", tokenizer=letters(eos=True)).log_likelihoods(requests[:1])
    assert calls() == done + 3
    asked(module, computation="a").generate([Generation((50, 51), ("y",), 5)])
    assert calls() > done + 3


def test_what_was_answered_before_the_end_is_kept() -> None:
    """Only the batch that was being answered is asked again."""
    module = tiny("Llama", seed=2)
    requests = questions(16)
    answered = [0]

    class Ended(BaseException):
        pass

    def end(*_: Any, **__: Any) -> None:
        answered[0] += 1
        if answered[0] == 4:
            raise Ended

    handle = module.register_forward_pre_hook(end, with_kwargs=True)
    with pytest.raises(Ended):
        asked(module, computation="a", batch_size=4).log_likelihoods(requests)
    handle.remove()
    calls = counting(module)
    found, _ = asked(module, computation="a", batch_size=4).log_likelihoods(requests)
    resumed = calls()
    fresh, _ = asked(module, batch_size=4).log_likelihoods(requests)
    whole = calls() - resumed
    assert resumed < whole
    np.testing.assert_allclose(found, fresh, atol=1e-5)


def test_a_damaged_file_is_begun_anew(caplog: pytest.LogCaptureFixture) -> None:
    store = stored.RequestStore({"model": "a"})
    store.keep({b"one": b"1", b"two": b"2"})
    assert store.known([b"one", b"two", b"three"]) == {b"one": b"1", b"two": b"2"}
    for beside in store.path.parent.glob(f"{store.path.name}-*"):
        beside.unlink()  # from which a damaged file would be mended
    store.path.write_bytes(b"no database at all" * 500)
    store = stored.RequestStore({"model": "a"})
    assert store.known([b"one"]) == {}
    assert "begun anew" in caplog.text
    store.keep({b"one": b"3"})
    assert stored.RequestStore({"model": "a"}).known([b"one"]) == {b"one": b"3"}


def test_an_answer_that_was_changed_does_not_count() -> None:
    import sqlite3

    store = stored.RequestStore({"model": "a"})
    store.keep({b"one": b"1", b"two": b"2"})
    with sqlite3.connect(store.path) as file:
        file.execute("UPDATE answers SET answer = ? WHERE key = ?", (b"12345678x", b"one"))
    file.close()
    assert store.known([b"one", b"two"]) == {b"two": b"2"}


@pytest.mark.processes
def test_two_processes_give_the_same_answers(models: dict[str, nn.Module]) -> None:
    def answers(fabric: Fabric) -> Any:
        model = asked(models["Llama"], batch_size=3, fabric=fabric)
        found, likeliest = model.log_likelihoods(questions())
        texts = model.generate([Generation(own.context, (), 6) for own in questions(7)[::4]])
        everywhere = fabric.all_gather(torch.as_tensor(found))
        return found, likeliest, texts, everywhere.numpy()

    found, likeliest, texts, _ = answers(CPU)
    together = launch(Fabric(accelerator="cpu", devices=2, strategy="ddp_fork"), answers)
    assert together[3].shape == (2, len(found))
    for each in together[3]:
        np.testing.assert_allclose(each, found, atol=1e-5)
    assert (together[1] == likeliest).all() and together[2] == texts


@pytest.mark.parametrize("named", (True, False))
def test_an_end_that_a_tokenizer_adds_is_no_part_of_a_context(named: bool) -> None:
    encoder = asked(tiny("Llama"), tokenizer=letters(eos=True, named=named)).encoder
    (found,) = encoder.likelihoods([("ab", " c")])
    assert found == Likelihood((BOS, ord("a"), ord("b")), (ord(" "), ord("c")))
    assert encoder.texts(["ab"]) == [(BOS, ord("a"), ord("b"))]
    assert encoder.document("ab") == ((BOS, ord("a"), ord("b")), True)


@pytest.mark.parametrize("kind", ("Llama", "T5"))
def test_answers_and_prompts_without_a_token(models: dict[str, nn.Module], kind: str) -> None:
    tokenizer = letters(bos=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    encoder = asked(models[kind], tokenizer=tokenizer).encoder
    with pytest.raises(FusionBenchError, match="the answer '~' has no token"):
        encoder.likelihoods([("ab", "~")])
    with pytest.raises(FusionBenchError, match="the prompt '~' has no token"):
        encoder.texts(["~"])


def test_a_length_beyond_the_models_positions(models: dict[str, nn.Module]) -> None:
    model = asked(models["GPT2"], max_length=400)
    assert model.max_length == LENGTH
    model.log_likelihoods([Likelihood(tuple([50] * 90), (60,))])
    assert model.truncated == {0}
