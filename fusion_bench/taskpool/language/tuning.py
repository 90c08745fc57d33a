"""A task's texts for methods that learn from data."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.problems import within
from fusion_bench.results import Metric, SampleScores
from fusion_bench.taskpool.images.tuning import TOLERATED, drawn, is_test_split
from fusion_bench.taskpool.language.forward import wide
from fusion_bench.taskpool.language.model import read_at_most
from fusion_bench.taskpool.language.requests import Tokens
from fusion_bench.taskpool.language.texts import Texts
from fusion_bench.taskpool.task import Evaluation

if TYPE_CHECKING:
    from fusion_bench.taskpool.language.task import LanguageTask

#: A model that names no limit has none here.
_ANY = 10**8
#: Stands in tensors where a text has ended.
NOTHING = -1


@dataclass(frozen=True)
class TextData:
    """Texts for a method to learn from.

    Attributes:
        owner: the task.
        texts: the rows.
        items: what models are asked of them.
        how: gives device, loading and memory.
        place: where ``classify`` is asked for; for messages.
    """

    owner: "LanguageTask[Any]"
    texts: Texts
    items: list[Any]
    how: Evaluation
    place: tuple[str | int, ...] = ()

    @property
    def task(self) -> str:
        """The task's name."""
        return self.owner.name

    @property
    def metric(self) -> Metric:
        """What the task is evaluated by."""
        return self.owner.metrics[0]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def fingerprint(self) -> str:
        """The hash of the data."""
        return self.texts.fingerprint

    @cached_property
    def is_test(self) -> bool:
        """Whether models are evaluated on such texts: by the split's name, or by content."""
        evaluated = self.owner.texts
        return (
            is_test_split(self.texts.split)
            or self.fingerprint == evaluated.fingerprint
            or self.texts.shares(evaluated) > TOLERATED
        )

    @property
    def classify(self) -> Callable[[nn.Module], Callable[[Tensor], Tensor]]:
        """Return a model's function from the tensors of ``batches`` to logits."""

        def classify(model: nn.Module) -> Callable[[Tensor], Tensor]:
            with within(*self.place, keyed_only=True, whole=True):
                return self.owner.classifier(model, self.how)

        return classify

    def sample(self, count: int | None, seed: int = 0) -> NDArray[np.int64]:
        """Draw samples without replacement; ``None`` takes all."""
        return drawn(len(self), count, seed)

    def batches(
        self, samples: NDArray[np.int64], batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tokens, filled up with -1, and labels, both on Fabric's device."""
        device = self.how.fabric.device
        for i in range(0, len(samples), batch_size):
            inputs, labels = self.owner.learned(
                [self.items[j] for j in samples[i : i + batch_size]]
            )
            yield inputs.to(device), labels.to(device)

    def endless(self, batch_size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches forever, in a new order in each epoch."""
        random = np.random.default_rng(seed % 2**32)
        while True:
            yield from self.batches(random.permutation(len(self)), batch_size)

    def evaluate(self, model: nn.Module) -> SampleScores:
        """Return how the model does on all samples."""
        return self.owner.on(self).evaluate(model, np.arange(len(self), dtype=np.int64), self.how)

    def placed(self, *place: str | int) -> "TextData":
        """Return the same data, whose errors have ``place`` in front."""
        return TextData(self.owner, self.texts, self.items, self.how, place)


def filled(rows: Sequence[Tokens]) -> Tensor:
    """Return tokens as int64 of shape (rows, width), filled up with -1."""
    width = max(map(len, rows))
    return torch.tensor([list(own) + [NOTHING] * (width - len(own)) for own in rows])


def by_length(ids: Tensor, most: int = _ANY) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the numbers of rows of the same length, and their tokens, without what fills them up.

    Methods such as RegMean look at all that goes through a layer: nothing may stand in for texts.
    Of rows that are longer than ``most`` tokens the beginnings are left out.
    """
    lengths = (ids != NOTHING).sum(dim=1)
    for length in lengths.unique().tolist():
        if length:
            rows = (lengths == length).nonzero()[:, 0]
            yield rows, ids[rows, max(0, length - most) : length]


def apart(ids: Tensor, answer: Callable[[Tensor, Tensor], Tensor], most: int = _ANY) -> Tensor:
    """Return what ``answer`` makes of ``by_length``'s parts, a row for each of ``ids``."""
    both = [(rows, answer(rows, own)) for rows, own in by_length(ids, most)]
    order = torch.cat([rows for rows, _ in both]).argsort()
    return torch.cat([found for _, found in both])[order]


def without_end(model: nn.Module, ids: Tensor, end: int | None) -> Tensor:
    """Return contexts as a model reads them: with a token ``end`` only before an encoder."""
    if end is None or _is_seq2seq(model):
        return ids
    last = (ids != NOTHING).sum(dim=1, keepdim=True) - 1
    own = ids.gather(1, last)
    return ids.scatter(1, last, torch.where(own == end, NOTHING, own))


def next_logits(model: nn.Module, ids: Tensor, how: Evaluation) -> Tensor:
    """Return the logits of the token after each row of tokens, (rows, vocabulary)."""
    module: Any = model

    def answer(rows: Tensor, own: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        if _is_seq2seq(model):
            start = module.config.decoder_start_token_id
            options["decoder_input_ids"] = own.new_full((len(own), 1), start)
        with how.fabric.autocast():
            logits: Tensor = module(input_ids=own, use_cache=False, **options).logits
        return wide(logits[:, -1])

    return apart(ids, answer, room(model))


def label_likelihoods(
    model: nn.Module, ids: Tensor, labels: Sequence[Tokens], how: Evaluation
) -> Tensor:
    """Return each label's log-likelihood after each context, of shape (rows, labels).

    Args:
        model: a causal model or an encoder-decoder.
        ids: the contexts, filled up with -1.
        labels: the labels' tokens.
        how: gives the precision.
    """
    module: Any = model

    def answer(rows: Tensor, own: Tensor) -> Tensor:
        found = []
        with how.fabric.autocast():
            states = module.get_encoder()(input_ids=own) if _is_seq2seq(model) else None
            for label in labels:
                written = own.new_tensor(label).expand(len(own), -1)
                if states is None:
                    read = torch.cat([own, written[:, :-1]], dim=1)
                    logits = module(input_ids=read, use_cache=False).logits
                else:
                    start = own.new_full((len(own), 1), module.config.decoder_start_token_id)
                    read = torch.cat([start, written[:, :-1]], dim=1)
                    logits = module(
                        encoder_outputs=states, decoder_input_ids=read, use_cache=False
                    ).logits
                each = wide(logits[:, -len(label) :]).log_softmax(dim=-1)
                found.append(each.gather(2, written[..., None])[..., 0].sum(dim=1))
        return torch.stack(found, dim=1)

    return apart(ids, answer, room(model) - max(map(len, labels)))


def room(model: nn.Module) -> int:
    """Return how many tokens a model reads at once."""
    return read_at_most(getattr(model, "config", None), _ANY)


def _is_seq2seq(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))
