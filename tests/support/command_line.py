"""What the tests of the command line share: a standard input, and a disk that is full."""

import io

FULL = "/dev/full"


class Input(io.TextIOWrapper):
    """Standard input that holds some bytes, a terminal if it holds none."""

    def __init__(self, data):
        super().__init__(io.BytesIO(data or b""))
        self.terminal = data is None

    def isatty(self):
        return self.terminal
