"""Texts from the columns of a dataset: a column's name, or a template in Jinja's language."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fusion_bench.problems import FusionBenchError, did_you_mean

#: A template may neither reach Python's insides nor change what it is given.
_SANDBOX = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


class Template:
    r"""What becomes of a row.

    Args:
        text: a column's name, one of a part of it, ``choices.text``, or a template such as
            ``"{{question}}\nAnswer:"``.

    Raises:
        FusionBenchError: no text, or a template that is wrong.
    """

    def __init__(self, text: str):
        if not isinstance(text, str) or not text:
            raise FusionBenchError(f"'{text}' is not a column's name or a template.")
        self.text = text
        self._is_template = "{{" in text or "{%" in text
        if self._is_template:
            try:
                self._compiled = _SANDBOX.from_string(text)
            except TemplateError as error:
                raise FusionBenchError(f"the template is wrong: {error}.") from error

    @cached_property
    def columns(self) -> list[str]:
        """The columns that it reads."""
        if not self._is_template:
            return [self.text.partition(".")[0]]
        return sorted(meta.find_undeclared_variables(_SANDBOX.parse(self.text)))

    def check(self, columns: Iterable[str]) -> None:
        """Refuse a template of columns that are not there.

        Raises:
            FusionBenchError: it is so.
        """
        columns = list(columns)
        if self.text in columns:
            return
        for name in self.columns:
            if name not in columns:
                reason = f"the dataset has no column '{name}'."
                raise FusionBenchError(reason, did_you_mean(name, columns))

    def value(self, row: Mapping[str, Any]) -> Any:
        """Return the column's value, or the text that the template makes.

        Raises:
            FusionBenchError: a template that fails on the row.
        """
        if not self._is_template:
            return _part(row, self.text)
        try:
            return self._compiled.render(row)
        except Exception as error:  # of the template's language, or of what it calls
            raise FusionBenchError(f"the template fails: {error}.") from error

    def render(self, row: Mapping[str, Any]) -> str:
        """Return the text; a column must hold one.

        Raises:
            FusionBenchError: it holds none, or as ``value``.
        """
        value = self.value(row)
        if not isinstance(value, str):
            raise FusionBenchError(f"'{self.text}' holds {value!r}, not a text.")
        return value


def _part(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise FusionBenchError(f"it has no '{name}'.")
        value = value[part]
    return value
