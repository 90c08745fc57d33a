"""Plots as reproducible inline SVG with the page's colours and fonts.

A plot uses the page's CSS variables as colours. matplotlib does not support them, so it draws with
placeholders that are replaced afterwards. A plot that was drawn before is taken from the cache, and
matplotlib is not imported for it.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, ParamSpec
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from fusion_bench.sealed import remembered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

_INK, _SOFT, _LINE = "#010101", "#010102", "#010103"
_SERIES = ["#010104", "#010105", "#010106"]
_VARIABLES = {
    _INK: "--ink",
    _SOFT: "--soft",
    _LINE: "--line",
    _SERIES[0]: "--merged",
    _SERIES[1]: "--pretrained",
    _SERIES[2]: "--individual",
}
_STYLE: Any = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "grid.color": _LINE,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "text.color": _INK,
    "text.parse_math": False,  # names are text, also with a dollar in them
    "font.size": 9,
    "svg.fonttype": "none",
}
_MARKERS, _LINES = ["o", "s", "^"], ["solid", "dashed", "dotted"]
#: Colours that are told apart on white and on black, also by the colour-blind (Okabe and Ito).
_PALETTE = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
_XLINK = "{http://www.w3.org/1999/xlink}href"
#: A polygon shows fewer tasks badly, and more not at all.
RADAR = range(3, 13)
#: Cells of a heat map that has room for its figures.
_ANNOTATED = 200


def _drawn_once(draw: Callable[P, str]) -> Callable[P, str]:
    """Draw a picture of the same figures only once."""

    @wraps(draw)
    def found(*given: P.args, **named: P.kwargs) -> str:
        about = [_drawn_by(), draw.__name__, given, named]
        return remembered("pictures", about, lambda: draw(*given, **named))

    return found


@cache
def _drawn_by() -> list[str]:
    """Return what decides how a picture looks besides its figures."""
    return [version("matplotlib"), Path(__file__).read_text(encoding="utf-8")]


@_drawn_once
def accuracies(
    tasks: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    title: str,
    whole: str | None = None,
    unit: str = "%",
) -> str:
    """Return a plot of values by task: a radar chart for fractions of 3 to 12 tasks, else bars.

    Args:
        tasks: their names.
        series: a model's name to a value for each task, ``None`` where it was not evaluated; three
            models at most.
        title: what the figures are.
        whole: the meaning of the line at 100 %; without it there is no line.
        unit: of the values; those in ``%`` are fractions.
    """
    values = {name: _floats(own, unit) for name, own in series.items()}
    complete = len(tasks) in RADAR and all(np.isfinite(v).all() for v in values.values())
    names = [label(task) for task in tasks]
    with _style():
        figure = (
            _radar(names, values, whole)
            if complete and unit == "%"
            else _bars(names, values, _axis(title, unit), whole, percent=unit == "%")
        )
        words = "; ".join(
            f"{name}: "
            + ", ".join(
                f"{task} {_worded(value, unit)}"
                for task, value in zip(tasks, found, strict=True)
                if math.isfinite(value)
            )
            for name, found in values.items()
        )
        return _svg(figure, title, words)


@_drawn_once
def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: NDArray[np.float64],
    title: str,
    description: str,
    limit: float | None = None,
) -> str:
    """Return a heat map of a matrix, with a colour scale.

    Args:
        rows: their names.
        columns: likewise.
        values: rows by columns; nan leaves a cell empty.
        title: what the figures are.
        description: a description in words.
        limit: the colours go from red at ``-limit`` by white at 0 to blue at ``limit``; without it
            from white at 0 to blue at the largest value.
    """
    from matplotlib import colormaps

    annotated = values.size <= _ANNOTATED
    width, height = (0.44, 0.3) if annotated else (0.22, 0.22)  # of a cell, in inches
    size = (width * len(columns), height * len(rows))
    low, high = (-limit, limit) if limit is not None else (0.0, _largest(values))
    with _style():
        figure = _figure(size)
        axes = figure.add_axes((0, 0, 1, 1))
        colours = colormaps["RdBu" if low < 0 else "Blues"].with_extremes(bad="none")
        axes.imshow(values, colours, vmin=low, vmax=high, aspect="auto", interpolation="none")
        axes.set_xticks(
            range(len(columns)),
            [label(name) for name in columns],
            rotation=40 if annotated else 60,
            rotation_mode="anchor",
            ha="left",
        )
        axes.set_yticks(range(len(rows)), [label(name) for name in rows])
        axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
        axes.spines[:].set_visible(False)
        if annotated:
            _annotate(axes, values, lambda value: colours((value - low) / ((high - low) or 1)))
        _scale(figure, size, low, high, colours)
        return _svg(figure, title, description)


@_drawn_once
def ranking(
    names: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float],
    title: str,
    unit: str = "%",
) -> str:
    """Return a plot of ranked scores with their intervals.

    Args:
        names: what was scored, the best first.
        values: of the scores.
        errors: half the width of each interval.
        title: what the figures are.
        unit: of the values; those in ``%`` are fractions.
    """
    height = max(1.0, 0.24 * len(names))
    with _style():
        figure = _figure((3.6, height))
        axes = figure.add_axes((0, 0, 1, 1))
        positions = np.arange(len(names))
        axes.errorbar(
            _floats(values, unit),
            positions,
            xerr=_floats(errors, unit),
            fmt=_MARKERS[0],
            ms=4,
            color=_SERIES[0],
            elinewidth=1.2,
            capsize=2,
        )
        axes.set_yticks(positions, [label(name, 48) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        _value_axes(axes, _axis(title, unit), "x")
        return _svg(figure, title, _in_words(dict(zip(names, values, strict=True)), unit))


@_drawn_once
def curves(
    parameter: str,
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    title: str,
    unit: str = "%",
) -> str:
    """Return a plot of scores over a parameter, with their intervals.

    Args:
        parameter: its name.
        series: a curve's name to its points: parameter, value, half the interval's width; three
            curves at most.
        title: what the figures are.
        unit: of the values; those in ``%`` are fractions.
    """
    with _style():
        figure = _figure((4.6, 2.8))
        axes = figure.add_axes((0, 0, 1, 1))
        words: dict[str, float] = {}
        for place, (name, points) in enumerate(series.items()):
            at, value, error = np.array(sorted(points)).T * _scales(unit)
            axes.plot(at, value, **_look(place), label=label(name))
            axes.fill_between(
                at, value - error, value + error, color=_SERIES[place], alpha=0.15, lw=0
            )
            words |= {f"{name} {parameter}={x:g}": y for x, y, _ in sorted(points)}
        axes.set_xlabel(label(parameter, 48))
        _value_axes(axes, _axis(title, unit), "y")
        if len(series) > 1:
            _legend(figure, axes, below=0.16)
        return _svg(figure, title, _in_words(words, unit))


class Runner(NamedTuple):
    """A candidate of a race: the samples that it took, its score and this one's spread."""

    samples: int
    value: float
    error: float


@_drawn_once
def race(series: Mapping[str, Sequence[Runner]], title: str, unit: str = "%") -> str:
    """Return a plot of how far candidates came in a race, and of their scores there.

    Args:
        series: how a candidate ended to all that ended so; the winner is alone.
        title: what the scores are.
        unit: of the scores; those in ``%`` are fractions.
    """
    scale = _scale_of(unit)
    with _style():
        figure = _figure((4.6, 2.8))
        axes = figure.add_axes((0, 0, 1, 1))
        for place, (name, runners) in enumerate(series.items()):
            samples, values, errors = np.array(runners, dtype=np.float64).reshape(-1, 3).T
            axes.errorbar(
                samples,
                scale * values,
                yerr=scale * np.nan_to_num(errors),
                fmt=_MARKERS[place % len(_MARKERS)],
                ms=5,
                color=_PALETTE[place],
                elinewidth=1,
                capsize=2,
                label=name,
            )
        axes.set_xlabel("samples taken")
        axes.set_xlim(left=0)
        _value_axes(axes, _axis(title, unit), "y")
        _legend(figure, axes, below=0.16)
        words = "; ".join(
            f"{name}: "
            + ", ".join(f"{_worded(scale * r.value, unit)} on {r.samples} samples" for r in runners)
            for name, runners in series.items()
        )
        return _svg(figure, title, words)


def _value_axes(axes: "Axes", title: str, axis: Literal["x", "y"]) -> None:
    (axes.set_xlabel if axis == "x" else axes.set_ylabel)(title)
    axes.grid(axis=axis, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _in_words(values: Mapping[str, float], unit: str) -> str:
    scale = _scale_of(unit)
    return ", ".join(f"{name}: {_worded(scale * value, unit)}" for name, value in values.items())


def _worded(value: float, unit: str) -> str:
    """Return a drawn value with its unit."""
    return f"{value:.1f} %" if unit == "%" else f"{value:.3g} {unit}".rstrip()


def _axis(title: str, unit: str) -> str:
    return f"{title}, {unit}" if unit else title


def _scale_of(unit: str) -> float:
    """Return how much longer fractions are drawn than other values."""
    return 100.0 if unit == "%" else 1.0


def _scales(unit: str) -> NDArray[np.float64]:
    return np.array([[1.0], [_scale_of(unit)], [_scale_of(unit)]])


class Line(NamedTuple):
    """A line of a plot: its points and their spread."""

    name: str
    positions: Sequence[int]
    values: Sequence[float]
    spread: Sequence[float]


@_drawn_once
def panels_of_curves(
    panels: Mapping[str, Sequence[Line]],
    title: str,
    below: str,
    *,
    whole: bool,
    unit: str = "%",
) -> str:
    """Return a plot of values as lines, each with a band for the spread.

    Args:
        panels: a panel's name to its lines; a name has one colour in all panels.
        title: what the values are.
        below: what the positions are.
        whole: draw a line at 100 %.
        unit: of the values; those in ``%`` are fractions.
    """
    scale = _scale_of(unit)
    with _style():
        figure = _figure((2.9 * len(panels), 2.6))
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
        figure.subplots_adjust(wspace=0.08)
        names = list(dict.fromkeys(line.name for lines in panels.values() for line in lines))
        for axes, (panel, lines) in zip(grid[0], panels.items(), strict=True):
            for line in lines:
                number = names.index(line.name)
                colour = _PALETTE[number % len(_PALETTE)]
                look: Any = {"color": colour, "marker": _MARKERS[number % len(_MARKERS)]}
                middle, spread = scale * np.array(line.values), scale * np.array(line.spread)
                axes.plot(line.positions, middle, lw=1.6, ms=4, label=label(line.name), **look)
                axes.fill_between(
                    line.positions, middle - spread, middle + spread, color=colour, alpha=0.15, lw=0
                )
            if whole:
                axes.axhline(100, color=_SOFT, lw=1.2, ls="dotted")
            axes.set_title(label(panel), fontsize=9)
            axes.set_xticks(sorted({x for line in lines for x in line.positions}))
            axes.set_xlabel(below)
            axes.grid(lw=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        grid[0][0].set_ylabel(unit)
        _legend(figure, grid[0][0], below=0.06)
        words = "; ".join(
            f"{panel}, {line.name}: "
            + ", ".join(
                f"{_worded(scale * value, unit)} at {place}"
                for place, value in zip(line.positions, line.values, strict=True)
            )
            for panel, lines in panels.items()
            for line in lines
        )
        return _svg(figure, title, words)


def standalone(picture: str) -> str:
    """Return a plot as a standalone file, in the colours of the light theme."""
    inks = {"--ink": "#1c2430", "--soft": "#586273", "--line": "#d5dbe4"}
    for variable, colour in inks.items():
        picture = picture.replace(f"var({variable})", colour)
    return picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def label(name: str, longest: int = 22) -> str:
    """Return a name for a plot: short, on one line, without control characters."""
    shown = "".join(c if c.isprintable() or c == "\u200d" else " " for c in name).strip()
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def _floats(values: Sequence[float | None], unit: str) -> NDArray[np.float64]:
    return _scale_of(unit) * np.array([math.nan if v is None else v for v in values])


def _largest(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if finite.size else 0.0


def _top(values: Mapping[str, NDArray[np.float64]]) -> float:
    """Return the end of a percent axis: 100, or the next multiple of 20 above the values."""
    return max(100.0, 20 * math.ceil(max(map(_largest, values.values()), default=0) / 20))


def _radar(
    tasks: Sequence[str], values: Mapping[str, NDArray[np.float64]], whole: str | None
) -> "Figure":
    from matplotlib.projections.polar import PolarAxes

    figure = _figure((3.6, 3.6))
    axes = figure.add_axes((0, 0, 1, 1), projection="polar")
    assert isinstance(axes, PolarAxes)
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    top = _top(values)
    axes.set_ylim(0, top)
    axes.set_yticks([20, 40, 60, 80, 100], ["20", "40", "60", "80", "100 %"])
    axes.set_rlabel_position(180 / len(tasks))
    axes.tick_params(axis="y", labelsize=7, labelcolor=_SOFT)
    angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
    axes.set_xticks(angles, [""] * len(tasks))
    for angle, task in zip(angles, tasks, strict=True):  # outwards of the circle, whatever length
        side = math.sin(angle)
        across = "center" if abs(side) < 0.1 else ("left" if side > 0 else "right")
        up = math.cos(angle)
        along = "center" if abs(up) < 0.9 else ("bottom" if up > 0 else "top")
        axes.text(angle, 1.06 * top, task, ha=across, va=along)
    axes.spines["polar"].set_visible(False)
    if whole is not None:
        circle = np.linspace(0, 2 * np.pi, 90)
        axes.plot(circle, np.full(90, 100.0), color=_SERIES[2], lw=1.2, ls="dotted", label=whole)
    around = [*range(len(tasks)), 0]
    for place, (name, found) in enumerate(values.items()):
        axes.plot(angles[around], found[around], **_look(place), label=label(name))
        axes.fill(angles[around], found[around], color=_SERIES[place], alpha=0.12, lw=0)
    _legend(figure, axes, below=0.08)
    return figure


def _bars(
    tasks: Sequence[str],
    values: Mapping[str, NDArray[np.float64]],
    title: str,
    whole: str | None,
    *,
    percent: bool,
) -> "Figure":
    thick = 0.16  # of a bar, in inches
    height = max(1.0, len(tasks) * (len(values) * thick + 0.12))
    figure = _figure((3.6, height))
    axes = figure.add_axes((0, 0, 1, 1))
    positions = np.arange(len(tasks), dtype=np.float64)
    unit = thick * len(tasks) / height
    for place, (name, found) in enumerate(values.items()):
        shift = (place - (len(values) - 1) / 2) * unit
        axes.barh(
            positions + shift,
            np.nan_to_num(found),
            0.9 * unit,
            color=_SERIES[place] if place == 0 else "none",
            edgecolor=_SERIES[place],
            label=label(name),
        )
    axes.set_yticks(positions, tasks)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    if percent:
        axes.set_xlim(0, _top(values))
    axes.set_xlabel(title)
    axes.grid(axis="x", lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if whole is not None:
        axes.axvline(100, color=_SERIES[2], lw=1.2, ls="dotted", label=whole)
    _legend(figure, axes, below=0.55 / height)
    return figure


def _look(place: int) -> dict[str, Any]:
    return {
        "color": _SERIES[place],
        "marker": _MARKERS[place],
        "ls": _LINES[place],
        "ms": 4,
        "lw": 1.6,
    }


def _legend(figure: "Figure", axes: "Axes", below: float) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="upper center",
        bbox_to_anchor=(0.5, -below),
        ncols=min(len(names), 2),
        frameon=False,
    )


def _annotate(axes: "Axes", values: NDArray[np.float64], colour: Any) -> None:
    for (row, column), value in np.ndenumerate(values):
        if math.isfinite(value):
            red, green, blue, _ = colour(value)
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            shown = f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # no −0.00
            ink = "#ffffff" if dark else "#1c2430"
            axes.text(column, row, shown, ha="center", va="center", color=ink, size=8)


def _scale(
    figure: "Figure", size: tuple[float, float], low: float, high: float, colours: Any
) -> None:
    """Draw the colour scale below the plot."""
    width, height = size
    long = min(1.6 / width, 1.0)
    axes = figure.add_axes((0, -0.22 / height, long, 0.1 / height))
    gradient = np.linspace(low, high, 64)[None]
    axes.imshow(gradient, colours, aspect="auto", extent=(low, high or 1, 0, 1))
    axes.set_yticks([])
    marks = sorted({low, 0.0, high})
    axes.set_xticks(marks, [f"{mark:.2g}".replace("-", "−") for mark in marks])
    axes.tick_params(length=0, labelsize=8, labelcolor=_SOFT)
    axes.spines[:].set_visible(False)


def _figure(inches: tuple[float, float]) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(inches)


@contextmanager
def _style() -> Iterator[None]:
    """Draw with the style above, ignoring the user's matplotlib settings."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _svg(figure: "Figure", title: str, description: str) -> str:
    """Return the figure as an element for a page."""
    from matplotlib import rcParams

    file = io.StringIO()
    rcParams["svg.hashsalt"] = title  # ids are a picture's own, and the same each time
    with warnings.catch_warnings():
        # matplotlib measures names by its own font, which may lack characters that a browser's
        # fonts have.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(
            file, format="svg", bbox_inches="tight", pad_inches=0.06, metadata={"Date": None}
        )
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's style sheet would hold for the whole page.
            if _name(child) in ("metadata", "style"):
                parent.remove(child)
    referred = {
        found
        for element in root.iter()
        for attribute in ("clip-path", _XLINK)
        for found in re.findall("#(\\w+)", element.get(attribute, ""))
    }
    for element in root.iter():
        element.tag = _name(element)
        element.tail = None
        element.attrib = _attributes(element.attrib, referred)
        if element.tag != "text":
            element.text = None
    root.set("role", "img")
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    for tag, text in (("desc", label(description, len(description))), ("title", label(title, 200))):
        element = ElementTree.Element(tag)
        element.text = text
        root.insert(0, element)
    return ElementTree.tostring(root, encoding="unicode")


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _attributes(found: Mapping[str, str], referred: Collection[str]) -> dict[str, str]:
    """Return an element's attributes, shortened, with the page's variables."""
    own = {name.rpartition("}")[2]: value for name, value in found.items()}
    own.pop("version", None)
    if own.get("id") not in referred:
        own.pop("id", None)
    if "d" in own:
        own["d"] = re.sub(r"-?\d+\.\d+", _shorter, own["d"]).replace("\n", " ").strip()
    if "style" in own:
        style = re.sub("font-family: [^;]*; ?", "", own["style"])
        own["style"] = re.sub("#0101\\d\\d", lambda colour: f"var({_VARIABLES[colour[0]]})", style)
    return own


def _shorter(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
