"""Texts and images as a model takes them, and their batches."""
