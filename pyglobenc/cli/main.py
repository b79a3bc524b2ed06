"""The entry point of the command line: `pyglobenc explain`, `attribute`, `evaluate` and others."""

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
from pyglobenc.cli import attribute, bench, demo, doctor, evaluate, explain, methods
from pyglobenc.common.characters import printable
from pyglobenc.common.files import one_line

# Each module has NAME, HELP, add_arguments(parser) and run(options), which returns the exit status.
COMMANDS = (explain, attribute, evaluate, demo, methods, bench, doctor)

FAILED, INTERRUPTED = 1, 130
# These errors carry messages that are written for the user. Any other error is a fault of this program.
EXPECTED = (OSError, ValueError, TypeError, RuntimeError, ImportError, MemoryError)

# A usage error is cut to this many characters, because it may repeat a long argument.
MOST = 600


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line without control characters."""

    def error(self, message: str) -> NoReturn:
        line = printable(" ".join(message[:MOST].split()))
        self.exit(2, f"{self.prog}: error: {line} ({self.prog} --help lists the options)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the command's arguments; None for the arguments of the process.

    Returns:
        Exit status: 0 if the command succeeded, 1 if it failed (one line on stderr gives the reason), and 130
        if Ctrl-C or SIGTERM stopped it.

    Raises:
        SystemExit: the usage is wrong (status 2), or help or the version was printed (status 0).
    """
    # SIGTERM, which a scheduler sends to end a job, is treated like Ctrl-C so that no more work is lost. Only
    # the main thread may set a signal handler.
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
        # Help and usage errors end here. The process that reads them may be gone.
        with suppress(OSError):
            _flush_stdout()
        raise
    except KeyboardInterrupt:
        _say("stopped")
        return INTERRUPTED
    except BrokenPipeError:
        # The process that reads the output has closed it.
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
    parser = Parser(prog="pyglobenc", description="Token attribution for transformers, with fused kernels.")
    parser.add_argument("--version", action="version", version=f"pyglobenc {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(command.NAME, help=command.HELP, description=command.HELP)
        command.add_arguments(sub)
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        sub.set_defaults(run=command.run, error=sub.error)
    return parser


def _prepare_streams() -> None:
    """Make sure that no file gets the number of a closed standard stream.

    Otherwise the text written to that stream would go into the file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # `os.open` takes the lowest free number, which is this one.
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        # `print(file=None)` would write to standard output.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A character that the terminal can't show must not be an error.
            stream.reconfigure(errors="replace")


@contextmanager
def _one_line_each() -> Iterator[None]:
    """Print every warning and log record within the context as one line without control characters."""
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
    """Write what stdout still buffers; if that fails, drop it and raise OSError."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _drop(sys.stdout)
        raise


def _drop(stream: TextIO | None) -> None:
    """Drop what a broken stream buffers; else Python would try again at exit and print an error."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(message: str) -> None:
    try:
        print(f"pyglobenc: {message}", file=sys.stderr)
    except OSError:
        _drop(sys.stderr)
