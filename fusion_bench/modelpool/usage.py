"""The code in a model's card, which loads the model and uses it once."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

#: Where the code of a card names the model; the remark that goes with a folder's name.
_PATH = "  # or the path to this folder, from elsewhere"
_NAMED = re.compile(
    rf"^(name = |model = SentenceTransformer\()\"[^\"\n]*\"(\)?)(?:{_PATH})?$", re.MULTILINE
)
_TEXT = """\
from transformers import {auto}, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name)
model = {auto}.from_pretrained(name, dtype="auto")
inputs = tokenizer("{prompt}", return_tensors="pt")
output = model.generate(inputs["input_ids"], max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
_CAUSAL = {"auto": "AutoModelForCausalLM", "prompt": "The capital of France is"}
_SEQ2SEQ = {
    "auto": "AutoModelForSeq2SeqLM",
    "prompt": "Is this sentence positive or negative? I love it.",
}
_CHAT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
messages = [{{"role": "user", "content": "What is the capital of France?"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
_CLASSIFIER = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSequenceClassification.from_pretrained(name)
logits = model(**tokenizer("I love it.", return_tensors="pt")).logits
print(model.config.id2label[logits.argmax(-1).item()])"""
_SENTENCES = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({name})
print(model.encode(["I love it.", "It is great."]).shape)"""
_TEXTS = """\
from transformers import AutoModel, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModel.from_pretrained(name)
print(model(**tokenizer("I love it.", return_tensors="pt")).last_hidden_state.shape)"""
_PICTURES = """\
from PIL import Image
from transformers import {imported}

name = {name}
processor = {processor}.from_pretrained(name)
model = {model}.from_pretrained(name)
image = Image.new("RGB", (320, 240))  # yours: Image.open("photo.jpg")
outputs = model(**processor(images=image, return_tensors="pt"))
print({printed})"""
_PLAIN = """\
from transformers import {model}

name = {name}
model = {model}.from_pretrained(name)
print(model.config)"""

#: Heads for which transformers has a class that finds the model's own.
_HEADS = (
    "CausalLM|MaskedLM|SequenceClassification|TokenClassification|QuestionAnswering"
    "|ImageClassification"
)
_ADAPTER = """\
from peft import PeftModel
from transformers import {kind}

base = {kind}.from_pretrained({base})
name = {name}
model = PeftModel.from_pretrained(base, name)
print(model.peft_config["default"])"""


def usage(name: str, config: Mapping[str, Any], files: Collection[str]) -> str:
    """Return Python code that loads a model and uses it once.

    Args:
        name: of the model's folder or repository.
        config: its ``config.json``.
        files: the names of its files.
    """
    kind = str(next(iter(config.get("architectures") or []), ""))
    reads_text = any(file in files for file in ("tokenizer.json", "tokenizer_config.json"))
    named = {"name": _text(name)}
    if "modules.json" in files:
        return _SENTENCES.format(**named)
    if "preprocessor_config.json" in files and "processor_config.json" not in files:
        code = _pictures(kind, config)
        if code is not None:
            return code.format(**named)
    if reads_text and re.search("ForCausalLM|LMHeadModel", kind):
        talks = "chat_template.jinja" in files
        return _CHAT.format(**named) if talks else _TEXT.format(**_CAUSAL, **named)
    if reads_text and config.get("is_encoder_decoder"):
        return _TEXT.format(**_SEQ2SEQ, **named)
    if reads_text and "ForSequenceClassification" in kind:
        return _CLASSIFIER.format(**named)
    if reads_text and not kind.startswith("CLIP"):
        return _TEXTS.format(**named)
    return _PLAIN.format(model=_plain_class(kind, config), **named)


def _plain_class(kind: str, config: Mapping[str, Any]) -> str:
    """Return the class that loads a model with its head."""
    if config.get("model_type") == "clip_vision_model":
        return "CLIPVisionModel"
    if config.get("is_encoder_decoder") and re.search("ForConditionalGeneration|LMHeadModel", kind):
        return "AutoModelForSeq2SeqLM"
    if "LMHeadModel" in kind:
        return "AutoModelForCausalLM"
    head = re.search(f"For({_HEADS})$", kind)
    return "AutoModel" if head is None else f"AutoModel{head[0]}"


def adapter_usage(name: str, settings: Mapping[str, Any]) -> str | None:
    """Return Python code that puts an adapter on its base; None where it names no base or class.

    Args:
        name: of the adapter's folder or repository.
        settings: its ``adapter_config.json``.
    """
    base = settings.get("base_model_name_or_path")
    kind = (settings.get("auto_mapping") or {}).get("base_model_class")
    if not isinstance(base, str) or kind is None:
        return None
    return _ADAPTER.format(name=_text(name), base=_text(base), kind=kind)


def _pictures(kind: str, config: Mapping[str, Any]) -> str | None:
    """Return code for a model of pictures."""
    if config.get("model_type") == "clip_vision_model" or kind == "CLIPVisionModel":
        parts = ("CLIPVisionModel", "CLIPImageProcessor", "outputs.pooler_output.shape")
    elif "ForImageClassification" in kind:
        label = "model.config.id2label[outputs.logits.argmax(-1).item()]"
        parts = ("AutoModelForImageClassification", "AutoImageProcessor", label)
    elif "text_config" in config:
        return None
    else:
        parts = ("AutoModel", "AutoImageProcessor", "outputs.last_hidden_state.shape")
    model, processor, printed = parts
    values = {"model": model, "processor": processor, "printed": printed}
    values["imported"] = ", ".join(sorted((model, processor)))
    return re.sub(r"{(\w+)}", lambda found: values.get(found[1], found[0]), _PICTURES)


def renamed(card: str, name: str) -> str:
    """Return a card whose code loads the model by another name."""
    return _NAMED.sub(lambda found: f"{found[1]}{_text(name)}{found[2]}", card, count=1)


def of_folder(code: str) -> str:
    """Return code with a remark that the name in it stands for a folder's path."""
    return _NAMED.sub(lambda found: f"{found[0]}{_PATH}", code, count=1)


def _text(name: str) -> str:
    """Return a name as text in Python."""
    return json.dumps(name, ensure_ascii=False)
