"""The command line: `pyglobenc explain`, `attribute`, `bench`, `doctor`."""

import argparse
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn, TextIO

from pyglobenc._version import __version__
from pyglobenc.cli import attribute, bench, doctor, explain
from pyglobenc.common.characters import printable
from pyglobenc.common.files import one_line

# each has NAME, HELP, add_arguments(parser) and run(options), which returns the exit status
COMMANDS = (explain, attribute, bench, doctor)

FAILED, INTERRUPTED = 1, 130
# errors whose messages are written for the user; any other is a fault of this program
EXPECTED = (OSError, ValueError, TypeError, RuntimeError, ImportError, MemoryError)

# characters of a usage error, which may repeat an argument
MOST = 600


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line that steers no terminal."""

    def error(self, message: str) -> NoReturn:
        line = printable(" ".join(message[:MOST].split()))
        self.exit(2, f"{self.prog}: error: {line} ({self.prog} --help lists the options)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; argv None: the process's arguments.

    Returns:
        Exit status: 0 done, 1 failed (one line on stderr says why), 130 stopped by Ctrl-C or SIGTERM; wrong
            usage leaves with 2.
    """
    # a scheduler that ends a job loses no more of it than Ctrl-C does; only the main thread may ask for it
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    ):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    _prepare_streams()
    traceback = False
    try:
        options = _parser().parse_args(argv)
        traceback = options.traceback
        with _one_line_each():
            status = options.run(options)
        _flush_stdout()
        return status
    except SystemExit:
        # help and usage errors; what reads them may be gone
        with suppress(OSError):
            _flush_stdout()
        raise
    except KeyboardInterrupt:
        _say("stopped")
        return INTERRUPTED
    except BrokenPipeError:
        # the reader has seen enough
        _drop(sys.stdout)
        return FAILED
    except Exception as error:
        if traceback:
            raise
        if isinstance(error, OSError) and error.filename is None:
            _drop(sys.stdout)
        fault = (
            ""
            if isinstance(error, EXPECTED)
            else f"unexpected {type(error).__name__}, --traceback shows where: "
        )
        _say(fault + one_line(error))
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="pyglobenc", description="Token attribution for transformers at the price of the forward pass."
    )
    parser.add_argument("--version", action="version", version=f"pyglobenc {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(command.NAME, help=command.HELP, description=command.HELP)
        command.add_arguments(sub)
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        sub.set_defaults(run=command.run, error=sub.error)
    return parser


def _prepare_streams() -> None:
    """Make sure that no file takes the number of a standard stream that is closed: what is meant for the
    stream would go into the file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # the lowest number that is free, which is this one
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        # print(file=None) writes to standard output
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # a character that the terminal can't show is no reason to fail
            stream.reconfigure(errors="replace")


@contextmanager
def _one_line_each() -> Iterator[None]:
    """Within the context warnings and log records are a line each, which steers no terminal."""
    log, handler = logging.getLogger("pyglobenc"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: _say(one_line(record.getMessage()))
    log.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where: _say(one_line(message))
            yield
    finally:
        log.removeHandler(handler)


def _flush_stdout() -> None:
    """Write what stdout still holds; where that fails drop it, and raise OSError."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _drop(sys.stdout)
        raise


def _drop(stream: TextIO | None) -> None:
    """What a stream still holds can't be written; Python would try again at exit, and complain."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(message: str) -> None:
    try:
        print(f"pyglobenc: {message}", file=sys.stderr)
    except OSError:
        _drop(sys.stderr)
