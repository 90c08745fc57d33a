"""Sets formulas in MathML, which browsers render without a script; an extension of Markdown.

``pymdownx.arithmatex`` finds the formulas and marks them; the last step replaces what it marked.
"""

import re
from html import unescape

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor

_MARKED = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)

#: Commands that the library does not know, and what is the same.
_UNKNOWN = {
    r"\arg": r"\operatorname{arg}",
    r"\lfloor": "⌊",
    r"\rfloor": "⌋",
    r"\|": "‖",
    r"\bigl\{": r"\left\{",
    r"\bigr\}": r"\right\}",
}


class MathML(Extension):
    """Comes after ``pymdownx.arithmatex`` with ``generic: true``."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Add the last step."""
        md.postprocessors.register(_Formulas(md), "mathml", 0)


class _Formulas(Postprocessor):
    def run(self, text: str) -> str:
        return _MARKED.sub(_as_mathml, text)


def _as_mathml(found: re.Match[str]) -> str:
    display = "block" if found[1] == "div" else "inline"
    formula = unescape(found[2]).strip()
    for command, other in _UNKNOWN.items():
        formula = formula.replace(command, other)
    made: str = convert(formula, display=display)
    if "\\" in made:  # it writes commands that it does not know as text
        raise ValueError(f"a command in the formula '{formula}' is not known.")
    return made


def makeExtension() -> Extension:  # noqa: N802
    """Return the extension, under the name that Markdown looks for."""
    return MathML()
