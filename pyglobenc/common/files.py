"""Reads text, and writes files so that a full disk or Ctrl-C never leaves half a file."""

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from pyglobenc.common.characters import printable

# The name of a temporary file begins with this many characters of the file's name, because file systems limit
# names to 255 bytes.
PREFIX = 40


def write_file(path: str | Path, data: bytes | memoryview, follow: bool = True) -> None:
    """Write a whole file or nothing: a temporary file beside it is written first, then moved into place.

    Devices and pipes are written directly. A file that is replaced keeps its owner and permissions; a new
    file has the permissions that the umask leaves.

    Args:
        path: path of the file.
        data: bytes of the file.
        follow: write through a symbolic link to its target; without it the link itself is replaced.

    Raises:
        OSError: the file can't be written. Its filename is `path`.
    """
    path = Path(path)
    try:
        if follow and path.exists() and not stat.S_ISREG(path.stat().st_mode):
            path.write_bytes(data)
        else:
            _replace(Path(os.path.realpath(path)) if follow else path, data)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _replace(path: Path, data: bytes | memoryview) -> None:
    temporary = path.with_name(f"{temporary_prefix(path)}{uuid4().hex}.tmp")
    try:
        # This call must create the file: an existing file or link of that name is an error.
        with open(temporary, "xb") as file:
            _keep_permissions(path, file.fileno())
            file.write(data)
            file.flush()
            # A disk may report that it is full only when the data is flushed.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def temporary_prefix(path: Path) -> str:
    """Return the beginning of the names of a file's temporary files, which end in .tmp."""
    return f".{path.name[:PREFIX]}."


def _keep_permissions(path: Path, handle: int) -> None:
    """Give an open file the owner and permissions of the file that it replaces."""
    with suppress(FileNotFoundError):
        old = os.lstat(path)
        if stat.S_ISREG(old.st_mode) and hasattr(os, "fchmod"):
            # Only root may change a file's owner. A user may set a group that they belong to.
            for owner in (old.st_uid, -1):
                with suppress(PermissionError):
                    os.fchown(handle, owner, old.st_gid)
                    break
            os.fchmod(handle, stat.S_IMODE(old.st_mode))


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power failure, on systems where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_apart(output: str | Path, kept: Iterable[str | Path | int]) -> None:
    """Refuse an output that is a file or folder that is read, or lies in one.

    Files are compared by identity, so other names, links and upper or lower case make no difference.

    Args:
        output: the file or folder that would be written; it need not exist.
        kept: files and folders that are read; an integer is an open file, such as 0 for standard input.

    Raises:
        ValueError: the output would be written over or into one of them.
    """
    place = Path(os.path.realpath(output))
    above = {_identity(path) for path in (place, *place.parents)} - {None}
    own = _identity(place)
    for path in kept:
        if _identity(path) in above:
            where = "standard input's file" if path == 0 else path
            raise ValueError(f"{output}: is or lies in {where}, which is read; choose another place")
        # The output may be a file of the folder under another name, such as a hard link.
        if (
            place.is_file()
            and path != 0
            and os.path.isdir(path)
            and any(_identity(file) == own for file in _files(path))
        ):
            raise ValueError(f"{output}: is a file of {path}, which is read; choose another place")


def _identity(path: str | Path | int) -> tuple[int, int] | None:
    """Return the device and inode of a file or folder; None for special files and for missing ones."""
    try:
        status = os.stat(path)
    # `os.stat` raises ValueError for names that no file can have.
    except (OSError, ValueError):
        return None
    return (
        (status.st_dev, status.st_ino)
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
        else None
    )


def _files(folder: str | Path) -> Iterable[str]:
    return (os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)


def check_writable(path: str | Path) -> None:
    """Raise OSError if a file can't be written there, before time is spent on its contents."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(21, "is a folder", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(2, f"there is no folder {path.parent}", str(path))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(13, "not writable", str(path))


def one_line(error: BaseException | str) -> str:
    """Return an error's message as one line without control characters; a file's name comes first."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return printable(" ".join(message.split())) or type(error).__name__


def read_at_most(file: BinaryIO, name: str, most: int) -> bytes:
    """Return all bytes of a file that may be endless.

    Args:
        file: the open file.
        name: its name for the message.
        most: largest number of bytes.

    Raises:
        ValueError: the file holds more bytes.
    """
    data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{name}: holds more than {most >> 20} MiB")
    return data


def decode(data: bytes, name: str) -> str:
    """Decode the bytes of a text file as UTF-8, without a byte order mark and with \\n as line ends.

    Args:
        data: bytes of the file.
        name: its name for the message.

    Raises:
        ValueError: the bytes are not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start})"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
