"""A model's config: what of it decides what the model computes."""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

#: A model's config, as ``config.json`` has it.
Config = Mapping[str, Any]
#: How much a key decides. What decides nothing changes no number, or is told by the weights' shapes
#: and names as well. Weights that were trained with one value of what decides much are no good with
#: another.
Decides = Literal["nothing", "little", "much"]

_NOTHING = re.compile(
    # What a model is called, and how it is stored and loaded.
    r"_?name_or_path|transformers_version|_commit_hash|architectures|(torch_)?dtype|use_bfloat16"
    r"|torchscript|_?(attn|experts)_implementation\w*|gradient_checkpointing|quantization_config"
    r"|disable_custom_kernels|reorder_and_upcast_attn|pretraining_tp|freeze_\w+"
    # What it returns, and how it goes on with a text.
    r"|output_(attentions|hidden_states|scores|past|router_logits)|(use_)?return_dict\w*|use_cache"
    r"|chunk_size_feed_forward|task_specific_params|prefix|(min|max)_length|max_new_tokens|top_[kp]"
    r"|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|typical_p"
    r"|repetition_penalty|length_penalty|(encoder_)?no_repeat_ngram_size|bad_words_ids"
    r"|num_return_sequences|remove_invalid_values|exponential_decay_length_penalty"
    r"|(begin_)?suppress_tokens|forced_[a-z]+_token_id"
    # Its classes.
    r"|id2label|label2id|_?num_labels|num_classes|label_names|problem_type|finetuning_task|summary_\w+"
    # What shapes and names tell, tied entries among them.
    r"|tie_\w+|vocab_size|type_vocab_size|hidden_sizes|hidden_dim|\w*_bias|depths?"
    r"|(\w+_)?(hidden|intermediate|output)_size"
    r"|num_(hidden_|encoder_|decoder_)?layers|n_layers?|(encoder|decoder)_(layers|ffn_dim)|ffn_dim"
    r"|n_embd|n_inner|d_model|d_ff|dim|embed_dim|embedding_size|projection_dim|mlp_(dim|ratio)"
    r"|add_cross_attention"
)
_LITTLE = re.compile(
    r"\w*eps(ilon)?|\w*drop\w*|\w*init\w*|\w+_token_(id|index)|\w*(loss|coef)\w*|mask_\w+"
    r"|label_smoothing|apply_spec_augment|max_\w+|n_positions|n_ctx|seq_length|context_length"
    r"|encoder_stride|layerscale_value"
)
_MUCH = re.compile(
    # Activations and norms.
    r"(^|_)act(_|$)|activation|gated|feed_forward_proj|act_fn|norm|softcap|scal|multiplier"
    # Attention, and where a token stands.
    r"|head|(^|_)[dn]?_?kv(_|$)|multi_query|qk_|parallel|decoder_architecture|attention_(types|layers)"
    r"|window|sliding|layer_types|chunk|local|global|causal|bidirectional|is_decoder|is_encoder"
    r"|rope|rotary|alibi|position|(abs|rel)_pos|relative|timescale"
    # Pictures and sounds.
    r"|image_size|patch|stride|kernel|channels|sampl|merge_size|pool|feature_layer|select_strategy"
    # Experts.
    r"|expert|topk|routed"
    r"|^model_type$"
)


def decides(key: str) -> Decides:
    """Return how much a key decides, by its name; of one that is not known, little."""
    if _NOTHING.fullmatch(key):
        return "nothing"
    if _LITTLE.fullmatch(key):
        return "little"
    return "much" if _MUCH.search(key) else "little"


def deciding(config: Config) -> dict[str, Any]:
    """Return the keys that decide anything, at any depth."""
    return {
        key: deciding(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if decides(key) != "nothing"
    }


def plain(config: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a config as it would be read from a file."""
    content: dict[str, Any] = json.loads(json.dumps(config, default=str, skipkeys=True))
    return content


def vocabulary(config: Config | None) -> int | None:
    """Return how many tokens a config says that there are, if it does."""
    own = config or {}
    of_text = own.get("text_config")
    size = own.get("vocab_size")
    if not size and isinstance(of_text, Mapping):
        size = of_text.get("vocab_size")
    return size if isinstance(size, int) else None
