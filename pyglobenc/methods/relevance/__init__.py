"""Transformer attribution and its variants."""
