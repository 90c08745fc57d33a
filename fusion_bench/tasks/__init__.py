"""Tasks as data: class names and prompt templates for zero-shot classifiers.

Every YAML beside this file describes one task; a task without a file gets the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from fusion_bench.problems import FusionBenchError, did_you_mean, within

__all__ = ["Task", "canonical_name", "known_tasks", "load_task", "readable"]


@dataclass(frozen=True)
class Task:
    """The settings of one dataset for a zero-shot classifier."""

    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Prompts, each with one ``{}`` where the class name goes."""
    class_names: tuple[str, ...] | None = None
    """``None``: the names of the dataset's own label feature."""
    label_names: tuple[str, ...] | None = None
    """What datasets call these classes, in the order of ``class_names``."""
    by_name: bool = False
    """Whether ``class_names`` are refused where they cannot be matched with the dataset's; the
    user's own may differ in all, and then stand in label order."""
    num_classes: int | None = None
    """``None``: as many as the label feature has."""
    image_column: str | None = None
    """``None``: found by feature type."""
    label_column: str | None = None
    """``None``: found by feature type."""
    owner: str | None = None
    """The model that was trained for the task; ``None``: the one that has its name."""

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], base: Task | None = None) -> Task:
        """Check the fields in ``mapping`` and lay them over ``base`` (default: the defaults).

        Class names without ``num_classes`` set it, overriding ``base``.

        Args:
            mapping: field names to plain values, as YAML gives them.
            base: the task that supplies the fields that ``mapping`` leaves out.

        Raises:
            FusionBenchError: an unknown field, or a value that does not fit its field.
        """
        known = [field.name for field in fields(cls) if field.name != "by_name"]
        for key in mapping:
            if key not in known:
                hint = did_you_mean(key, known)
                raise FusionBenchError("there is no such key.", hint, place=(key,))
        values = {}
        for key, value in mapping.items():
            with within(key):
                values[key] = _checked(key, value)
        if values.get("class_names") is not None:
            values.setdefault("num_classes", len(values["class_names"]))
        if "class_names" in values:
            values |= {"by_name": False, "label_names": values.get("label_names")}
        task = replace(base or cls(), **values)
        if task.class_names is not None and task.num_classes not in (None, len(task.class_names)):
            raise FusionBenchError(
                f"{len(task.class_names)} class_names, but num_classes is {task.num_classes}.",
                place=("class_names",),
            )
        if task.label_names and len(task.label_names) != len(task.class_names or ()):
            raise FusionBenchError(
                f"{len(task.label_names)} label_names, but "
                f"{len(task.class_names or ())} class_names.",
                place=("label_names",),
            )
        return task


def known_tasks() -> list[str]:
    """Return the names of the tasks that have a data file, sorted."""
    return sorted(path.stem for path in _data_files())


def load_task(name: str) -> Task:
    """Return the task called ``name``, or the default one where no data file describes it.

    Case, ``-`` and ``_`` are ignored.
    """
    for path in _data_files():
        if canonical_name(path.stem) == canonical_name(name):
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            with within(path.name):
                return replace(Task.from_mapping(content), by_name=True)
    return Task()


def readable(label: str) -> str:
    """Turn a dataset's own label name into words: ``"golf_course"`` into ``"golf course"``."""
    return " ".join(label.replace("_", " ").split())


def _data_files() -> list[Path]:
    return list(Path(__file__).parent.glob("*.yaml"))


def canonical_name(name: str) -> str:
    """Return the one spelling of a task's name: lower case, with underscores."""
    return name.lower().replace("-", "_")


def _checked(key: str, value: Any) -> Any:
    """Return ``value`` in the type of the field ``key``, or refuse it."""
    if key == "templates":
        templates = _strings(value)
        for template in templates:
            # a second brace of any kind would break str.format
            if template.count("{}") != 1 or set(template.replace("{}", "")) & {"{", "}"}:
                raise FusionBenchError(
                    f"the template '{template}' needs exactly one {{}}, where the class name goes."
                )
        return templates
    if value is None:
        return None
    if key in ("class_names", "label_names"):
        names = _strings(value)
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise FusionBenchError(f"repeats {', '.join(map(repr, repeated))}.")
        return names
    if key == "num_classes":
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FusionBenchError(f"{value!r} is not a positive integer.")
        return value
    if not isinstance(value, str):
        what = "model's name" if key == "owner" else "column name"
        raise FusionBenchError(f"{value!r} is not a {what}.")
    return value


def _strings(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise FusionBenchError(f"{value!r} is not a list of strings.")
    for item in value:
        # YAML reads an unquoted 7 as a number and an unquoted no as false
        if not isinstance(item, str):
            raise FusionBenchError(f"{item!r} is not a string: put it in quotes.")
        if not item.strip():
            raise FusionBenchError("an empty string is not a name.")
    return tuple(value)
