"""The backends of the ops, and the code that picks one for each call."""
