"""The command line: `pyglobenc explain`, `attribute`, `bench`, `doctor`."""

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress

from pyglobenc._version import __version__
from pyglobenc.commands import attribute, bench, doctor, explain
from pyglobenc.files import one_line

# each has NAME, HELP, add_arguments(parser) and run(options), which returns the exit status
COMMANDS = (explain, attribute, bench, doctor)

FAILED, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; argv None: the process's arguments.

    Returns:
        Exit status: 0 done, 1 failed (one line on stderr says why), 130 stopped by Ctrl-C or SIGTERM; wrong usage leaves with 2.
    """
    # a scheduler that ends a job loses no more of it than Ctrl-C does; only the main thread may ask for it
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # a character that the terminal can't show is no reason to fail
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *where: _say(one_line(message))
            status = options.run(options)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        _say("stopped")
        return INTERRUPTED
    except BrokenPipeError:
        # the reader has seen enough
        _drop_stdout()
        return FAILED
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, MemoryError) as error:
        if options.traceback:
            raise
        if isinstance(error, OSError) and error.filename is None:
            _drop_stdout()
        _say(one_line(error))
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyglobenc", description="Token attribution for transformers at the price of the forward pass.")
    parser.add_argument("--version", action="version", version=f"pyglobenc {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        sub = commands.add_parser(command.NAME, help=command.HELP, description=command.HELP)
        command.add_arguments(sub)
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        sub.set_defaults(run=command.run, error=sub.error)
    return parser


def _drop_stdout() -> None:
    """What stdout still holds can't be written; Python would try again at exit, and complain."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(message: str) -> None:
    print(f"pyglobenc: {message}", file=sys.stderr)
