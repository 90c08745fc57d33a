"""What a language model writes after a context."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusion_bench.problems import FusionBenchError
from fusion_bench.taskpool.language.encoding import Encoder
from fusion_bench.taskpool.language.forward import Forward
from fusion_bench.taskpool.language.requests import Generation

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class Writer:
    """Lets a model write, greedily where nothing else is asked for.

    Args:
        forward: the model.
        encoder: its tokens.
        fabric: gives device and precision.
    """

    def __init__(self, forward: Forward, encoder: Encoder, fabric: "Fabric"):
        self._forward = forward
        self._encoder = encoder
        self._fabric = fabric

    def write(self, requests: Sequence[Generation]) -> list[list[int]]:
        """Return the new tokens of requests with the same settings, without that of the end.

        Raises:
            FusionBenchError: a module that is no model of transformers, and cannot write so.
        """
        ends = _Ends(requests[0].stop, self._encoder)
        if hasattr(self._forward.module, "generate"):
            return self._generated(requests, ends)
        if self._forward.is_seq2seq or requests[0].options:
            raise FusionBenchError(
                f"a {type(self._forward.module).__name__} can only write greedily, and without an "
                "encoder.",
                "Evaluate it by multiple choice.",
            )
        return self._token_by_token(requests, ends)

    def _generated(self, requests: Sequence[Generation], ends: "_Ends") -> list[list[int]]:
        """Let transformers generate."""
        from transformers import StoppingCriteriaList

        module: Any = self._forward.module
        device, padding = self._fabric.device, self._encoder.padding
        width = max(len(own.context) for own in requests)
        ids = torch.full((len(requests), width), padding)
        mask = torch.zeros_like(ids)
        for i, own in enumerate(requests):
            ids[i, width - len(own.context) :] = torch.tensor(own.context)
            mask[i, width - len(own.context) :] = 1
        first = 1 if self._forward.is_seq2seq else width
        config = {
            "max_new_tokens": requests[0].max_new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "pad_token_id": padding,
            "bos_token_id": self._encoder.prefix,
            "eos_token_id": self._encoder.eos,
            "decoder_start_token_id": getattr(module.config, "decoder_start_token_id", None),
            **requests[0].options,
        }
        stopping = StoppingCriteriaList()
        if requests[0].stop:
            stopping.append(_Stop(ends, first))
        random = [device] if device.type == "cuda" else []
        with (
            _own_generation(module, config),
            torch.random.fork_rng(devices=random),
            self._fabric.autocast(),
        ):
            torch.manual_seed(requests[0].seed)
            written = module.generate(
                ids.to(device), attention_mask=mask.to(device), stopping_criteria=stopping
            )
        return [self._until_end(own) for own in written[:, first:].tolist()]

    def _token_by_token(self, requests: Sequence[Generation], ends: "_Ends") -> list[list[int]]:
        """Read all again for each new token, which any module that gives logits can do."""
        written: list[list[int]] = [[] for _ in requests]
        unfinished = list(range(len(requests)))
        for _ in range(requests[0].max_new_tokens):
            texts = [requests[i].context + tuple(written[i]) for i in unfinished]
            found = self._forward.next_logits(texts).argmax(dim=-1).tolist()
            for i, token in zip(unfinished, found, strict=True):
                written[i].append(token)
            unfinished = [
                i
                for i in unfinished
                if written[i][-1] != self._encoder.eos and not ends.reached(written[i])
            ]
            if not unfinished:
                break
        return [self._until_end(own) for own in written]

    def _until_end(self, tokens: list[int]) -> list[int]:
        end = self._encoder.eos
        return tokens[: tokens.index(end)] if end in tokens else tokens


class _Ends:
    """Tells when a text has a stop text in it."""

    def __init__(self, stop: Sequence[str], encoder: Encoder):
        self._stop = stop
        self._encoder = encoder
        # A stop text has at most so many tokens, one for each byte, after one that it begins in.
        self._tail = 1 + max((len(text.encode()) for text in stop), default=0)

    def reached(self, tokens: Sequence[int]) -> bool:
        """Return whether the last of these tokens end a text."""
        if not self._stop:
            return False
        text = self._encoder.decoded(tokens[-self._tail :])
        return any(stop in text for stop in self._stop)


class _Stop:
    """The same, as transformers asks for it.

    Args:
        ends: tells when a text ends.
        first: the position of the first new token.
    """

    def __init__(self, ends: _Ends, first: int):
        self._ends = ends
        self._first = first
        self._done: list[bool] = []

    def __call__(self, ids: Tensor, scores: Any, **others: Any) -> Tensor:
        before = self._done or [False] * len(ids)
        rows = zip(before, ids[:, self._first :].tolist(), strict=True)
        self._done = [done or self._ends.reached(tokens) for done, tokens in rows]
        return torch.tensor(self._done, device=ids.device)


@contextmanager
def _own_generation(module: nn.Module, config: Mapping[str, Any]) -> Iterator[None]:
    """Let a model generate by these settings alone, not by its own ``generation_config``."""
    from transformers import GenerationConfig

    model: Any = module
    before = model.generation_config
    model.generation_config = GenerationConfig(**config)
    try:
        yield
    finally:
        model.generation_config = before
