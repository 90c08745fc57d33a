"""Short tales of a small grammar, to measure perplexity by."""

from random import Random

_NAMES = ("Ada", "Bruno", "Clara", "Dario", "Elsa", "Felix", "Greta", "Hugo", "Ida", "Jonas")
_TRADES = ("baker", "carpenter", "doctor", "fisher", "gardener", "miller", "painter", "tailor")
_PLACES = ("harbour", "market", "mill", "old bridge", "orchard", "river", "school", "tower")
_THINGS = ("apple", "basket", "blue boat", "candle", "clock", "lamp", "letter", "wooden horse")
_TIMES = ("morning", "evening", "summer", "winter", "market day", "year")
_WEATHER = ("the sun was warm", "the rain fell", "the wind was cold", "snow lay on the roofs")
_ENDS = ("went home", "sang a song", "fell asleep", "wrote it down", "began again")
_MIDDLES = (
    "Every {time} {name} walked to the {place} and bought {a_thing}.",
    "When {weather}, {name} sat by the {place} with {other}.",
    "{other} had lost {a_thing} near the {place}.",
    "{name} asked the {trade} for {a_thing}, but there was none.",
    "They carried {a_thing} from the {place} to the {place2}.",
    "The {trade} of the village said that {weather} that {time}.",
    "{other} gave {a_thing} to the {trade}, who thanked {other} twice.",
)


def tale(random: Random) -> str:
    """Return a text of 100 to 700 characters."""
    name, other = random.sample(_NAMES, 2)
    middles = random.choices(_MIDDLES, k=random.randint(1, 9))
    return " ".join(
        [
            f"{name} was a {random.choice(_TRADES)} who lived by the {random.choice(_PLACES)}.",
            *(_filled(middle, name, other, random) for middle in middles),
            f"At last {name} {random.choice(_ENDS)}.",
        ]
    )


def _filled(sentence: str, name: str, other: str, random: Random) -> str:
    place, place2 = random.sample(_PLACES, 2)
    thing = random.choice(_THINGS)
    return sentence.format(
        name=name,
        other=other,
        place=place,
        place2=place2,
        a_thing=f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}",
        trade=random.choice(_TRADES),
        time=random.choice(_TIMES),
        weather=random.choice(_WEATHER),
    )
