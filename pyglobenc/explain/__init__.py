"""The functions that take texts and return their attributions."""

from pyglobenc.explain.texts import check_texts, explain, explain_each

__all__ = ["check_texts", "explain", "explain_each"]
