"""Similarity of texts by an embedding model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.companions import MODULES, SENTENCE_CONFIGS, module_folders
from fusion_bench.plan import Plan
from fusion_bench.problems import FusionBenchError, within
from fusion_bench.repository import Repository
from fusion_bench.results import Example, Metric, SampleScores
from fusion_bench.storage import read_json
from fusion_bench.taskpool.language.forward import wide
from fusion_bench.taskpool.language.measures import CORRELATIONS, number, numbers
from fusion_bench.taskpool.language.model import LanguageModel
from fusion_bench.taskpool.language.passages import Batch, Passage, longest_text, passages
from fusion_bench.taskpool.language.task import LanguageTask
from fusion_bench.taskpool.language.templates import Template
from fusion_bench.taskpool.language.tuning import apart, filled
from fusion_bench.taskpool.parts import Part
from fusion_bench.taskpool.task import Evaluation

#: What becomes of the states of a text's tokens, by name, and what sentence-transformers calls it.
_POOLING = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "last": "pooling_mode_lasttoken",
}
#: The shortest length of an embedding that has a direction.
_SHORTEST = 1e-12


@dataclass(frozen=True)
class Pair:
    """Two texts, and how similar they are."""

    texts: tuple[str, str]
    score: float


class SimilarityTask(LanguageTask[Pair]):
    """Pairs of texts, and how similar they are: the cosine of the embeddings is correlated with it.

    The cosine does not depend on the embeddings' lengths, so whether they are normalised does not
    matter.

    Args:
        dataset: as in ``LanguageTask``; so are the arguments that are not listed here.
        text: a column's name, or a template.
        text_pair: likewise the other text.
        score: the column with the similarity, on any scale.
        pooling: ``mean`` over the tokens, ``cls`` for the first, ``last``, or ``max``; or the
            folder, repository or ``zoo:`` name of a model that sentence-transformers has written
            and that says so.
    """

    kind = "similarity"
    measured = (CORRELATIONS[1], CORRELATIONS[0])
    loses = "ends"

    @keeps_arguments
    def __init__(
        self,
        dataset: Any,
        text: str = "sentence1",
        text_pair: str = "sentence2",
        score: str = "score",
        pooling: str = "mean",
        tokenizer: Any = None,
        owner: str | None = None,
        max_length: int | None = None,
        metrics: Sequence[str | Metric] | None = None,
        name: str = "",
    ):
        templates = {}
        for key, own in {"text": text, "text_pair": text_pair, "score": score}.items():
            with within(key):
                templates[key] = Template(own)
        super().__init__(dataset, templates, tokenizer, owner, max_length, metrics, name)
        self._pooling = Pooling(pooling)

    @property
    def options(self) -> Mapping[str, Any]:
        """The pooling, and what else its model says."""
        own = self._pooling
        return {"pooling": own.mode, "max_length": own.max_length, "prompt": own.prompt}

    def plan(self, plan: Plan, scratch: Path | None) -> None:
        """Look for the pooling, too."""
        super().plan(plan, scratch)
        with plan.collect(*self.settings):
            self._pooling.plan(plan, scratch)

    def prepare(self, fabric: Fabric) -> None:
        """Read the pooling, too.

        Raises:
            FusionBenchError: as in ``LanguageTask``, or a pooling that is not known.
        """
        with within(*self.settings):
            _ = self._pooling.mode
        super().prepare(fabric)

    def item(self, row: Mapping[str, Any]) -> Pair:
        """Return a row's texts and their similarity.

        Raises:
            FusionBenchError: a text that is none, or no number.
        """
        texts = self.templates["text"].render(row), self.templates["text_pair"].render(row)
        if not all(text.strip() for text in texts):
            raise FusionBenchError("a text is empty.", "Leave the sample out.")
        return Pair(texts, number(self.templates["score"].value(row)))

    def example(self, item: Pair) -> Example:
        """Return what people read."""
        return Example("\n".join(item.texts), f"{item.score:g}")

    def learned(self, items: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Return both texts' tokens, of shape (items, 2, width), and the similarities."""
        with within(*self.settings):
            own = self._passages(items, None)
        tokens = filled([passage.tokens for passage in own])
        return tokens.unflatten(0, (-1, 2)), torch.tensor([item.score for item in items])

    def classifier(self, model: nn.Module, how: Evaluation) -> Callable[[Tensor], Tensor]:
        """Return the function from such tokens to the cosines, of shape (items, 1)."""

        def cosines(inputs: Tensor) -> Tensor:
            def answer(rows: Tensor, ids: Tensor) -> Tensor:
                batch = Batch(ids, torch.zeros_like(ids), torch.ones_like(ids))
                with how.fabric.autocast():
                    return self._pooling.embeddings(model, batch)

            inputs = inputs[..., : longest_text(model, self.tokenizer)]
            found = apart(inputs.flatten(0, 1), answer).unflatten(0, (-1, 2))
            return torch.cosine_similarity(found[:, 0], found[:, 1])[:, None]

        return cosines

    def scores(
        self, model: LanguageModel, items: Sequence[Pair], samples: NDArray[np.int64]
    ) -> SampleScores:
        """Take the cosine of each pair's embeddings."""
        own = self._passages(items, model.module)
        different = list(dict.fromkeys(own))
        padding, device = model.encoder.padding, model.how.fabric.device

        def answer(part: Sequence[Passage]) -> Tensor:
            with model.how.fabric.autocast():
                return self._pooling.embeddings(model.module, Batch.of(part, padding, device))

        found = model.values(different, answer, self._pooling.width(model.module))
        directions = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), _SHORTEST)
        place = {passage: i for i, passage in enumerate(different)}
        pairs = directions[[place[passage] for passage in own]].reshape(len(items), 2, -1)
        exact = (pairs[:, 0] * pairs[:, 1]).sum(axis=1)
        cosines = exact.astype(np.float32).astype(np.float64)  # ranks are not decided by rounding
        truth = np.array([item.score for item in items])
        cut = np.array([passage.truncated for passage in own]).reshape(-1, 2).any(axis=1)
        details = {"labels": truth, "predictions": cosines, "truncated": cut.astype(np.int64)}
        return SampleScores(samples, numbers(truth, cosines), details)

    def _passages(self, items: Sequence[Pair], model: nn.Module | None) -> list[Passage]:
        """Encode the texts of each pair, one after the other."""
        longest = int(self.tokenizer.model_max_length)
        longest = longest if model is None else longest_text(model, self.tokenizer)
        prompt = self._pooling.prompt
        texts = [prompt + text for item in items for text in item.texts]
        wanted = self._max_length or self._pooling.max_length or longest
        return passages(self.tokenizer, texts, None, min(longest, wanted))


class Pooling:
    """How a text's embedding is made of the states of its tokens.

    Args:
        source: a mode, or where a model of sentence-transformers lies. Places of problems are
            relative to the task.
    """

    def __init__(self, source: str):
        self._given = source if source in _POOLING else None
        self._part = Part(source, ("pooling",), {})
        if self._part.name is None:
            raise FusionBenchError(
                f"'{source}' is no pooling.",
                f"Choose of {', '.join(_POOLING)}, or name a model's folder.",
                place=("pooling",),
            )

    def plan(self, plan: Plan, scratch: Path | None) -> None:
        """Find the model that tells.

        Raises:
            FusionBenchError: it is not there, or tells none that is known.
        """
        with self._part.located():
            if self._given is None and (found := self._part.find(plan, scratch)) is not None:
                _mode(found)

    @cached_property
    def mode(self) -> str:
        """One of ``mean``, ``cls``, ``max`` and ``last``.

        Raises:
            FusionBenchError: what the model says is none of them.
        """
        with self._part.located():
            return self._given or _mode(self._part.repository)

    @cached_property
    def max_length(self) -> int | None:
        """The most tokens of a text, if the model says so."""
        for name in SENTENCE_CONFIGS:
            length = self._said(name).get("max_seq_length")
            if isinstance(length, int) and length > 0:
                return length
        return None

    @cached_property
    def prompt(self) -> str:
        """What the model puts before each text by default."""
        config = self._said(SENTENCE_CONFIGS[0])
        prompts, name = config.get("prompts"), config.get("default_prompt_name")
        found = prompts.get(name) if isinstance(prompts, dict) and name else None
        return found if isinstance(found, str) else ""

    def _said(self, name: str) -> Mapping[str, Any]:
        """Return a config of the model's; an empty one where there is none."""
        if self._given is not None or name not in self._part.repository.files:
            return {}
        with self._part.located():
            content = read_json(self._part.repository.fetch(name) / name)
        return content if isinstance(content, dict) else {}

    def width(self, model: nn.Module) -> int:
        """Return how many numbers an embedding has."""
        config: Any = getattr(model, "config", None)
        size = getattr(config, "hidden_size", None)
        if not isinstance(size, int):
            raise FusionBenchError(f"a {type(model).__name__} is no model of texts.")
        return size

    def embeddings(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the embeddings of texts, at least float32, of shape (rows, width)."""
        module: Any = getattr(model, "base_model", model)
        if getattr(module.config, "is_encoder_decoder", False):
            module = module.get_encoder()
        states = wide(module(**batch.arguments(module.config)).last_hidden_state)
        if self.mode == "cls":
            return states[:, 0]
        if self.mode == "last":
            return batch.last(states)
        there = batch.mask[..., None] == 1
        if self.mode == "max":
            return states.masked_fill(~there, -torch.inf).amax(dim=1)
        return (states * there).sum(dim=1) / there.sum(dim=1)


def _mode(repository: Repository) -> str:
    """Return the pooling that a folder of sentence-transformers names."""
    if MODULES not in repository.files:
        raise FusionBenchError(
            f"'{repository.name}' has no {MODULES}, which would name its pooling.",
            f"Choose of {', '.join(_POOLING)}.",
        )
    where = repository.fetch(MODULES) / MODULES
    folders = module_folders(read_json(where), str(where))
    kinds = {kind.rpartition(".")[2]: folder for folder, kind in folders.items()}
    if more := sorted(kinds.keys() - {"Pooling", "Normalize", "Transformer"}):
        raise FusionBenchError(
            f"'{repository.name}' has a module '{more[0]}', which is not computed here.",
            "Name a model whose embeddings are pooled states.",
        )
    name = f"{kinds.get('Pooling', '1_Pooling')}/config.json"
    config = read_json(repository.fetch(name) / name)
    named = [mode for mode, key in _POOLING.items() if config.get(key)]
    if config.get("pooling_mode") in _POOLING:
        named = [config["pooling_mode"]]
    others = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    if len(named) != 1 or len(others) > 1:
        raise FusionBenchError(
            f"the pooling of '{repository.name}' is none of {', '.join(_POOLING)}.",
            "Name another model.",
        )
    return str(named[0])
