"""Names of the models and data sets, as plain data."""

GENERATION = ("sort", "capitals", "number", "mood", "dialect")
"""Tasks of the models that write: a short answer to a prompt."""

CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "sentiment": ("negative", "positive"),
    "question": ("person", "place", "time", "amount"),
    "entailment": ("entailment", "neutral", "contradiction"),
}
"""Readable class names of each classification, in the order of the labels."""

SCORED = "similarity"
"""The task of the encoders whose answer is a number."""

PROSE = "prose"
"""The data set to measure perplexity by."""

TASKS: dict[str, tuple[str, ...]] = {
    "llama-tiny": GENERATION,
    "llama-tiny-tied": GENERATION,
    "t5-tiny": GENERATION,
    "bert-tiny": (*CLASS_NAMES, SCORED),
}
"""The tasks of each family, for each of which it has an expert."""

FAMILIES = tuple(TASKS)
"""Names of the families, which are those of the pretrained models."""

MODELS = tuple(
    model
    for family in FAMILIES
    for model in (family, *(f"{family}_{task}" for task in TASKS[family]))
)
"""All models: of each family the pretrained one, and for each task an expert."""

DATASETS = (*GENERATION, *TASKS["bert-tiny"], PROSE)
"""All data sets."""
