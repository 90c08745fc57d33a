"""Small CLIP checkpoints and image datasets, laid out as the published ones are on the Hub.

What matters for reading them is kept: the file names, the key names of transformers 4 (with
prefixes and integer `position_ids`), a full CLIPModel as the base and bare vision encoders beside
it, the old-style configs, parquet shards whose schema carries the features. Only sizes are small.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

IMAGE_SIZE = 32
BASE = "openai/clip-vit-base-patch32"
TASKS = {  # task: (name of the dataset's repository, number of classes)
    "sun397": ("sun397", 397),
    "stanford-cars": ("stanford_cars", 196),
}


def write_hub(
    root: Path,
    *,
    weights: Literal["bin", "safetensors"] = "bin",
    num_images: int = 36,
) -> dict[str, dict[str, Tensor]]:
    """Write the base, one fine-tuned encoder and one dataset a task, as a stand-in serves them.

    ``weights`` is the base's format; the published one is a pickled `pytorch_model.bin`. Returns
    the vision encoder's parameters under every model's repository name, keyed without prefix.
    """
    base = write_base(root / "models" / BASE, weights=weights)
    vision = {
        key.removeprefix("vision_model."): value
        for key, value in base.items()
        if key.startswith("vision_model.") and value.is_floating_point()
    }
    written = {BASE: vision}
    for seed, (task, (dataset, num_classes)) in enumerate(TASKS.items(), start=1):
        name = f"tanganke/clip-vit-base-patch32_{task}"
        written[name] = perturbed(vision, seed)
        write_vision_encoder(root / "models" / name, written[name])
        write_dataset(
            root / "datasets" / "tanganke" / dataset,
            class_names(num_classes),
            splits={"train": num_images // 2, "test": num_images},
            seed=seed,
            info=True,
        )
    return written


def write_base(
    folder: Path, *, weights: Literal["bin", "safetensors"] = "bin", seed: int = 0
) -> dict[str, Tensor]:
    """Write a full CLIPModel with its tokenizer and image processor; return its state dict."""
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder)
    text = {**text_config(), "vocab_size": len(vocabulary)}
    config = {"projection_dim": 16, "text_config": text, "vision_config": vision_config()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = dict(CLIPModel(CLIPConfig(**config)).state_dict())
    for tower, length in (("text_model", 77), ("vision_model", num_positions())):
        state[f"{tower}.embeddings.position_ids"] = torch.arange(length).expand(1, -1).contiguous()

    write_json(
        folder / "config.json",
        {
            "_name_or_path": BASE,
            "architectures": ["CLIPModel"],
            "initializer_factor": 1.0,
            "logit_scale_init_value": 2.6592,
            "model_type": "clip",
            "projection_dim": 16,
            "text_config": text,
            "text_config_dict": None,
            "transformers_version": None,
            "vision_config": vision_config(),
            "vision_config_dict": None,
        },
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": IMAGE_SIZE,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "resample": 3,
            "size": IMAGE_SIZE,
        },
    )
    if weights == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return state


def write_vision_encoder(folder: Path, parameters: Mapping[str, Tensor]) -> None:
    """Write a bare CLIPVisionModel as transformers 4 saved it."""
    folder.mkdir(parents=True)
    write_json(
        folder / "config.json",
        {
            "_name_or_path": BASE,
            "architectures": ["CLIPVisionModel"],
            **vision_config(),
            "model_type": "clip_vision_model",
            "torch_dtype": "float32",
            "transformers_version": "4.36.2",
        },
    )
    save_file(
        {f"vision_model.{key}": value.contiguous() for key, value in parameters.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def perturbed(parameters: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return the parameters moved by a little noise, as fine-tuning moves them."""
    noise = torch.Generator().manual_seed(seed)
    return {
        key: value + 0.02 * torch.randn(value.shape, generator=noise)
        for key, value in parameters.items()
    }


def text_config() -> dict[str, Any]:
    """Return the text tower's settings, among them the published config's wrong special ids.

    An `eos_token_id` of 2 makes transformers pool at the highest id, which is the end of the text.
    """
    return {
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 16,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 32,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "pad_token_id": 1,
        "projection_dim": 16,
    }


def vision_config() -> dict[str, Any]:
    """Return the vision tower's settings."""
    return {
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": 24,
        "image_size": IMAGE_SIZE,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 8,
        "projection_dim": 16,
    }


def num_positions() -> int:
    """Return how many positions the vision tower has: its patches and the class token."""
    return (IMAGE_SIZE // vision_config()["patch_size"]) ** 2 + 1


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Write CLIP's byte-level tokenizer with a few merges; return its vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [f"{letter}</w>" for letter in alphabet]
    merges: list[tuple[str, str]] = []
    for word in ("a", "photo", "of", "the", "class"):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
            tokens.append(pieces[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}

    special = {"bos_token": "<|startoftext|>"}
    special |= dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77).save_pretrained(folder)
    write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            **special,
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": 77,
            "name_or_path": BASE,
            "special_tokens_map_file": "./special_tokens_map.json",
            "tokenizer_class": "CLIPTokenizer",
        },
    )
    return vocabulary


def class_names(count: int) -> list[str]:
    """Return as many class names, the first ones with the underscores that real labels have."""
    return ["abbey", "airplane_cabin", "airport_terminal"] + [
        f"class_{i:03}" for i in range(3, count)
    ]


def write_dataset(
    folder: Path, names: list[str], *, splits: Mapping[str, int], seed: int = 0, info: bool = False
) -> None:
    """Write an image-classification dataset: a parquet shard a split, and its card.

    With ``info`` the card says what is in the shards, as those on the Hub do. To read this takes
    longer than all else that a test does with a dataset.
    """
    import yaml
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    (folder / "data").mkdir(parents=True)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    random = np.random.default_rng(seed)
    sizes = {}
    for split, count in splits.items():
        labels = random.integers(len(names), size=count).tolist()
        images = [{"bytes": draw(label, random), "path": None} for label in labels]
        shard = folder / "data" / f"{split}-00000-of-00001.parquet"
        Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(shard)
        sizes[split] = {"num_bytes": shard.stat().st_size, "num_examples": count}

    files = [{"split": split, "path": f"data/{split}-*"} for split in splits]
    card: dict[str, object] = {"configs": [{"config_name": "default", "data_files": files}]}
    if info:
        card["dataset_info"] = {
            "features": features._to_yaml_list(),
            "splits": [{"name": split, **size} for split, size in sizes.items()],
            "download_size": sum(size["num_bytes"] for size in sizes.values()),
            "dataset_size": sum(size["num_bytes"] for size in sizes.values()),
        }
    front = yaml.safe_dump(card, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{front}---\n# A small dataset\n", encoding="utf-8")


def draw(label: int, random: np.random.Generator) -> bytes:
    """Return an encoded picture: noise over the label's shade, now wide, now high, now grey."""
    height, width = random.integers(28, 56, size=2)
    channels = 1 if random.random() < 0.25 else 3
    noise = random.integers(0, 96, size=(height, width, channels))
    pixels = (noise + 37 * label % 160).astype(np.uint8)
    picture = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(picture, format="PNG" if channels == 1 else "JPEG")
    return picture.getvalue()


def write_json(path: Path, content: object) -> None:
    """Write a file of JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
