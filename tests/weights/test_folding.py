from fusion_bench.weights.folding import folded

KEYS = [
    "model.embed.weight",
    *(
        f"model.layers.{layer}.{part}"
        for layer in range(4)
        for part in ("attn.q", "attn.k", "mlp.up", "mlp.down", "norm")
    ),
    "model.norm.weight",
    "head.weight",
    "head.bias",
]


def find(*pieces: str) -> list[str]:
    return [key for key in KEYS if any(piece in key for piece in pieces)]


def test_layers_and_parts_are_folded() -> None:
    assert folded(find(".attn."), KEYS) == "model.layers.{0-3}.attn.* (8 tensors)"
    assert folded(find("layers.2."), KEYS) == "model.layers.2.* (5 tensors)"
    assert folded(find("layers.0.norm", "layers.1.norm", "layers.3.norm"), KEYS) == (
        "model.layers.{0-1,3}.norm (3 tensors)"
    )


def test_what_lies_outside_of_layers_keeps_its_order() -> None:
    assert folded(find("embed", "layers.1.attn", "head"), KEYS) == (
        "model.embed.weight, model.layers.1.attn.*, head.* (5 tensors)"
    )


def test_everything_and_one() -> None:
    assert folded(KEYS, KEYS) == "all 24 tensors"
    assert folded(["head.bias"], KEYS) == "head.bias"


def test_there_is_no_flood() -> None:
    keys = find("attn.q", "norm", "embed", "head.bias", "mlp.up")
    assert folded(keys, KEYS, most=3) == (
        "model.embed.weight, model.layers.{0-3}.attn.q, 4 more patterns (15 tensors)"
    )


def test_a_star_stands_for_nothing_else() -> None:
    keys = [key for key in KEYS if key != "model.layers.3.mlp.up"]
    assert folded(keys, KEYS, most=9).startswith(
        "model.embed.weight, model.layers.{0-3}.attn.*, model.layers.{0-3}.mlp.down, "
        "model.layers.{0-3}.norm, model.layers.{0-2}.mlp.up, "
    )
