"""Tasks of the Language Model Evaluation Harness, the package ``lm-eval``."""
