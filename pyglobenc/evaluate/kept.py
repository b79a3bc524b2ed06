"""Keeps finished steps in a folder, so that an evaluation that was stopped can go on."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyglobenc._version import __version__
from pyglobenc.common.files import write_file
from pyglobenc.evaluate.examples import Example

if TYPE_CHECKING:
    from pyglobenc.evaluate.attributions import Attributor

log = logging.getLogger("pyglobenc")

# The finished steps are in this folder of the output.
STEPS = "steps"
Arrays = dict[str, np.ndarray]


class Kept:
    """The finished steps of an evaluation, one file each.

    Args:
        folder: folder of the output, which exists; None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = None if folder is None else folder / STEPS
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)

    def step(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """Return the arrays of a step: those that an earlier run kept, or else those that `compute` returns.

        Args:
            name: name of the step, which is part of a file's name.
            compute: function that returns named arrays.

        Raises:
            OSError: the file can't be written.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f"{name}.npz"
        found = _read(path)
        if found is None:
            found, buffer = compute(), io.BytesIO()
            np.savez(buffer, **found)
            write_file(path, buffer.getbuffer(), follow=False)
        return found


def _read(path: Path) -> Arrays | None:
    """Return the arrays of a file; None if there is no such file or if it is damaged."""
    try:
        # The checksum of each array is verified when it is read.
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        log.warning("%s is computed again: %s", path, error)
        return None


@contextmanager
def kept_steps(
    output: str | Path | None,
    attributor: Attributor,
    examples: Sequence[Example],
    described: dict[str, Any],
) -> Iterator[Kept]:
    """Context with the finished steps in a folder, which no other process may use at the same time.

    Raises:
        ValueError: another evaluation was started in the folder, or another process is at work there.
        OSError: the folder can't be written.
    """
    from pyglobenc.evaluate.kept import Kept

    if output is None:
        yield Kept(None)
        return
    from pyglobenc.scale.corpus.manifest import check_manifest, model_fingerprint, set_complete
    from pyglobenc.scale.corpus.shards import locked

    data = hashlib.sha256(json.dumps([one.record() for one in examples]).encode()).hexdigest()
    prints = {"sha256": model_fingerprint(attributor.model), "tokenizer": attributor.fingerprint()}
    manifest = {"input": {"sha256": data, "texts": len(examples)}, "model": prints, "version": __version__}
    # As read back from the file, where tuples are lists.
    manifest |= json.loads(json.dumps(described))
    folder = Path(output)
    check_manifest(folder, manifest, "pyglobenc.evaluation")
    with locked(folder, "evaluate", wait=False) as held:
        if not held:
            raise ValueError(f"{folder}: another process evaluates into this folder")
        yield Kept(folder)
        set_complete(folder, True)
