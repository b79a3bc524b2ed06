"""Characters that are safe to show: none steers a terminal or a page."""

import unicodedata

# joiners that scripts and emoji need
KEPT = "\u200c\u200d"
REPLACED = "\ufffd"


def printable(text: object, newlines: bool = False) -> str:
    """Text without characters that would steer a terminal or a page: they become U+FFFD, every other space a
    space.
    """
    return "".join(_printable(char, newlines) for char in str(text))


def _printable(char: str, newlines: bool) -> str:
    if char.isprintable() or char in KEPT or (char == "\n" and newlines):
        return char
    return " " if char.isspace() or unicodedata.category(char) == "Zs" else REPLACED
