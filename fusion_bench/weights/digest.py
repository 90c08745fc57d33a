"""A name for weights by their content."""

import hashlib

import torch

from fusion_bench.weights.mapping import Weights


def sha256(weights: Weights) -> str:
    """Return the SHA-256 over keys, shapes, dtypes and values, whatever the keys' order."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        tensor = weights[key].contiguous().cpu()
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
