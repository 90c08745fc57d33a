"""Perplexity: how well does a model predict texts?"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.arguments import keeps_arguments
from fusion_bench.problems import FusionBenchError, check_between, within
from fusion_bench.results import Example, Metric, SampleScores
from fusion_bench.results.metrics import BITS_PER_BYTE, PERPLEXITY
from fusion_bench.taskpool.language.model import LanguageModel, windows
from fusion_bench.taskpool.language.task import LanguageTask
from fusion_bench.taskpool.language.templates import Template
from fusion_bench.taskpool.language.tuning import filled, next_logits
from fusion_bench.taskpool.task import Evaluation


class PerplexityTask(LanguageTask[str]):
    """Texts, of which a model predicts each token: perplexity by token, and bits per byte.

    A text that is longer than the model reads is read in windows, and each token is scored once.
    The token that a tokenizer puts in front is read, and never scored. Perplexities of models with
    different tokenizers cannot be compared; bits per byte can.

    Args:
        dataset: as in ``LanguageTask``; so are the arguments that are not listed here.
        text: a column's name, or a template.
        stride: how many tokens each window after the first one scores; what it reads before them
            makes them easier to predict. By default half of what the model reads.
    """

    kind = "perplexity"
    measured = (PERPLEXITY, BITS_PER_BYTE)

    @keeps_arguments
    def __init__(
        self,
        dataset: Any,
        text: str = "text",
        stride: int | None = None,
        tokenizer: Any = None,
        owner: str | None = None,
        max_length: int | None = None,
        metrics: Sequence[str | Metric] | None = None,
        name: str = "",
    ):
        if stride is not None:
            check_between("stride", stride, 1, max_length or 10**9)
        self._stride = stride
        with within("text"):
            self._text = Template(text)
        super().__init__(dataset, {"text": self._text}, tokenizer, owner, max_length, metrics, name)

    @property
    def options(self) -> Mapping[str, Any]:
        """The stride."""
        return {"stride": self._stride}

    def item(self, row: Mapping[str, Any]) -> str:
        """Return the text of a row.

        Raises:
            FusionBenchError: it is empty.
        """
        text = self._text.render(row)
        if not text:
            raise FusionBenchError("the text is empty.", "Leave the sample out.")
        return text

    def example(self, item: str) -> Example:
        """Return what people read."""
        return Example(item)

    def learned(self, items: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the beginnings of the texts, and the token after each."""
        encoder = self.encoder()
        longest = self._max_length or 512
        whole = [encoder.document(text)[0][: longest + 1] for text in items]
        return filled([own[:-1] for own in whole]), torch.tensor([own[-1] for own in whole])

    def classifier(self, model: nn.Module, how: Evaluation) -> Callable[[Tensor], Tensor]:
        """Return the function from texts to the logits of the next token."""
        return lambda ids: next_logits(model, ids, how)

    def scores(
        self, model: LanguageModel, items: Sequence[str], samples: NDArray[np.int64]
    ) -> SampleScores:
        """Ask for the likelihood of each token after those before it."""
        longest = model.max_length
        stride = min(self._stride or max(1, longest // 2), longest)
        requests, owners = [], []
        tokens = np.zeros(len(items))
        sizes = np.zeros(len(items))
        for i, text in enumerate(items):
            whole, has_prefix = model.encoder.document(text)
            own = windows(whole, 1, longest, stride)
            requests += own
            owners += [i] * len(own)
            tokens[i] = len(whole) - 1
            # Without a token before the text its first one cannot be predicted.
            unscored = 0 if has_prefix else len(model.encoder.decoded(whole[:1]).encode())
            sizes[i] = len(text.encode()) - unscored
            if not own:
                raise FusionBenchError(
                    f"sample {samples[i]} has a single token, and nothing stands before it.",
                    "Leave the sample out.",
                )
        found, _ = model.log_likelihoods(requests)
        nats = -np.bincount(owners, weights=found, minlength=len(items))
        return SampleScores(
            samples,
            {
                PERPLEXITY.name: np.stack([nats, tokens], axis=1),
                BITS_PER_BYTE.name: np.stack([nats, sizes], axis=1),
            },
        )
