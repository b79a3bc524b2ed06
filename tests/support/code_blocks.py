"""The code blocks of the documentation's pages."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in a language, "" for those that name none."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [code for name, code in fences if name == language]


def block_of(page: str, words: str) -> str:
    """Return the only block of a page of DOCS, in `py`, that contains some words.

    test_docs runs the blocks in `python`; those in `py` need libraries that few people have.
    """
    (found,) = (code for code in blocks(DOCS / page, "py") if words in code)
    return found
