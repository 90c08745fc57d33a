"""One batch of requests through a language model."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.taskpool.language.requests import Tokens
from fusion_bench.taskpool.language.rows import Row

if TYPE_CHECKING:
    from lightning.fabric import Fabric

#: So many numbers are made of the logits in float32 at once.
_NUMBERS = 2**25


@dataclass(frozen=True)
class Predicted:
    """Where tokens are predicted in a batch, and which they are; arrays with an entry a token.

    Attributes:
        rows: the row.
        columns: the position, counted from the end: 1 is the last.
        tokens: the token.
        requests: its request's number in the batch.
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    tokens: NDArray[np.int64]
    requests: NDArray[np.int64]


class Forward:
    """A model that reads tokens and gives logits, with or without an encoder.

    Args:
        module: a model of transformers, or what returns such output, on Fabric's device.
        fabric: gives device and precision.
        padding: a token for where nothing is read.
    """

    def __init__(self, module: nn.Module, fabric: "Fabric", padding: int):
        self.module = module
        self._fabric = fabric
        self._padding = padding
        self._takes = set(inspect.signature(module.forward).parameters)
        config: Any = getattr(module, "config", None)
        self.is_seq2seq = bool(getattr(config, "is_encoder_decoder", False))
        self._start = getattr(config, "decoder_start_token_id", None)
        attention = getattr(config, "_attn_implementation", None)
        window = getattr(config, "sliding_window", None)
        self._window: int = window if isinstance(window, int) and window > 0 else 2**62
        #: Whether rows with branches may be read at once.
        self.branches = attention in ("sdpa", "eager") and not self.is_seq2seq
        self.branches = self.branches and {"position_ids", "attention_mask"} <= self._takes

    @property
    def rows_of_embedding(self) -> int | None:
        """How many tokens the model knows, as far as it tells."""
        get = getattr(self.module, "get_input_embeddings", None)
        try:
            return None if get is None else int(get().weight.shape[0])
        except (AttributeError, NotImplementedError):
            return None

    def log_likelihoods(self, rows: Sequence[Row]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return each continuation's log-likelihood, and whether it is the likeliest at each token.

        In the order of the rows, and of the continuations in each. Either all rows have branches or
        none, and they have them only where the model can read these.
        """
        if self.is_seq2seq:
            logits, predicted = self._seq2seq(rows)
        elif rows[0].is_plain:
            logits, predicted = self._plain(rows)
        else:
            logits, predicted = self._branched(rows)
        return self._summed(logits, predicted)

    @property
    def longest_branched(self) -> int:
        """How many tokens a row may have whose continuations are read with its context at once."""
        if self.is_seq2seq:  # a decoder reads each by itself
            return 2**62
        return self._window if self.branches else 0

    def hidden_call(self, ids: Tensor, keep: int, **arguments: Any) -> Tensor:
        """Return the logits at the last ``keep`` positions."""
        if "logits_to_keep" in self._takes:
            arguments["logits_to_keep"] = keep
        if "use_cache" in self._takes:
            arguments["use_cache"] = False
        with self._fabric.autocast():
            output = self.module(input_ids=ids, **arguments)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits[:, -keep:]

    def next_logits(self, texts: Sequence[Tokens]) -> Tensor:
        """Return the logits of the token after each text, of shape (texts, vocabulary)."""
        width = max(map(len, texts))
        lengths = torch.tensor(list(map(len, texts)), device=self._fabric.device)
        keep = 1 + width - int(lengths.min())
        logits = self.hidden_call(self._padded(texts, width), keep)
        return logits[torch.arange(len(texts), device=logits.device), lengths - 1 - width + keep]

    def _plain(self, rows: Sequence[Row]) -> tuple[Tensor, Predicted]:
        """Read sequences that are filled up at their ends, which nothing looks at."""
        width = max(row.length for row in rows)
        keep = 1 + width - min(len(row.context) for row in rows)
        logits = self.hidden_call(self._padded([row.read for row in rows], width), keep)
        return logits, _predicted(rows, [width] * len(rows))

    def _branched(self, rows: Sequence[Row]) -> tuple[Tensor, Predicted]:
        """Read rows whose continuations see the context and themselves, but not each other."""
        width = max(row.length for row in rows)
        keep = 1 + max(row.length - len(row.context) for row in rows)
        ids = np.full((len(rows), width), self._padding)
        branch = np.full((len(rows), width), -1)
        position = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            at = width - row.length
            ids[i, at:], branch[i, at:], position[i, at:] = row.read, row.branch, row.position
        device = self._fabric.device
        logits = self.hidden_call(
            torch.from_numpy(ids).to(device),
            keep,
            attention_mask=self._mask(torch.from_numpy(branch).to(device)),
            position_ids=torch.from_numpy(position).to(device),
        )
        return logits, _predicted(rows, [row.length for row in rows])

    def _mask(self, branch: Tensor) -> Tensor:
        """Return what is added to attention scores, of shape (rows, 1, width, width)."""
        width = branch.shape[1]
        queries, keys = branch[:, :, None], branch[:, None, :]
        seen = (keys == queries).logical_or_(keys == 0)
        seen &= torch.ones(width, width, dtype=torch.bool, device=branch.device).tril()
        dtype = next(self.module.parameters()).dtype
        values = torch.tensor([torch.finfo(dtype).min, 0], dtype=dtype, device=branch.device)
        return torch.where(seen, values[1], values[0])[:, None]

    def _seq2seq(self, rows: Sequence[Row]) -> tuple[Tensor, Predicted]:
        """Read each context once by the encoder, and each continuation by the decoder."""
        module: Any = self.module
        width = max(len(row.context) for row in rows)
        ids = self._padded([row.context for row in rows], width)
        mask = self._padded([(1,) * len(row.context) for row in rows], width, fill=0)
        counts = torch.tensor([len(row.continuations) for row in rows], device=ids.device)
        with self._fabric.autocast():
            states = module.get_encoder()(input_ids=ids, attention_mask=mask)
        states.last_hidden_state = states.last_hidden_state.repeat_interleave(counts, dim=0)
        alone = [one for row in rows for one in row.alone()]
        start = self._padding if self._start is None else self._start
        written = [(start, *one.continuations[0][:-1]) for one in alone]
        longest = max(map(len, written))
        with self._fabric.autocast():
            logits: Tensor = module(
                encoder_outputs=states,
                attention_mask=mask.repeat_interleave(counts, dim=0),
                decoder_input_ids=self._padded(written, longest),
                use_cache=False,
            ).logits
        # The decoder reads no context; its first token predicts the first of a continuation.
        return logits, _predicted(alone, [longest + len(one.context) - 1 for one in alone])

    def _padded(
        self,
        parts: Sequence[Tokens | NDArray[np.int32]],
        width: int,
        fill: int | None = None,
    ) -> Tensor:
        ids = np.full((len(parts), width), self._padding if fill is None else fill)
        for i, own in enumerate(parts):
            ids[i, : len(own)] = own
        return torch.from_numpy(ids).to(self._fabric.device)

    def _summed(
        self, logits: Tensor, predicted: Predicted
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Add up the log-likelihoods of each request's tokens; a token's is taken in float32."""
        device = logits.device
        rows = torch.from_numpy(predicted.rows).to(device)
        columns = torch.from_numpy(logits.shape[1] - predicted.columns).to(device)
        tokens = torch.from_numpy(predicted.tokens).to(device)
        values, likeliest = [], []
        step = max(1, _NUMBERS // logits.shape[-1])
        for i in range(0, len(rows), step):
            part = logits[rows[i : i + step], columns[i : i + step]].float()
            wanted = tokens[i : i + step]
            own, most = part.gather(1, wanted[:, None])[:, 0], part.amax(dim=-1)
            # Of several that are the greatest, greedy decoding takes the first.
            greedy = own == most
            greedy[greedy.clone()] = part[greedy].argmax(dim=-1) == wanted[greedy]
            likeliest.append(greedy)
            values.append(own - most - part.sub_(most[:, None]).exp_().sum(dim=-1).log_())
        found = torch.cat(values).cpu().numpy().astype(np.float64)
        wrong = ~torch.cat(likeliest).cpu().numpy()
        count = int(predicted.requests[-1]) + 1
        sums = np.bincount(predicted.requests, weights=found, minlength=count)
        missed = np.bincount(predicted.requests, weights=wrong, minlength=count)
        return sums.astype(np.float64), np.asarray(missed == 0)


def wide(tensor: Tensor) -> Tensor:
    """Return it in float32, or in float64 where it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _predicted(rows: Sequence[Row], ends: Sequence[int]) -> Predicted:
    """Put together where the rows' tokens are predicted.

    Args:
        rows: the rows.
        ends: the last position of the batch, counted from the first token of each row, plus 1.
    """
    counts = np.concatenate([row.counts for row in rows])
    return Predicted(
        rows=np.repeat(np.arange(len(rows)), [len(row.tokens) for row in rows]),
        columns=np.concatenate([end - row.at for row, end in zip(rows, ends, strict=True)]),
        tokens=np.concatenate([row.tokens for row in rows]),
        requests=np.repeat(np.arange(len(counts)), counts),
    )
