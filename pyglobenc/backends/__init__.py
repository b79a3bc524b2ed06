"""Backends of the ops: how one is picked, and the code of each."""
