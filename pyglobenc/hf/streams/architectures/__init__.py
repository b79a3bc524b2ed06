"""One module for each architecture of two streams.

A module has MODEL_TYPES and streams(), which returns the layers of a model.
"""
