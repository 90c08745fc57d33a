"""An adapter's folder: its two files as PEFT reads them, what it misses, recipe and card."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_bench.companions import ADAPTER_ERRORS, ADAPTER_PICTURE
from fusion_bench.modelpool.card import Origin
from fusion_bench.modelpool.directory import Folder, write_directories
from fusion_bench.problems import FusionBenchError
from fusion_bench.storage import read_json, write_text
from fusion_bench.weights import AdapterConfig, Layers
from fusion_bench.weights.adapter_builder import Adapter, ModuleChange

#: Of a kind of block: its modules' errors by layer.
_Block = dict[str, dict[int, list[float]]]
#: So many kinds of blocks and modules outside of layers are drawn, those with the largest errors.
_PANELS, _BARS = 8, 20
_MARKERS = "osD^vPX*<>"
#: What makes a model for a task that PEFT knows.
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


#: From this share on, what the saved factors miss is told.
_TOLD = 0.01


def write_adapter(
    path: Path,
    adapter: Adapter,
    *,
    base: str | None,
    revision: str | None,
    base_class: str | None,
    task: str | None,
    sources: Mapping[str, Origin],
    config: Mapping[str, Any] | None,
    notes: Sequence[str] = (),
) -> None:
    """Write an adapter as a folder in PEFT's layout, in place of what is at ``path``.

    Args:
        path: the folder, absolute.
        adapter: what to write.
        base: the name or path of the model that it is put on, if that is known.
        revision: that model's state on the Hub.
        base_class: the class of transformers that makes that model.
        task: what PEFT calls the adapter's task, if that is known.
        sources: what the adapter was made from.
        config: the run's config.
        notes: sentences for the card.

    Raises:
        FusionBenchError: as ``write_directories``.
    """
    library = {"base_model_class": base_class, "parent_library": "transformers"}
    settings = {
        **adapter.settings,
        "task_type": task,
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

    folder = Folder(path, adapter.tensors, config, write_companions, "adapter_model", tuple(notes))
    # PEFT reads one file.
    write_directories([folder], sources=sources, max_shard_size=2**62)


def missed(changes: Sequence[ModuleChange]) -> str | None:
    """Return what the factors of an adapter miss, as a sentence; None where it is next to nothing.

    Args:
        changes: of its modules.
    """
    worst = max(changes, key=lambda own: own.error)
    if not worst.error > _TOLD:
        return None
    return (
        f"The saved factors miss up to {100 * worst.error:.2g} % of a merged product: of "
        f"{worst.module}, at rank {worst.rank}. What each misses is in {ADAPTER_ERRORS}. A larger "
        "modelpool.rank, or modelpool.energy=0.99, keeps more."
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


def generation_task(base_class: str | None) -> str | None:
    """Return what PEFT calls the task of a model that writes text; ``None`` for other classes.

    For other tasks PEFT puts a copy of the head beside the factors, which an adapter may not have.
    """
    if base_class is None:
        return None
    if base_class.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if base_class.endswith("ForSeq2SeqLM") else None


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
    """Draw each layer's error, a panel for each kind of block; modules outside of layers as bars.

    Args:
        changes: of an adapter.
        file: the PNG to write.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    blocks, alone = _arranged(changes)
    panels = sorted(blocks, key=lambda block: -_largest(blocks[block]))[:_PANELS]
    bars = sorted(alone.items(), key=lambda one: -one[1])[:_BARS][::-1]
    count = len(panels) + bool(bars)
    columns = min(max(count, 1), 3)
    rows = -(-max(count, 1) // columns)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure((4.2 * columns, 3.2 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        colours = matplotlib.colormaps["tab10"]
        for axes, block in zip(grid, panels, strict=False):
            for index, (name, points) in enumerate(blocks[block].items()):
                means = {number: sum(own) / len(own) for number, own in sorted(points.items())}
                marker, colour = _MARKERS[index % len(_MARKERS)], colours(index % colours.N)
                line = "-" if index < colours.N else "--"
                axes.plot(*zip(*means.items(), strict=True), line, color=colour, label=name)
                axes.lines[-1].set(marker=marker, markersize=5, alpha=0.8)
            axes.set_title(block, fontsize=8)
            axes.set(xlabel="layer", ylabel="relative error")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.legend(fontsize=6, frameon=False, ncols=1 + len(blocks[block]) // 8)
        if bars:
            axes = grid[len(panels)]
            axes.barh(*zip(*bars, strict=True), color="0.5")
            axes.set(xlim=(0, max(*(value for _, value in bars), 0.01) * 1.1))
            axes.set_title("outside of the layers", fontsize=8)
            axes.xaxis.set_major_formatter(PercentFormatter(1))
        for index, axes in enumerate(grid):
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_visible(index < count)
        if len(panels) < len(blocks):
            title = f"The {len(panels)} of {len(blocks)} kinds of blocks with the largest errors"
            figure.suptitle(title, fontsize=9)
        figure.savefig(file, dpi=120, metadata={"Software": None})


def _largest(block: _Block) -> float:
    return max(error for points in block.values() for own in points.values() for error in own)


def _arranged(changes: Sequence[ModuleChange]) -> tuple[dict[str, _Block], dict[str, float]]:
    """Return the errors of modules with factors: by kind and layer, and of those in no layer.

    Experts and others with numbers inside of a layer are of one kind.
    """
    layers = Layers(f"{change.module}.weight" for change in changes)
    blocks: dict[str, _Block] = {}
    alone: dict[str, float] = {}
    for change in changes:
        if change.how != "factors" or not math.isfinite(change.error):
            continue
        place = layers.place(f"{change.module}.weight")
        if place is None:
            alone[change.module] = change.error
            continue
        kind = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", place.rest.removesuffix(".weight"))
        inner, _, name = kind.rpartition(".")
        block = blocks.setdefault(f"{place.stack}.*.{inner}".removesuffix("."), {})
        block.setdefault(name, {}).setdefault(place.number, []).append(change.error)
    return blocks, alone
