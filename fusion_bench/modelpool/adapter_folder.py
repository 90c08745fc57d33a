"""An adapter's folder: its two files as PEFT reads them, what it misses, recipe and card."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_bench.companions import ADAPTER_ERRORS, ADAPTER_PICTURE
from fusion_bench.modelpool.card import Origin
from fusion_bench.modelpool.directory import write_directory
from fusion_bench.problems import FusionBenchError
from fusion_bench.storage import read_json, write_text
from fusion_bench.weights import AdapterConfig, Layers
from fusion_bench.weights.adapter_builder import Adapter, ModuleChange

#: What makes a model for a task that PEFT knows.
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def write_adapter(
    path: Path,
    adapter: Adapter,
    *,
    base: str | None,
    revision: str | None,
    base_class: str | None,
    sources: Mapping[str, Origin],
    config: Mapping[str, Any] | None,
) -> None:
    """Write an adapter as a folder in PEFT's layout, in place of what is at ``path``.

    Args:
        path: the folder, absolute.
        adapter: what to write.
        base: the name or path of the model that it is put on, if that is known.
        revision: that model's state on the Hub.
        base_class: the class of transformers that makes that model.
        sources: what the adapter was made from.
        config: the run's config.

    Raises:
        FusionBenchError: as ``write_directory``.
    """
    library = {"base_model_class": base_class, "parent_library": "transformers"}
    settings = {
        **adapter.settings,
        "base_model_name_or_path": base,
        "revision": revision,
        "auto_mapping": library if base_class else None,
    }
    errors = {
        "modules": [
            {"module": own.module, "how": own.how, "rank": own.rank, "error": _number(own.error)}
            for own in adapter.changes
        ]
    }

    def write_companions(directory: Path) -> None:
        write_text(directory / "adapter_config.json", json.dumps(settings, indent=2) + "\n")
        write_text(directory / ADAPTER_ERRORS, json.dumps(errors, indent=1, allow_nan=False) + "\n")
        draw(adapter.changes, directory / ADAPTER_PICTURE)

    write_directory(
        path,
        adapter.tensors,
        sources=sources,
        config=config,
        max_shard_size=2**62,  # PEFT reads one file
        write_companions=write_companions,
        name="adapter_model",
    )


def class_of_base(config: AdapterConfig) -> str | None:
    """Return the class of transformers that makes the model an adapter was trained on.

    It is told by the adapter, by the base's own config where that is on this machine, or by the
    adapter's task. ``None`` where nothing tells it.
    """
    if config.base_class is not None:
        return config.base_class
    task = _TASKS.get(config.task or "")
    if task == "AutoModel" or config.base is None:
        return task
    try:
        named = _config_here(config.base, config.revision).get("architectures")
    except (FusionBenchError, AttributeError):  # the card is no reason to fail
        named = None
    found = str(named[0]) if isinstance(named, list) and named else ""
    return found if "For" in found or "Head" in found else task


def _config_here(base: str, revision: str | None) -> Mapping[str, Any]:
    """Return a model's config, of a folder or from the Hub's cache; nothing if it is not here."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    file = Path(base).expanduser() / "config.json"
    if not file.is_file():
        try:
            cached = try_to_load_from_cache(base, "config.json", revision=revision)
        except HFValidationError:  # a folder of another machine
            return {}
        if not isinstance(cached, str):
            return {}
        file = Path(cached)
    content: Mapping[str, Any] = read_json(file)
    return content


def _number(error: float) -> float | None:
    """Return an error as JSON has it, which knows no NaN."""
    return error if math.isfinite(error) else None


def draw(changes: Sequence[ModuleChange], file: Path) -> None:
    """Draw each layer's error, a line for each kind of module; modules outside of layers as bars.

    Args:
        changes: of an adapter.
        file: the PNG to write.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    lines, alone = _arranged(changes)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure((8, 4.5 if lines or alone else 1), layout="constrained")
        widths = [3 if lines else 0.01, 1 if alone else 0.01]
        left, right = figure.subplots(1, 2, width_ratios=widths)
        colours = matplotlib.colormaps["tab10" if len(lines) <= 10 else "tab20"]
        for index, (name, points) in enumerate(lines.items()):
            colour, dashed = colours(index % colours.N), index >= colours.N
            style = "--" if dashed else "-"
            left.plot(*zip(*points, strict=True), style, color=colour, marker=".", label=name)
        if lines:
            left.set(xlabel="layer", ylabel="relative error of the change", ylim=(0, None))
            left.xaxis.set_major_locator(MaxNLocator(integer=True))
            left.yaxis.set_major_formatter(PercentFormatter(1))
            figure.legend(loc="outside right upper", fontsize=7, frameon=False)
        if alone:
            right.barh(list(alone), list(alone.values()), color="0.5")
            right.set(xlim=(0, max(*alone.values(), 0.01) * 1.1))
            right.xaxis.set_major_formatter(PercentFormatter(1))
            right.tick_params(labelsize=7)
        for axes, used in ((left, lines), (right, alone)):
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_visible(bool(used))
        figure.savefig(file, dpi=120, metadata={"Software": None})


def _arranged(
    changes: Sequence[ModuleChange],
) -> tuple[dict[str, list[tuple[int, float]]], dict[str, float]]:
    """Return the errors of modules with factors: by kind and layer, and of those in no layer."""
    layers = Layers(f"{change.module}.weight" for change in changes)
    lines: dict[str, list[tuple[int, float]]] = {}
    alone: dict[str, float] = {}
    stacks = {p.stack for c in changes if (p := layers.place(f"{c.module}.weight"))}
    for change in changes:
        if change.how != "factors":
            continue
        place = layers.place(f"{change.module}.weight")
        if place is None:
            alone[change.module] = change.error
            continue
        kind = place.rest.removesuffix(".weight")
        name = kind if len(stacks) == 1 else f"{place.stack}: {kind}"
        lines.setdefault(name, []).append((place.number, change.error))
    return lines, alone
