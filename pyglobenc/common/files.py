"""Reading text, and writing files so that a full disk or Ctrl-C never leaves half a file."""

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from pyglobenc.common.characters import printable

# of a name, what its temporary file's name begins with; names end at 255 bytes
PREFIX = 40


def write_file(path: str | Path, data: bytes | memoryview, follow: bool = True) -> None:
    """Write a file whole or not at all: to a temporary file beside it, then moved into place; devices and
    pipes directly.

    A file that is replaced keeps its owner and permissions, a new one has those that the umask leaves.

    Args:
        path: of the file.
        data: what it shall hold.
        follow: write through a symbolic link to what it names; without it the link itself is replaced.

    Raises:
        OSError: with the path asked for as its filename.
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
        # made by this call: what is there already, and be it a link, is an error
        with open(temporary, "xb") as file:
            _keep_permissions(path, file.fileno())
            file.write(data)
            file.flush()
            # a disk may only report that it is full when told to write
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def temporary_prefix(path: Path) -> str:
    """How the names of a file's temporary files begin; they end in .tmp."""
    return f".{path.name[:PREFIX]}."


def _keep_permissions(path: Path, handle: int) -> None:
    """Give an open file the owner and permissions of the one that it shall replace."""
    with suppress(FileNotFoundError):
        old = os.lstat(path)
        if stat.S_ISREG(old.st_mode) and hasattr(os, "fchmod"):
            # only root gives files away; a group that one belongs to can be kept
            for owner in (old.st_uid, -1):
                with suppress(PermissionError):
                    os.fchown(handle, owner, old.st_gid)
                    break
            os.fchmod(handle, stat.S_IMODE(old.st_mode))


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_apart(output: str | Path, kept: Iterable[str | Path | int]) -> None:
    """Refuse an output that is, or lies in, a file or folder that is read, whatever name, link or case it is
    reached by.

    Args:
        output: the file or folder that would be written; it need not be there.
        kept: files and folders that are read; an integer is an open file, as 0 for standard input.

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
        # one of its files by another name
        if (
            place.is_file()
            and path != 0
            and os.path.isdir(path)
            and any(_identity(file) == own for file in _files(path))
        ):
            raise ValueError(f"{output}: is a file of {path}, which is read; choose another place")


def _identity(path: str | Path | int) -> tuple[int, int] | None:
    """What a file or folder is, by whatever name; None for devices and for what isn't there."""
    try:
        status = os.stat(path)
    # a name may hold what no file's name can
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
    """All bytes of a file that may have no end; ValueError, with the file's name, if there are more than
    most.
    """
    data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{name}: holds more than {most >> 20} MiB")
    return data


def decode(data: bytes, name: str) -> str:
    """Bytes of a text file as UTF-8, a byte order mark dropped and line ends made \\n; name is the file's,
    for errors.

    Raises:
        ValueError: not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start})"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
