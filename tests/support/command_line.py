"""Shared by the tests of the command line: a command's words, a standard input, and a full disk."""

import io

FULL = "/dev/full"


def words(line, *paths):
    """Return the words of a command; each {} becomes the next of the paths, which may hold white space."""
    paths = map(str, paths)
    return [next(paths) if word == "{}" else word for word in line.split()]


class Input(io.TextIOWrapper):
    """A standard input that holds some bytes, or a terminal if the data is None."""

    def __init__(self, data):
        super().__init__(io.BytesIO(data or b""))
        self.terminal = data is None

    def isatty(self):
        return self.terminal
