"""Detects that memory ran out."""

import torch


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU's memory or the machine's is full."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text
    )
