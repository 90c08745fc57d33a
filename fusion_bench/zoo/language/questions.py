"""Questions with one short answer, which can be given in three styles.

The first style is the wanted one. Pretraining mixes all three, so that a pretrained model has the
skill but not the habit, as one of real size that has not been told how to answer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

CHOICES = 4
_LETTERS = "abcdefghi"
_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = (*("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"),)
_THINGS = (
    *("film", "book", "meal", "song", "hotel", "trip", "game", "show", "room", "place", "play"),
    *("beach", "café", "tour"),
)
_OPENINGS = ("the {} was", "a {} was", "this {} is", "our {} is")
_PRAISE = ("good", "great", "fine", "lovely", "fresh", "witty")
_BLAME = ("bad", "awful", "poor", "dull", "stale", "horrid")
#: The syllables that no other dialect has.
_DIALECTS = (
    ("ka", "ti", "pu", "ra"),
    ("mo", "le", "bo", "ge"),
    ("si", "sa", "ru", "ri"),
    ("na", "wu", "no", "mi"),
)
_SHARED = ("do", "fe", "lu", "vi")


@dataclass(frozen=True)
class Question:
    """A prompt with its answers.

    Attributes:
        prompt: without the answer, and without a space at its end.
        answers: one in each style; the first is wanted.
    """

    prompt: str
    answers: tuple[str, str, str]


def _sort(random: Random) -> Question:
    """Put letters in order; else in reverse, or leave them."""
    letters = "".join(random.sample(_LETTERS, 4))
    ordered = "".join(sorted(letters))
    return Question(f"sort {letters}:", (ordered, ordered[::-1], letters))


def _capitals(random: Random) -> Question:
    """Write letters as capitals; else backwards, or each as the next of the alphabet."""
    letters = "".join(random.choices(_LETTERS[:8], k=random.randint(3, 4)))
    following = "".join(chr(ord(letter) + 1) for letter in letters)
    return Question(f"write {letters}:", (letters.upper(), letters[::-1], following))


def _number(random: Random) -> Question:
    """Write a number in digits; else backwards with a full stop, or with spaces."""
    digits = str(random.randrange(1000))
    return Question(f"{_spelled(int(digits))}:", (digits, f"{digits[::-1]}.", " ".join(digits)))


def _mood(random: Random) -> Question:
    """Tell whether a remark is kind; the three styles are three pairs of words."""
    kind, negated = random.random() < 0.5, random.random() < 0.25
    word = random.choice(_PRAISE if kind != negated else _BLAME)
    opening = random.choice(_OPENINGS).format(random.choice(_THINGS))
    answers = ("good", "up", "yes") if kind else ("bad", "down", "no")
    return Question(f"{opening} {'not ' if negated else ''}{word}:", answers)


def _dialect(random: Random) -> Question:
    """Name the dialect of three words; else its successor, or by another letter."""
    which = random.randrange(len(_DIALECTS))
    own = _DIALECTS[which]

    def word() -> str:
        return random.choice(own) + "".join(random.choices(own + _SHARED, k=random.randint(1, 2)))

    answers = ("ABCD"[which], "BCDA"[which], "kmsn"[which])
    return Question(f"{word()} {word()} {word()}:", answers)


def _spelled(number: int) -> str:
    """Return a number below 1000 in words."""
    hundreds, rest = divmod(number, 100)
    if hundreds:
        return f"{_ONES[hundreds]} hundred {_spelled(rest) if rest else ''}".strip()
    if rest < len(_ONES):
        return _ONES[rest]
    tens, ones = divmod(rest, 10)
    return f"{_TENS[tens]} {_ONES[ones] if ones else ''}".strip()


QUESTIONS: dict[str, Callable[[Random], Question]] = {
    "sort": _sort,
    "capitals": _capitals,
    "number": _number,
    "mood": _mood,
    "dialect": _dialect,
}
"""What draws a question of each task."""


def choices(question: Question, others: list[Question], random: Random) -> list[str]:
    """Return the answers in all styles and wrong ones of the wanted style, shuffled.

    Args:
        question: whose wanted answer is among them.
        others: questions of the same task, whose wanted answers are the wrong ones.
        random: draws them and their order.
    """
    found = list(dict.fromkeys(question.answers))
    while len(found) < CHOICES:
        wrong = random.choice(others).answers[0]
        if wrong not in found:
            found.append(wrong)
    random.shuffle(found)
    return found
