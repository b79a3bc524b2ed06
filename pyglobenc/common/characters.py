"""Makes text safe to show, without characters that would control a terminal or a page."""

import unicodedata

# Some scripts and emoji need these joiners.
KEPT = "\u200c\u200d"
REPLACED = "\ufffd"


def printable(text: object, newlines: bool = False) -> str:
    """Return a value as text without control characters.

    Control characters become U+FFFD, and other white space becomes a plain space.

    Args:
        text: the value.
        newlines: keep line ends.
    """
    return "".join(_printable(char, newlines) for char in str(text))


def _printable(char: str, newlines: bool) -> str:
    if char.isprintable() or char in KEPT or (char == "\n" and newlines):
        return char
    return " " if char.isspace() or unicodedata.category(char) == "Zs" else REPLACED
