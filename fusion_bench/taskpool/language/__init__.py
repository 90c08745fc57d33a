"""Tasks of language models."""
