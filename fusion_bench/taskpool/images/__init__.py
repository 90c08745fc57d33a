"""Classifying images: datasets, preprocessing, heads and the loop over batches."""
