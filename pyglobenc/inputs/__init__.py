"""Texts and images prepared as inputs of a model, and grouped into batches."""
