"""A name for weights by their content."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch

from fusion_bench.weights.mapping import Weights

_CHUNK = 2**22  # elements that are hashed at once


def sha256(weights: Weights) -> str:
    """Return the SHA-256 over keys, shapes, dtypes and values, for any order of the keys.

    It is the hash of one line an entry, ``key shape dtype hash-of-the-bytes``, in the keys' order.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing lets other threads run
        lines = pool.map(lambda key: _line(weights, key), sorted(weights))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _line(weights: Weights, key: str) -> str:
    spec = weights.spec(key)
    digest = hashlib.sha256()
    for start in range(0, spec.numel, _CHUNK):
        values = weights.read(key, start, min(start + _CHUNK, spec.numel))
        values = values.detach().to("cpu", spec.dtype).contiguous()
        digest.update(values.view(torch.uint8).numpy().data)
    return f"{key} {spec.shape} {spec.dtype} {digest.hexdigest()}\n"
