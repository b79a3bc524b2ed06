"""Shared by the tests of the command line: a standard input, and a disk that is full."""

import io

FULL = "/dev/full"


class Input(io.TextIOWrapper):
    """A standard input that holds some bytes, or a terminal if the data is None."""

    def __init__(self, data):
        super().__init__(io.BytesIO(data or b""))
        self.terminal = data is None

    def isatty(self):
        return self.terminal
