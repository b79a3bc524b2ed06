"""`pyglobenc methods`: lists the methods, what each explains, its models and its cost."""

import argparse

NAME, HELP = "methods", "list the attribution methods: what each explains, for which models, at what cost"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no options; the table is the same for every machine."""


def run(options: argparse.Namespace) -> int:
    """Print two lines for each method, and return the exit status."""
    from pyglobenc.methods.registry import METHODS

    facts = [(m.name, f"a {m.target}", m.models, m.cost) for m in METHODS.values()]
    widths = [max(map(len, column)) for column in zip(*facts, strict=True)]
    for method, row in zip(METHODS.values(), facts, strict=True):
        print("  ".join(fact.ljust(width) for fact, width in zip(row, widths, strict=True)).rstrip())
        print(f"    {method.summary}")
    return 0
