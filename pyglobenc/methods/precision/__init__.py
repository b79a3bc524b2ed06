"""Precision of the arithmetic, and how far rounding moves a result."""
