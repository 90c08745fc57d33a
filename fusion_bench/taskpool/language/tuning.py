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
from fusion_bench.taskpool.language.requests import Tokens
from fusion_bench.taskpool.language.texts import Texts
from fusion_bench.taskpool.task import Evaluation

if TYPE_CHECKING:
    from fusion_bench.taskpool.language.task import LanguageTask

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
            is_test_split(str(self.texts.dataset.split or ""))
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

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor]:
        return self.owner.learned(self.items)

    def sample(self, count: int | None, seed: int = 0) -> NDArray[np.int64]:
        """Draw samples without replacement; ``None`` takes all."""
        return drawn(len(self), count, seed)

    def batches(
        self, samples: NDArray[np.int64], batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tokens, filled up with -1, and labels, both on Fabric's device."""
        inputs, labels = self._tensors
        device = self.how.fabric.device
        for i in range(0, len(samples), batch_size):
            part = torch.from_numpy(samples[i : i + batch_size])
            yield inputs[part].to(device), labels[part].to(device)

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


def by_length(ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the numbers of rows of the same length, and their tokens, without what fills them up.

    Methods such as RegMean look at all that goes through a layer: nothing may stand in for texts.
    """
    lengths = (ids != NOTHING).sum(dim=1)
    for length in lengths.unique().tolist():
        if length:
            rows = (lengths == length).nonzero()[:, 0]
            yield rows, ids[rows, :length]


def next_logits(model: nn.Module, ids: Tensor, how: Evaluation) -> Tensor:
    """Return the logits of the token after each row of tokens, (rows, vocabulary), float32."""
    module: Any = model
    seq2seq = bool(getattr(module.config, "is_encoder_decoder", False))
    parts, order = [], []
    for rows, own in by_length(ids):
        options: dict[str, Any] = {}
        if seq2seq:
            start = module.config.decoder_start_token_id
            options["decoder_input_ids"] = own.new_full((len(own), 1), start)
        with how.fabric.autocast():
            parts.append(module(input_ids=own, use_cache=False, **options).logits[:, -1].float())
        order.append(rows)
    return torch.cat(parts)[torch.cat(order).argsort()]
