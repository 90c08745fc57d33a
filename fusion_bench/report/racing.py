"""The race of a search's candidates: why each dropped out, and a picture."""

from fusion_bench.report.figures import search_metric, sentence_case
from fusion_bench.report.schema import Candidate, Search

#: How the others ended; with the winner these are the kinds of a picture.
_ENDS = {None: "to the end", "behind": "behind", "worse": "worse, by the test"}


def leaving(search: Search, candidate: Candidate) -> str:
    """Return in words how a candidate ended; empty for the winner."""
    if candidate.led_by is None:
        return ""
    leader = search.candidates[candidate.led_by].text()
    behind = f"{100 * (candidate.behind or 0.0):.1f} points"
    if candidate.left == "worse":
        return f"{behind} worse than {leader}, by the test"
    when = "at the end" if candidate.left is None else "when samples were short"
    return f"{behind} behind the best {when}"


def race_picture(search: Search) -> str:
    """Return a plot of the candidates' scores over the samples that they took."""
    from fusion_bench.report.pictures import Runner, race

    series: dict[str, list[Runner]] = {name: [] for name in ("winner", *_ENDS.values())}
    for place, candidate in enumerate(search.candidates):
        end = "winner" if place == search.winner else _ENDS[candidate.left]
        error = candidate.score_stderr or 0.0
        series[end].append(Runner(candidate.num_samples or 0, candidate.score, error))
    title = f"{sentence_case(search_metric(search))} on the {search.split} split"
    return race({name: own for name, own in series.items() if own}, title, search.unit)
