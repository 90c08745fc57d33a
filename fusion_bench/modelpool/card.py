"""How a merged model came about: the recipe in its metadata, and the card beside it.

A card is text that people may edit: what is added later replaces its own section alone.
"""

import json
import os
import re
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fusion_bench import __version__
from fusion_bench.command import typed
from fusion_bench.forms import plain_yaml
from fusion_bench.problems import FusionBenchError
from fusion_bench.redact import redacted
from fusion_bench.repository import Repository
from fusion_bench.shown import visible

#: A model's card, whose header states the license.
_CARD = "README.md"
_LONGEST_LICENSE = 80
_OTHER = "other: "
#: Where the code of a card names the model; the remark that goes with a folder's name.
_PATH = "  # or the path to this folder, from elsewhere"
_NAMED = re.compile(
    rf"^(name = |model = SentenceTransformer\()\"[^\"\n]*\"(\)?)(?:{_PATH})?$", re.MULTILINE
)
#: Before which section others are put.
_LAST = "Recipe"
_CAUSAL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
inputs = tokenizer("The capital of France is", return_tensors="pt")
output = model.generate(inputs["input_ids"], max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
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
_SEQ2SEQ = """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSeq2SeqLM.from_pretrained(name, dtype="auto")
inputs = tokenizer("Is this sentence positive or negative? I love it.", return_tensors="pt")
output = model.generate(inputs["input_ids"], max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
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


@dataclass(frozen=True)
class Origin:
    """Where a model came from.

    Attributes:
        name: what the config calls it.
        commit: its state on the Hub.
        files: what its weights were read from.
        base: what an adapter was put on.
        license: what its own card says.
        models: what a merge was made of; it has no files itself.
    """

    name: str
    commit: str | None = None
    files: tuple[Path, ...] = ()
    base: "Origin | None" = None
    license: str | None = None
    models: "Mapping[str, Origin]" = field(default_factory=dict)


def stored(sources: Mapping[str, Origin]) -> dict[str, Origin]:
    """Return sources with the models of a merge in its place, as ``merge/model``."""
    found: dict[str, Origin] = {}
    for name, source in sources.items():
        inside = stored(source.models)
        found |= {f"{name}/{inner}": own for inner, own in inside.items()} or {name: source}
    return found


def stated_license(place: Repository) -> str | None:
    """Return the license that a model's card states, if it does; ``other: name`` for a rare one."""
    if _CARD not in place.files:
        return None
    from huggingface_hub import metadata_load

    try:
        content = metadata_load(place.fetch(_CARD) / _CARD) or {}
    except (FusionBenchError, ValueError, yaml.YAMLError, OSError, UnicodeDecodeError):
        return None  # a merge does not fail for its sake
    found, name = content.get("license"), content.get("license_name")
    if found == "other" and isinstance(name, str):
        found = f"{_OTHER}{name}"
    return " ".join(found.split())[:_LONGEST_LICENSE] if isinstance(found, str) else None


def recipe(
    config: Mapping[str, Any] | None,
    sources: Mapping[str, Origin],
    sha256: Callable[[Path], str],
    beside: Mapping[str, str] | None = None,
    path: Path | None = None,
) -> dict[str, Any]:
    """Return all that is needed to make the model again, as plain data.

    Folders keep the names that were typed. Where one is relative, ``folder`` tells what to: the
    folder of the run as seen from the model's, which names no more of this machine than it must.

    Args:
        config: the run's config.
        sources: name to source.
        sha256: gives a file's hash.
        beside: the hashes of the files beside the weights, such as config and tokenizer.
        path: the model's folder.
    """
    program, *words = typed()
    return {
        "version": __version__,
        "command": redacted(shlex.join([Path(program).name, *words])),
        **({} if path is None or not _relative(sources) else {"folder": _run_from(path)}),
        "sources": {
            name: {
                "source": source.name,
                **({"commit": source.commit} if source.commit else {}),
                **({} if source.base is None else _base(source.base)),
                **({} if source.license is None else {"license": source.license}),
                "sha256": {file.name: sha256(file) for file in source.files},
            }
            for name, source in sources.items()
        },
        **({"files": dict(beside)} if beside else {}),
        "config": dict(config or {}),
    }


def _relative(sources: Mapping[str, Origin]) -> bool:
    """Tell whether a source is named by a path from where the run is."""
    named = [own for source in sources.values() for own in (source, source.base) if own is not None]
    return any(
        own.commit is None and not Path(own.name).is_absolute() and Path(own.name).exists()
        for own in named
    )


def _run_from(path: Path) -> str:
    return Path(os.path.relpath(Path.cwd(), path.resolve())).as_posix()


def model_card(
    title: str, recipe: Mapping[str, Any], code: str | None = None, *, adapter: bool = False
) -> str:
    """Return the ``README.md`` of a merged model, with the header that the Hub reads.

    Args:
        title: the model's name.
        recipe: how it was made.
        code: how it is used.
        adapter: whether it is a LoRA adapter.
    """
    from huggingface_hub import ModelCardData

    sources: Mapping[str, Mapping[str, Any]] = recipe["sources"]
    named = [(s["source"], s.get("commit")) for s in sources.values()]
    named += [(s["base"], s.get("base_commit")) for s in sources.values() if "base" in s]
    bases = list(dict.fromkeys(name.partition("@")[0] for name, commit in named if commit))
    licenses = {source.get("license") for source in sources.values()}
    common = (next(iter(licenses)) or "") if len(licenses) == 1 else ""
    header = ModelCardData(
        library_name="peft" if adapter else "transformers",
        license="other" if common.startswith(_OTHER) else common or None,
        license_name=common.removeprefix(_OTHER) if common.startswith(_OTHER) else None,
        base_model=bases or None,
        base_model_relation=("adapter" if adapter else "merge") if bases else None,
        tags=[*(["lora"] if adapter else []), "merge", "fusion_bench"],
    ).to_yaml()
    rows = [
        f"| {_cell(name)} | {_place(source)} | {source.get('commit', '')} | {_license(source)} |"
        for name, source in sources.items()
    ]
    text = plain_yaml(dict(recipe))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return "\n".join(
        [
            "---",
            header,
            "---",
            "",
            f"# {title}",
            "",
            f"{'This LoRA adapter was made' if adapter else 'These weights were merged'} by "
            f"FusionBench {recipe['version']} from the models below.",
            "",
            "| Name | Origin | Commit | License |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            *_of_licenses(licenses),
            "The command was",
            "",
            "```bash",
            recipe["command"].replace("```", "` ` `"),
            "```",
            "",
            *([] if code is None else ["## Usage", "", "```python", code, "```", ""]),
            f"## {_LAST}",
            "",
            f"{fence}yaml",
            text.rstrip(),
            fence,
            "",
        ]
    )


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
        return (_CHAT if talks else _CAUSAL).format(**named)
    if reads_text and config.get("is_encoder_decoder"):
        return _SEQ2SEQ.format(**named)
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


def with_section(card: str, title: str, body: str) -> str:
    """Return a card with a section, in place of the one of that title or before the recipe."""
    section = f"## {title}\n\n{body.strip()}\n\n"
    own = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if own.search(card):
        return own.sub(lambda _: section, card, count=1)
    before, recipe, after = card.partition(f"\n## {_LAST}\n")
    return f"{before.rstrip()}\n\n{section}{recipe.lstrip()}{after}" if recipe else card + section


def renamed(card: str, name: str) -> str:
    """Return a card whose code loads the model by another name."""
    return _NAMED.sub(lambda found: f"{found[1]}{_text(name)}{found[2]}", card, count=1)


def of_folder(code: str) -> str:
    """Return code with a remark that the name in it stands for a folder's path."""
    return _NAMED.sub(lambda found: f"{found[0]}{_PATH}", code, count=1)


def _text(name: str) -> str:
    """Return a name as text in Python."""
    return json.dumps(name, ensure_ascii=False)


def _base(source: Origin) -> dict[str, str]:
    commit = {"base_commit": source.commit} if source.commit else {}
    return {"base": source.name, **commit}


def _place(source: Mapping[str, Any]) -> str:
    """Return a source's cell: its name, and for an adapter what it was put on."""
    base = f" on {_cell(source['base'])}" if "base" in source else ""
    return f"{_cell(source['source'])}{base}"


def _license(source: Mapping[str, Any]) -> str:
    return _cell(source["license"]) if source.get("license") else "not stated"


def _of_licenses(licenses: Collection[str | None]) -> list[str]:
    """Return what is to be said of the licenses of a merged model's sources."""
    if len(licenses) == 1 and None not in licenses:
        return []
    return ["The sources state different licenses, or none. The terms of each apply.", ""]


def _cell(text: str) -> str:
    """Return text that stays text in a table."""
    return "`" + re.sub(r"[|`\n]", " ", visible(text)) + "`"
