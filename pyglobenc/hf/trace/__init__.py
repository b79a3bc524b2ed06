"""Capture of one forward pass: what is recorded of every layer, and the checks of it."""
