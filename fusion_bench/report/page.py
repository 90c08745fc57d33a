"""The page that a person reads instead of the JSON."""

import hashlib
from base64 import b64encode
from collections.abc import Mapping
from typing import Any


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return a page from a template under ``templates/``; all text in it is escaped.

    Templates extend ``base.html.j2``. The filters ``percent`` and ``points`` show fractions.

    Args:
        template: the file's name.
        values: what the template names; a name that is missing is an error.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("fusion_bench.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points}
    script, style = (_text(environment, name) for name in ("sort.js", "style.css"))
    # The page's policy lets this one script run and no other.
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "script": Markup(script),
        "script_sha256": digest,
        "style": Markup(style),
    }
    return environment.get_template(template).render(values)


def percent(fraction: float | None) -> str:
    """Return a fraction in percent, or a dash where there is none."""
    return "–" if fraction is None else f"{100 * fraction:.1f}"


def points(difference: float | None) -> str:
    """Return a difference of fractions in percentage points, with its sign."""
    return "–" if difference is None else f"{100 * difference:+.1f}".replace("-", "−")


def _text(environment: Any, name: str) -> str:
    text, _, _ = environment.loader.get_source(environment, name)
    return str(text)
