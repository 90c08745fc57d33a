"""A model's config, and which of its keys affect what the model computes."""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

#: A model's config, as ``config.json`` has it.
Config = Mapping[str, Any]
#: How much a key affects the result. "nothing": no number changes, or the value follows from the
#: weights' shapes and names. "much": weights trained with one value do not work with another.
Decides = Literal["nothing", "little", "much"]

_NOTHING = re.compile(
    # Names, storage and loading.
    r"_?name_or_path|transformers_version|_commit_hash|architectures|(torch_)?dtype|use_bfloat16"
    r"|torchscript|_?(attn|experts)_implementation\w*|gradient_checkpointing|quantization_config"
    r"|disable_custom_kernels|reorder_and_upcast_attn|pretraining_tp|freeze_\w+"
    # What it returns, and how it generates text.
    r"|output_(attentions|hidden_states|scores|past|router_logits)|(use_)?return_dict\w*|use_cache"
    r"|chunk_size_feed_forward|task_specific_params|prefix|(min|max)_length|max_new_tokens|top_[kp]"
    r"|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|typical_p"
    r"|repetition_penalty|length_penalty|(encoder_)?no_repeat_ngram_size|bad_words_ids"
    r"|num_return_sequences|remove_invalid_values|exponential_decay_length_penalty"
    r"|(begin_)?suppress_tokens|forced_[a-z]+_token_id"
    # Its classes.
    r"|id2label|label2id|_?num_labels|num_classes|label_names|problem_type|finetuning_task|summary_\w+"
    # What follows from shapes and names, including tied entries.
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
    # Attention and positions.
    r"|head|(^|_)[dn]?_?kv(_|$)|multi_query|qk_|parallel|decoder_architecture|attention_(types|layers)"
    r"|window|sliding|layer_types|chunk|local|global|causal|bidirectional|is_decoder|is_encoder"
    r"|rope|rotary|alibi|position|(abs|rel)_pos|relative|timescale"
    # Images and audio.
    r"|image_size|patch|stride|kernel|channels|sampl|merge_size|pool|feature_layer|select_strategy"
    # Experts.
    r"|expert|topk|routed"
    r"|^model_type$"
)


def decides(key: str) -> Decides:
    """Return how much a key affects the result, by its name; an unknown key counts as little."""
    if _NOTHING.fullmatch(key):
        return "nothing"
    if _LITTLE.fullmatch(key):
        return "little"
    return "much" if _MUCH.search(key) else "little"


def deciding(config: Config) -> dict[str, Any]:
    """Return the keys that affect the result, at any depth."""
    return {
        key: deciding(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if decides(key) != "nothing"
    }


def plain(config: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a config as it would be read from a JSON file."""
    content: dict[str, Any] = json.loads(json.dumps(config, default=str, skipkeys=True))
    return content


def vocabulary(config: Config | None) -> int | None:
    """Return the vocabulary size that a config states, if any."""
    own = config or {}
    of_text = own.get("text_config")
    size = own.get("vocab_size")
    if not size and isinstance(of_text, Mapping):
        size = of_text.get("vocab_size")
    return size if isinstance(size, int) else None
