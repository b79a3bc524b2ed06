"""The pages that list methods name those of the registry."""

from pathlib import Path

from pyglobenc.methods.registry import METHODS

ROOT = Path(__file__).parents[2]


def test_the_page_of_methods_is_the_registry():
    page = (ROOT / "docs" / "methods.md").read_text()
    for method in METHODS.values():
        line = f"| `{method.name}` | {method.summary} | a {method.target} |"
        assert line in page, line
    assert page.count("\n| `") == len(METHODS) + 1
    readme = (ROOT / "README.md").read_text()
    assert [name for name in METHODS if f"`{name}`" not in readme] == []
