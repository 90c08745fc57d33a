"""A language model that answers requests: in batches, on several processes, and none twice."""

import logging
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fusion_bench.memory import out_of_memory
from fusion_bench.problems import FusionBenchError
from fusion_bench.progress import step
from fusion_bench.results import RequestStore
from fusion_bench.taskpool.language.encoding import Encoder
from fusion_bench.taskpool.language.forward import Forward
from fusion_bench.taskpool.language.requests import Generation, Likelihood, Tokens
from fusion_bench.taskpool.language.rows import Row, Rows
from fusion_bench.taskpool.language.writing import Writer
from fusion_bench.taskpool.task import Evaluation
from fusion_bench.threads import suited_threads

if TYPE_CHECKING:
    from fusion_bench.tokenizer import TokenizerSource

log = logging.getLogger(__name__)

R = TypeVar("R", Likelihood, Generation)
T = TypeVar("T", bound="Reads")

#: Where neither model nor tokenizer tells how much the model reads.
_LONGEST = 2048
#: Values of this kind, which stand for "no limit", are no length.
_NO_LIMIT = 10**9
#: Log-likelihoods of a row and of its parts may differ by so much, relative to their size.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_COARSE = 5e-2


class Reads(Protocol):
    """What a model reads at once."""

    @property
    def tokens(self) -> Tokens:
        """Its tokens."""


class LanguageModel:
    """A model with its tokenizer.

    Every process calls each method with the same requests, and gets the same answers, in their
    order.

    Args:
        module: on Fabric's device and in eval mode; for likelihoods and for writing a causal model
            or an encoder-decoder.
        source: the tokenizer.
        how: device, precision, batches, memory, and what answers are kept under.
        max_length: the most tokens that the model is given, as far as it has positions for them; by
            default what it or the tokenizer says.
        rows: those of the model that was asked before, which may have been asked the same.

    Attributes:
        module: likewise.
        how: likewise.
        max_length: likewise.
        encoder: from texts to tokens.
        truncated: the numbers of the last requests that were longer, whose contexts lost their
            beginnings.
        overlong: of those whose continuations are longer by themselves, and were read in parts.
    """

    def __init__(
        self,
        module: nn.Module,
        source: "TokenizerSource",
        how: Evaluation,
        max_length: int | None = None,
        rows: Rows | None = None,
    ):
        self.module = module
        self.how = how
        config: Any = getattr(module, "config", None)
        seq2seq = bool(getattr(config, "is_encoder_decoder", False))
        self.encoder = Encoder(source.tokenizer, seq2seq)
        self._forward = Forward(module, how.fabric, self.encoder.padding)
        self._writer = Writer(self._forward, self.encoder, how.fabric)
        self._positions = _positions(config)
        most = max_length or read_at_most(config, source.tokenizer.model_max_length)
        self.max_length = most if self._positions is None else min(most, self._positions)
        self.truncated: set[int] = set()
        self.overlong: set[int] = set()
        self._rows = Rows() if rows is None else rows
        self._compared = False
        self._store = None
        if how.computation is not None:
            self._store = RequestStore(
                {
                    "model": how.computation,
                    "tokenizer": source.identity,
                    "max_length": self.max_length,
                }
            )

    def log_likelihoods(
        self, requests: Sequence[Likelihood]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return each continuation's log-likelihood in nats, and whether greedy decoding gives it.

        Raises:
            FusionBenchError: values that are not finite, or tokens that the model does not know.
            EnvironmentProblem: there is not even memory for one request.
        """
        parts, owners = self._fitting(requests)
        answers = np.zeros((len(parts), 2))

        def compute(todo: NDArray[np.int64]) -> None:
            rows = self._rows.of(parts, todo, self._forward.longest_branched)
            for plain in (False, True):  # those without branches need no mask
                own = [row for row in rows if row.is_plain == plain]
                self._batches(own, lambda row: row.length, self._log_likelihoods, keep)

        def keep(rows: Sequence[Row], found: tuple[NDArray[Any], NDArray[Any]]) -> None:
            places = [place for row in rows for place in row.places]
            sums, greedy = found
            self._refuse_infinite(sums)
            answers[places] = np.stack([sums, greedy], axis=1)
            self._keep(parts, places, lambda place: struct.pack("<dd", *answers[place]))

        def take(place: int, content: bytes) -> None:
            answers[place] = struct.unpack("<dd", content)

        self._answer(parts, compute, take)
        total = self._agreed(answers)
        sums = np.bincount(owners, weights=total[:, 0], minlength=len(requests))
        wrong = np.bincount(owners, weights=1 - total[:, 1], minlength=len(requests))
        return sums.astype(np.float64), np.asarray(wrong == 0)

    def generate(self, requests: Sequence[Generation]) -> list[str]:
        """Return what the model writes after each context.

        Raises:
            FusionBenchError: more tokens wanted than the model reads, or tokens that it does not
                know.
            EnvironmentProblem: there is not even memory for one request.
        """
        room = [self._with_room(own) for own in requests]
        pairs = enumerate(zip(requests, room, strict=True))
        self.truncated, self.overlong = {i for i, (own, fits) in pairs if own is not fits}, set()
        requests = room
        width = max((own.max_new_tokens for own in requests), default=0)
        # 0 is for what another process writes.
        answers = np.zeros((len(requests), width + 1), dtype=np.int64)

        def put(place: int, tokens: Sequence[int]) -> None:
            answers[place, 0] = len(tokens)
            answers[place, 1 : 1 + len(tokens)] = tokens

        def compute(todo: NDArray[np.int64]) -> None:
            for settings in dict.fromkeys(requests[i].settings for i in todo):
                own = [int(i) for i in todo if requests[i].settings == settings]
                self._batches(
                    own,
                    lambda i: len(requests[i].context),
                    lambda part: self._writer.write([requests[i] for i in part]),
                    keep,
                )

        def keep(places: Sequence[int], found: list[list[int]]) -> None:
            for place, tokens in zip(places, found, strict=True):
                put(place, tokens)
            self._keep(
                requests,
                places,
                lambda place: answers[place, 1 : 1 + answers[place, 0]].astype("<i4").tobytes(),
            )

        def take(place: int, content: bytes) -> None:
            put(place, np.frombuffer(content, dtype="<i4").tolist())

        self._answer(requests, compute, take)
        total = self._agreed(answers)
        return [
            self._cut(total[i, 1 : 1 + total[i, 0]].tolist(), own.stop)
            for i, own in enumerate(requests)
        ]

    def values(
        self, rows: Sequence[T], answer: Callable[[Sequence[T]], Tensor], width: int
    ) -> NDArray[np.float64]:
        """Return what a function of the model makes of rows, of shape (rows, width).

        Args:
            rows: what the model reads.
            answer: returns a tensor of shape (some rows, width).
            width: how many values a row has.

        Raises:
            FusionBenchError: values that are not finite, or tokens that the model does not know.
            EnvironmentProblem: there is not even memory for one row.
        """
        self._refuse_unknown(own.tokens for own in rows)
        answers = np.zeros((len(rows), width))

        def keep(places: Sequence[int], found: Tensor) -> None:
            answers[places] = found.double().cpu().numpy()

        with self._computing():
            self._batches(
                range(len(rows)),
                lambda i: len(rows[i].tokens),
                lambda part: answer([rows[i] for i in part]),
                keep,
            )
        total = cast("NDArray[np.float64]", self._agreed(answers))
        self._refuse_infinite(total)
        return total

    def _answer(
        self,
        requests: Sequence[R],
        compute: Callable[[NDArray[np.int64]], None],
        take: Callable[[int, bytes], None],
    ) -> None:
        """Take what is known; let ``compute`` answer the others, which are the same everywhere."""
        self._refuse_unknown(
            own.context + (own.continuation if isinstance(own, Likelihood) else ())
            for own in requests
        )
        missing = np.ones(len(requests), dtype=np.int64)
        if self._store is not None and self.how.fabric.global_rank == 0:
            keys = [own.key() for own in requests]
            known = self._store.known(keys)
            for place, key in enumerate(keys):
                if key in known:
                    take(place, known[key])
                    missing[place] = 0
        if self.how.fabric.world_size > 1:
            missing = cast("NDArray[np.int64]", self.how.fabric.broadcast(missing))
        with self._computing():
            compute(np.flatnonzero(missing))

    @contextmanager
    def _computing(self) -> Iterator[None]:
        elements = sum(parameter.numel() for parameter in self.module.parameters())
        with suited_threads(elements, self.how.fabric.device), torch.inference_mode():
            yield

    def _batches(
        self,
        items: Sequence[Any],
        length: Callable[[Any], int],
        answer: Callable[[Sequence[Any]], Any],
        keep: Callable[[Sequence[Any], Any], None],
    ) -> None:
        """Answer this process's share of the items, the longest first, so that batches fit."""
        how = self.how
        ordered = sorted(items, key=length, reverse=True)
        mine = ordered[how.fabric.global_rank :: how.fabric.world_size]
        size = how.loading.batch_size
        with step("", len(mine), "requests") as shown:
            done = 0
            while done < len(mine):
                part = mine[done : done + how.batch_limit.size(size)]
                found = None
                try:
                    found = answer(part)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                if found is None:  # only here nothing holds on to what the model had computed
                    how.batch_limit.halve(len(part), how.progress)
                    continue
                keep(part, found)
                done += len(part)
                shown.advance(len(part))
        how.batch_limit.agree(how.fabric)

    def _log_likelihoods(
        self, rows: Sequence[Row]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        found = self._forward.log_likelihoods(rows)
        if rows[0].is_plain or self._compared or self._forward.is_seq2seq:
            return found
        # A model of a kind that nobody knows might read branches as if they were one text.
        self._compared = True
        parts = rows[0].alone()
        alone, _ = self._forward.log_likelihoods(parts)
        together = found[0][: len(parts)]
        if not np.isfinite(alone).all():
            return found  # which is refused
        dtype = next(self._forward.module.parameters()).dtype
        exact = self.how.fabric.strategy.precision.precision in ("32-true", "64-true")
        tolerance = _TOLERANCE.get(dtype, _COARSE) if exact else _COARSE
        if (np.abs(alone - together) <= tolerance * (1 + np.abs(alone))).all():
            return found
        log.warning(
            "'%s' cannot read several continuations of a context at once; they are read one by "
            "one, which is slower.",
            self.how.model,
        )
        self._forward.branches = False
        return self._forward.log_likelihoods([one for row in rows for one in row.alone()])

    def _cut(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        text = self.encoder.decoded(tokens)
        for end in stop:
            text = text.partition(end)[0]
        return text

    def _fitting(
        self, requests: Sequence[Likelihood]
    ) -> tuple[list[Likelihood], NDArray[np.int64]]:
        """Return requests that the model can read, and the number of the one that each is of.

        A context loses its beginning. A continuation that is longer by itself is read in parts,
        each after as much of the text before it as there is room for.
        """
        fitting: list[Likelihood] = []
        owners: list[int] = []
        most = self.max_length
        self.truncated, self.overlong = set(), set()
        for number, own in enumerate(requests):
            context, continuation = own.context, own.continuation
            if self._forward.is_seq2seq:
                if len(context) > most:
                    self.truncated.add(number)
                self._refuse_long(len(continuation))
                parts = [Likelihood(context[-most:], continuation)]
            elif len(context) + len(continuation) <= most + 1:
                parts = [own]
            elif len(continuation) <= most:
                self.truncated.add(number)
                parts = [Likelihood(context[-(most + 1 - len(continuation)) :], continuation)]
            else:
                self.overlong.add(number)
                parts = windows(context + continuation, len(context), most, most)
            fitting += parts
            owners += [number] * len(parts)
        return fitting, np.array(owners, dtype=np.int64)

    def _with_room(self, request: Generation) -> Generation:
        room = self.max_length
        if self._forward.is_seq2seq:
            self._refuse_long(request.max_new_tokens)
        else:
            room -= request.max_new_tokens
        if room < 1:
            raise FusionBenchError(
                f"asks for {request.max_new_tokens} new tokens, and the model reads no more than "
                f"{self.max_length}.",
                "Ask for fewer.",
                place=("max_new_tokens",),
            )
        if len(request.context) <= room:
            return request
        return replace(request, context=request.context[-room:])

    def _refuse_long(self, count: int) -> None:
        """Refuse more tokens than a decoder has positions for."""
        if self._positions is not None and count > self._positions:
            raise FusionBenchError(
                f"an answer has {count} tokens, and the decoder of '{self.how.model}' writes no "
                f"more than {self._positions}.",
                "Ask for fewer.",
            )

    def _refuse_infinite(self, values: NDArray[np.float64]) -> None:
        if not np.isfinite(values).all():
            raise FusionBenchError(
                f"'{self.how.model}' gives values that are no numbers (NaN or infinite). Look at "
                "its weights, or choose fabric.precision=32-true."
            )

    def _refuse_unknown(self, texts: Iterable[Tokens]) -> None:
        """Refuse tokens beyond the embedding, which a GPU would only call an assertion."""
        rows = self._forward.rows_of_embedding
        if rows is None:
            return
        for tokens in texts:
            if (largest := max(tokens)) >= rows:
                raise FusionBenchError(
                    f"the tokenizer has a token {largest}, and the embedding of '{self.how.model}'"
                    f" has {rows} rows.",
                    "Name the tokenizer that belongs to the models.",
                    place=("tokenizer",),
                )

    def _keep(
        self, requests: Sequence[R], places: Sequence[int], content: Callable[[int], bytes]
    ) -> None:
        if self._store is not None:
            self._store.keep({requests[place].key(): content(place) for place in places})

    def _agreed(self, values: NDArray[Any]) -> NDArray[Any]:
        """Put the processes' values together; where one has a value all others have zero."""
        fabric = self.how.fabric
        if fabric.world_size == 1:
            return values
        total = fabric.all_reduce(torch.from_numpy(values).to(fabric.device), reduce_op="sum")
        return cast("Tensor", total).cpu().numpy()


def windows(tokens: Tokens, first: int, longest: int, stride: int) -> list[Likelihood]:
    """Split a text into requests that score each token from ``first`` on once.

    Args:
        tokens: the text.
        first: where scoring begins, at least 1.
        longest: the most tokens that are read at once.
        stride: how many tokens a window scores after the first one, which scores as many as it
            reads; the more it reads before them, the better they are predicted.
    """
    found = []
    begin = first
    while begin < len(tokens):
        count = stride
        if begin == first:
            count = max(stride, longest + 1 - first)
        end = min(begin + count, len(tokens))
        start = max(0, end - 1 - longest)
        found.append(Likelihood(tokens[min(start, begin - 1) : begin], tokens[begin:end]))
        begin = end
    return found


def read_at_most(config: Any, of_tokenizer: int) -> int:
    """Return how many tokens a model reads, as its config says, or else its tokenizer."""
    if (own := _positions(config)) is not None:
        return own
    return of_tokenizer if of_tokenizer < _NO_LIMIT else _LONGEST


def _positions(config: Any) -> int | None:
    """Return how many tokens a model has positions for; ``None`` where it does not say so."""
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
