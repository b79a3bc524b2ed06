"""Outputs of a command kept apart from what it reads."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from pyglobenc.common.files import check_apart


def check_outputs(outputs: Iterable[str], model: str, inputs: Iterable[str | Path | int]) -> None:
    """Refuse outputs that are, or lie in, the model's folder or an input.

    Args:
        outputs: files or folders that will be written.
        model: name or folder of the model.
        inputs: files and folders that are read; 0 for standard input.

    Raises:
        ValueError: an output would be written over or into what is read; or there is no such model.
    """
    kept = [*inputs, *model_places(model)]
    for output in outputs:
        check_apart(output, kept)


def check_output_folder(output: str, model: str, inputs: Iterable[str | Path]) -> None:
    """Refuse an output folder that is, lies in or holds an input, or lies in the model's folder; arguments as
    of `check_outputs`.
    """
    inputs = list(inputs)
    check_outputs([output], model, inputs)
    if os.path.exists(output) and not os.path.isdir(output):
        raise NotADirectoryError(20, "is a file, not a folder", output)
    for path in inputs:
        if os.path.exists(output) and os.path.samefile(os.path.dirname(os.path.realpath(path)), output):
            raise ValueError(f"{output}: holds {path}, which is read; choose a folder of its own")


def model_places(name: str) -> list[str]:
    """Folders that a model is read from: its own, and that of the base model of a PEFT adapter; none of a
    model not here yet.

    Raises:
        ValueError: a bundled model whose package isn't installed, a path that isn't a folder.
    """
    # it imports transformers, which takes seconds
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
                # no name of the hub; loading says so
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
