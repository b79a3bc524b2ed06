"""Long lists of cases, of which a few run by default and the others with the slow tests."""

from collections.abc import Iterable, Sequence

import pytest


def slow(*values):
    """Return one case of `pytest.mark.parametrize` that runs with the slow tests alone."""
    return pytest.param(*values, marks=pytest.mark.slow)


def sweep(cases: Iterable, default: Iterable) -> list:
    """Return cases for `pytest.mark.parametrize`: those in `default` run always, the others are slow."""
    cases, default = list(cases), list(default)
    missing = [case for case in default if case not in cases]
    assert not missing, f"no cases of the sweep: {missing}"
    return [
        case if case in default else slow(*(case if isinstance(case, tuple) else (case,))) for case in cases
    ]


def in_parts(cases: Sequence, default: Sequence) -> list:
    """Return two cases for a test that judges many together: those in `default`, and the others, as slow."""
    assert all(case in cases for case in default)
    rest = [case for case in cases if case not in default]
    return [pytest.param(list(default), id="some"), pytest.param(rest, id="rest", marks=pytest.mark.slow)]
