"""Checks that keep a command's outputs apart from the files that it reads."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from pyglobenc.common.files import check_apart


def check_outputs(outputs: Iterable[str], model: str, inputs: Iterable[str | Path | int]) -> None:
    """Refuse an output that is an input or the model's folder, or lies in one of them.

    Args:
        outputs: files or folders that will be written.
        model: name or folder of the model.
        inputs: files and folders that are read; 0 stands for standard input.

    Raises:
        ValueError: an output would be written over or into what is read, or the model doesn't exist.
    """
    kept = [*inputs, *model_places(model)]
    for output in outputs:
        check_apart(output, kept)


def check_output_folder(output: str, model: str, inputs: Iterable[str | Path]) -> None:
    """Refuse an output folder that would be mixed with what is read; arguments as for `check_outputs`.

    Raises:
        ValueError: the folder is an input, lies in one or contains one, lies in the model's folder, or is an
            address.
        NotADirectoryError: there is a file of that name.
    """
    inputs = list(inputs)
    if "://" in output:
        raise ValueError(f"{output}: the output must be a folder; an object store is only read")
    check_outputs([output], model, inputs)
    if os.path.exists(output) and not os.path.isdir(output):
        raise NotADirectoryError(20, "is a file, not a folder", output)
    for path in inputs:
        if os.path.exists(output) and os.path.samefile(os.path.dirname(os.path.realpath(path)), output):
            raise ValueError(f"{output}: holds {path}, which is read; choose a folder of its own")


def model_places(name: str) -> list[str]:
    """Return the folders that a model is read from: its own, and the base model's if it is a PEFT adapter.

    A model of the hub that isn't in the local cache has none.

    Raises:
        ValueError: the package of a bundled model isn't installed, or a path is no folder.
    """
    # This imports transformers, which takes seconds.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    from pyglobenc.models.pretrained import SENTIMENT, model_folder

    places, names = [], [name]
    while names:
        name = names.pop()
        folder = model_folder("minilm" if name == SENTIMENT else name)
        if not os.path.isdir(folder):
            try:
                cached = [
                    try_to_load_from_cache(folder, file) for file in ("config.json", "adapter_config.json")
                ]
            except HFValidationError:
                # The name can't be one of the hub. Loading the model reports that.
                continue
            folder = next((os.path.dirname(file) for file in cached if isinstance(file, str)), None)
        if folder is not None and folder not in places:
            places.append(folder)
            names += _base_models(Path(folder))
    return places


def _base_models(folder: Path) -> list[str]:
    try:
        name = json.loads((folder / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name] if isinstance(name, str) and os.path.isdir(name) else []
