"""The zoo's tasks: class names and prompt templates, as plain data."""

CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "digits": tuple(
        f"digit {word}"
        for word in ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    ),
    "letters": tuple(f"letter {letter}" for letter in "ABEGHKMRSX"),
    "shapes": ("circle", "ring", "triangle", "square", "star", "cross", "crescent", "heart"),
    "textures": (
        "brick wall",
        "grass",
        "gravel",
        "coins",
        "printed page",
        "handwriting",
    ),
    "photos": (
        "cat",
        "cup of coffee",
        "flower",
        "retina",
        "rocket",
        "stained tissue",
        "starry sky",
    ),
    "faces": (
        "upright face",
        "face turned left",
        "upside-down face",
        "face turned right",
        "background",
    ),
}
"""Readable class names of each task, in the order of the labels."""

TASKS: tuple[str, ...] = tuple(CLASS_NAMES)

TEMPLATES: tuple[str, ...] = (
    "a photo of a {}.",
    "a small photo of the {}.",
    "a blurry photo of the {}.",
    "a picture of the {}.",
    "an image of the {}.",
    "this is the {}.",
)
"""Prompt templates that serve all tasks; pretraining captions come from the same list."""

SPLITS: tuple[str, ...] = ("train", "validation", "test")
"""Parts of each task: to train on, to tune on, to report."""
