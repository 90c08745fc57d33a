"""What kinds of layers a module is made of, for methods that treat them differently."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Kind = Literal["linear", "convolution", "embedding", "other"]


@dataclass(frozen=True)
class Layer:
    """A module with entries of its own.

    Attributes:
        name: of the module; one that is tied to another is a layer of its own.
        kind: what it does with its weight.
        keys: the names of its entries inside of it, to their keys in the model's weights.
        transposed: whether its weight is stored as [in, out].
        is_head: whether it gives the tokens' logits.
    """

    name: str
    kind: Kind
    keys: Mapping[str, str]
    transposed: bool = False
    is_head: bool = False


def layers_of(model: nn.Module, keys: Collection[str]) -> Sequence[Layer]:
    """Return the layers of a module, in its order.

    What is inside of a module with parameters of its own belongs to that module.

    Args:
        model: the module; its values do not matter.
        keys: the keys of its entries; entries that are tied may have one key together.
    """
    stored: dict[int, str] = {}
    entries: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for key, tensor in entries.items():
        if key in keys:
            stored.setdefault(id(tensor), key)
    layers: list[Layer] = []
    output = getattr(model, "get_output_embeddings", lambda: None)()
    inside: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        own: dict[str, Tensor] = {
            **dict(module.named_parameters(recurse=False)),
            **dict(module.named_buffers(recurse=False)),
        }
        own = {part: tensor for part, tensor in own.items() if id(tensor) in stored}
        if not own:
            continue
        kind, transposed = _kind(module)
        if not {"weight"} <= own.keys() <= {"weight", "bias"}:
            kind, transposed = "other", False
        if kind == "other" and name and any(True for _ in module.children()):
            inside.append(name)
            prefix = f"{name}."
            own = {
                key.removeprefix(prefix): tensor
                for key, tensor in entries.items()
                if key.startswith(prefix) and id(tensor) in stored
            }
        found = {part: stored[id(tensor)] for part, tensor in own.items()}
        layers.append(Layer(name, kind, found, transposed, module is output))
    return layers


def _kind(module: nn.Module) -> tuple[Kind, bool]:
    """Return what a module does, and whether its weight is stored as [in, out]."""
    if isinstance(module, nn.Linear):
        return "linear", False
    if type(module).__name__ == "Conv1D":  # of transformers: a linear layer
        return "linear", True
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
        return "convolution", False
    return ("embedding" if isinstance(module, nn.Embedding) else "other"), False
