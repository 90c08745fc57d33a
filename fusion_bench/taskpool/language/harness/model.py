"""A language model as the harness asks it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from lm_eval.api.model import LM

from fusion_bench.problems import FusionBenchError
from fusion_bench.taskpool.language.model import LanguageModel, windows
from fusion_bench.taskpool.language.requests import Generation, Likelihood, Tokens

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

R = TypeVar("R", Likelihood, Generation)

#: Names for the number of new tokens, of which the first counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_LENGTH = 256
#: Without them nothing is drawn.
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff")


class HarnessModel(LM):
    """Answers requests with our model.

    To the harness it is the only process: the model distributes requests by itself, and gives the
    same answers everywhere.

    Attributes:
        cut: the numbers of the documents whose requests were longer than the model reads.
    """

    def __init__(self, model: LanguageModel):
        super().__init__()
        self._model = model
        self.cut: set[int] = set()

    def loglikelihood(self, requests: "Sequence[Instance]") -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood, and whether greedy decoding gives it."""
        asked = self._model.encoder.likelihoods([own.args for own in requests])
        different, places = _different(asked)
        found, greedy = self._model.log_likelihoods(different)
        self._note(requests, places)
        return [(float(found[i]), bool(greedy[i])) for i in places]

    def loglikelihood_rolling(self, requests: "Sequence[Instance]") -> list[float]:
        """Return the log-likelihood of each text, without the token that a tokenizer adds."""
        parts: list[Likelihood] = []
        owners: list[int] = []
        longest = self._model.max_length
        for number, own in enumerate(requests):
            whole, _ = self._model.encoder.document(own.args[0])
            split = windows(whole, 1, longest, longest)
            if not split:
                raise FusionBenchError(
                    f"sample {own.doc_id} has a single token, and nothing stands before it.",
                    "Use a tokenizer with a token for the beginning of a text.",
                )
            parts += split
            owners += [number] * len(split)
        found, _ = self._model.log_likelihoods(parts)
        sums = [0.0] * len(requests)
        for number, value in zip(owners, found, strict=True):
            sums[number] += float(value)
        return sums

    def generate_until(self, requests: "Sequence[Instance]") -> list[str]:
        """Return what the model writes after each context."""
        contexts = self._model.encoder.texts([own.args[0] for own in requests])
        asked: list[Generation] = []
        times: dict[Generation, int] = {}
        for own, context in zip(requests, contexts, strict=True):
            settings = _settings(json.dumps(own.args[1], default=str))
            generation = replace(settings, context=context or self._beginning(own))
            # What is asked several times is drawn several times.
            times[generation] = seed = times.get(generation, -1) + 1
            asked.append(replace(generation, seed=seed) if generation.options else generation)
        different, places = _different(asked)
        texts = self._model.generate(different)
        self._note(requests, places)
        return [texts[i] for i in places]

    def _beginning(self, request: "Instance") -> Tokens:
        if self._model.encoder.prefix is None:
            raise FusionBenchError(f"the prompt of sample {request.doc_id} is empty.")
        return (self._model.encoder.prefix,)

    def _note(self, requests: "Sequence[Instance]", places: Sequence[int]) -> None:
        cut = self._model.truncated | self._model.overlong
        self.cut |= {own.doc_id for own, i in zip(requests, places, strict=True) if i in cut}


def _different(requests: Sequence[R]) -> tuple[list[R], list[int]]:
    """Return the requests without repetitions, and each one's place among them."""
    places: dict[R, int] = {}
    return_to = [places.setdefault(own, len(places)) for own in requests]
    return list(places), return_to


@cache
def _settings(asked: str) -> Generation:
    """Return a request of no context with the settings that a task gives, as JSON.

    Raises:
        FusionBenchError: a setting that transformers does not know.
    """
    from transformers import GenerationConfig

    options = {key: value for key, value in json.loads(asked).items() if value is not None}
    until = options.pop("until", [])
    stop = [until] if isinstance(until, str) else list(until)
    lengths = [options.pop(name) for name in _LENGTHS if name in options]
    temperature = options.get("temperature")
    sample = options.pop("do_sample", temperature is not None)
    if sample and (temperature is None or float(temperature) > 0):
        options["do_sample"] = True
    else:
        options = {key: value for key, value in options.items() if key not in _OF_SAMPLING}
    for key in options:
        if key == "max_length" or not hasattr(GenerationConfig(), key):
            raise FusionBenchError(
                f"'{key}' is no setting of transformers' generation.",
                "Remove it, or use 'max_gen_toks' for a length.",
                place=("generation_kwargs", key),
            )
    length = int(lengths[0]) if lengths else _DEFAULT_LENGTH
    return Generation((), tuple(text for text in stop if text), length, options)
