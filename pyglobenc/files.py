"""Reading text, and writing files so that a full disk or Ctrl-C never leaves half a file."""

import os
import stat
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from pyglobenc.characters import printable


def write_file(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all: to a temporary file beside it, then moved into place; devices and pipes directly.

    Raises:
        OSError: with the path asked for as its filename.
    """
    path = Path(path)
    try:
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):
            path.write_bytes(data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".pyglobenc-{uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            # a disk may only report that it is full when told to write
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(path: str | Path) -> None:
    """Raise OSError if a file can't be written there, before work is spent on what goes into it."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(21, "is a folder", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(2, f"there is no folder {path.parent}", str(path))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(13, "not writable", str(path))


def one_line(error: BaseException | str) -> str:
    """An error's message in one line that steers no terminal, the file's name first if it is about one."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return printable(" ".join(message.split())) or type(error).__name__


def read_at_most(file: BinaryIO, name: str, most: int) -> bytes:
    """All bytes of a file that may have no end; ValueError, with the file's name, if there are more than most."""
    data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{name}: holds more than {most >> 20} MiB")
    return data


def decode(data: bytes, name: str) -> str:
    """Bytes of a text file as UTF-8, a byte order mark dropped and line ends made \\n; name is the file's, for errors.

    Raises:
        ValueError: not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
