from fusion_bench.weights import Layers

LLAMA = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{layer}.{part}.weight"
        for layer in range(11)
        for part in ("self_attn.q_proj", "mlp.experts.3.w1", "input_layernorm")
    ),
    "model.norm.weight",
    "lm_head.0.weight",
    "lm_head.0.bias",
]


def test_layers_are_counted_by_the_first_number() -> None:
    layers = Layers(LLAMA)
    assert layers.stacks == {"model.layers": tuple(range(11))}
    place = layers.place("model.layers.10.mlp.experts.3.w1.weight")
    assert place is not None
    assert (place.index, place.count, place.rest) == (10, 11, "mlp.experts.3.w1.weight")
    assert place.depth == 1.0


def test_what_is_outside_of_all_layers_has_no_place() -> None:
    layers = Layers(LLAMA)
    assert layers.place("model.norm.weight") is layers.place("lm_head.0.weight") is None


def test_an_encoder_decoder_has_two_stacks() -> None:
    keys = [
        f"{half}.block.{block}.layer.{part}.{name}.weight"
        for half in ("encoder", "decoder")
        for block in range(2 if half == "encoder" else 4)
        for part, name in enumerate(["SelfAttention.q", "DenseReluDense.wi", "layer_norm"])
    ]
    assert Layers(keys).stacks == {"encoder.block": (0, 1), "decoder.block": (0, 1, 2, 3)}


def test_layers_count_from_the_first_that_is_there() -> None:
    place = Layers([key for key in LLAMA if ".4." in key or ".6." in key]).place(
        "model.layers.6.self_attn.q_proj.weight"
    )
    assert place is not None
    assert (place.index, place.count, place.number) == (1, 2, 6)


def test_an_only_layer_is_the_deepest() -> None:
    place = Layers([key for key in LLAMA if ".4." in key]).place(
        "model.layers.4.input_layernorm.weight"
    )
    assert place is not None and place.depth == 1.0
