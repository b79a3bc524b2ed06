"""The manifest of a job: its input, model and settings, stored with its output.

With the manifest, only the same job can continue in an output folder.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyglobenc.common.files import write_file
from pyglobenc.scale.corpus.shards import locked, remove_temporary

NAME = "_manifest.json"
FORMAT = "pyglobenc.corpus"
# In version 2 a shard stores which records it holds.
FORMAT_VERSION = 3
# These entries may differ between runs of one job.
FREE = ("info", "complete")
# These entries of a config don't change what the model computes.
PROVENANCE = ("_name_or_path", "transformers_version")


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return the SHA-256 of a model's class, config, and every weight's name, dtype, shape and bytes."""
    import torch

    config = {name: value for name, value in model.config.to_dict().items() if name not in PROVENANCE}
    digest = hashlib.sha256(type(model).__name__.encode())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of a tokenizer's class, vocabulary, special tokens, rules and limits."""
    told = [
        type(tokenizer).__name__,
        tokenizer.special_tokens_map,
        tokenizer.model_max_length,
        tokenizer.model_input_names,
    ]
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # These two are settings of the last call, not properties of the tokenizer.
        told.append({name: value for name, value in rules.items() if name not in ("truncation", "padding")})
    else:
        settings = {
            name: value
            for name, value in tokenizer.init_kwargs.items()
            if isinstance(value, bool | int | float)
        }
        file = getattr(tokenizer, "vocab_file", None)
        told += [tokenizer.get_vocab(), settings, Path(file).read_bytes().hex() if file else None]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def check_manifest(folder: Path, manifest: dict[str, Any], form: str = FORMAT) -> None:
    """Write a job's manifest, or check that the folder already holds the same manifest.

    Args:
        folder: folder of the output. It is made if it doesn't exist.
        manifest: JSON values. The entries under "info" may differ between runs of one job.
        form: name of the manifest's format.

    Raises:
        ValueError: the folder belongs to another job, or holds shards of an unknown one.
        OSError: the folder can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, manifest = folder / NAME, {"format": form, "format_version": FORMAT_VERSION} | manifest
    # If two jobs start at the same time, the second one sees the manifest of the first.
    with locked(folder, "manifest", wait=True):
        remove_temporary(path)
        if path.is_symlink():
            raise ValueError(f"{path}: is a symbolic link, which isn't followed; choose another --output")
        if not path.exists():
            if any(folder.glob("*.parquet")):
                raise ValueError(
                    f"{folder}: holds Parquet files but no {NAME}, so it isn't known what they are; choose "
                    f"another --output"
                )
            _write(path, manifest, complete=False)
            return
        old, new = _flat(_read(path)), _flat(manifest)
        changed = [
            f"{name} {old.get(name)!r}, now {new.get(name)!r}"
            for name in sorted(old | new)
            if old.get(name) != new.get(name)
        ]
        if changed:
            raise ValueError(
                f"{folder}: another job was started here ({'; '.join(changed)}); go on with its settings or "
                f"choose another --output"
            )


def set_complete(folder: Path, complete: bool) -> None:
    """Store in a job's manifest whether every shard is there and the input is still the same.

    Raises:
        ValueError: there is no manifest.
        OSError: the manifest can't be written.
    """
    path = folder / NAME
    with locked(folder, "manifest", wait=True):
        manifest = _read(path)
        if manifest.get("complete") is not complete:
            _write(path, manifest, complete)


def _write(path: Path, manifest: dict[str, Any], complete: bool) -> None:
    data = json.dumps(manifest | {"complete": complete}, indent=1) + "\n"
    write_file(path, data.encode(), follow=False)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a manifest: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a manifest: it must be an object, got {type(found).__name__}")
    return found


def _flat(manifest: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in manifest.items():
        if name not in FREE:
            out |= (
                {f"{name}.{key}": entry for key, entry in value.items()}
                if isinstance(value, dict)
                else {name: value}
            )
    return out
