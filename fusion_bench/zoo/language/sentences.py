"""Sentences to classify, pairs of them that follow from each other or not, and alike ones."""

from collections.abc import Callable
from random import Random

Row = dict[str, str | int | float]

_SUBJECTS = ("acting", "plot", "music", "ending", "cast", "script", "pace", "camera", "story")
_PRAISE = ("good", "great", "lovely", "clever", "moving", "fresh", "witty", "superb")
_BLAME = ("bad", "poor", "awful", "clumsy", "boring", "stale", "dull", "horrid")

_NAMES = ("ada", "bruno", "clara", "dario", "elsa", "felix", "greta", "hugo")
_DEEDS = ("bought", "found", "painted", "lost", "carried", "sold", "cleaned", "repaired")
_LOOKS = ("red", "old", "small", "broken", "heavy", "green", "round", "cheap")
_THINGS = ("lamp", "chair", "clock", "boat", "basket", "violin", "kettle", "ladder")
_TIMES = ("today", "yesterday", "tonight", "early", "twice", "alone", "again", "slowly")
_SLOTS = (_NAMES, _DEEDS, _LOOKS, _THINGS, _TIMES)

#: What a sentence leaves open.
_MORE = ("for friends", "for money", "in secret", "by chance", "with care", "at home")

#: What asks for a person, a place, a time and an amount.
_ASKED = (
    ("who", "which man", "which woman", "what person"),
    ("where", "in what town", "at which place", "in what house"),
    ("when", "in which year", "at what time", "on which day"),
    ("how often", "for what sum", "at which price", "how many times"),
)
_FRAMES = ("{}", "tell me {}", "do you know {}", "nobody said {}")


def _sentiment(random: Random) -> Row:
    """Two remarks; after ``but`` the second counts, and ``and`` joins two of a kind."""
    label, contrast = random.randrange(2), random.random() < 0.5
    first = _remark(label != contrast, random)
    joint = "but" if contrast else "and"
    return {"text": f"{first} {joint} {_remark(bool(label), random)}", "label": label}


def _remark(kind: bool, random: Random) -> str:
    negated = random.random() < 0.3
    word = random.choice(_PRAISE if kind != negated else _BLAME)
    return f"the {random.choice(_SUBJECTS)} was {'not ' if negated else ''}{word}"


def _question(random: Random) -> Row:
    """A question, which a word or two ask for one of four things."""
    label = random.randrange(len(_ASKED))
    name, deed, look, thing, _ = (random.choice(slot) for slot in _SLOTS)
    subject = "" if label == 0 else f"{name} "
    asked = f"{random.choice(_ASKED[label])} {subject}{deed} the {look} {thing}"
    return {"text": random.choice(_FRAMES).format(asked), "label": label}


def _entailment(random: Random) -> Row:
    """What follows says less, what is neutral says more, and a contradiction says other."""
    label = random.randrange(3)
    words = [random.choice(slot) for slot in _SLOTS]
    premise = _sentence(words)
    if label == 2:
        for place in random.sample(range(4), 2):
            words[place] = _other(words[place], place, random)
    claim = _sentence(words).rpartition(" ")[0]
    hypothesis = f"{claim} {random.choice(_MORE)}" if label == 1 else claim
    return {"premise": premise, "hypothesis": hypothesis, "label": label}


def _similarity(random: Random) -> Row:
    """One point for each of five words that both sentences have in the same place."""
    score = random.randrange(len(_SLOTS) + 1)
    same = random.sample(range(len(_SLOTS)), score)
    first = [random.choice(slot) for slot in _SLOTS]
    second = [
        word if place in same else _other(word, place, random) for place, word in enumerate(first)
    ]
    return {"text1": _sentence(first), "text2": _sentence(second), "score": float(score)}


def _other(word: str, place: int, random: Random) -> str:
    return random.choice([own for own in _SLOTS[place] if own != word])


def _sentence(words: list[str]) -> str:
    name, deed, look, thing, time = words
    return f"{name} {deed} the {look} {thing} {time}"


SENTENCES: dict[str, Callable[[Random], Row]] = {
    "sentiment": _sentiment,
    "question": _question,
    "entailment": _entailment,
    "similarity": _similarity,
}
"""What draws a sample of each task."""
