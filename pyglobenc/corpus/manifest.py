"""What a job is: its input, model and settings, kept beside its output so that only the same job goes on."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyglobenc.files import write_file

NAME = "_manifest.json"
FORMAT = "pyglobenc.corpus"
FORMAT_VERSION = 1
# in a model's config, but not about what it computes
PROVENANCE = ("_name_or_path", "transformers_version")


def model_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of a model's class, config, and every weight's name, dtype, shape and bytes."""
    import torch

    config = {name: value for name, value in model.config.to_dict().items() if name not in PROVENANCE}
    digest = hashlib.sha256(type(model).__name__.encode())
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a fast tokenizer's whole definition, of another one's vocabulary and special tokens."""
    if tokenizer.is_fast:
        text = tokenizer.backend_tokenizer.to_str()
    else:
        text = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a job's manifest, or check that the folder holds this very job's.

    Args:
        folder: of the output; made if it isn't there.
        manifest: JSON values; what is under "info" may differ between runs of one job.

    Raises:
        ValueError: the folder belongs to another job, or holds shards of an unknown one.
        OSError: the folder can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    header = {"format": FORMAT, "format_version": FORMAT_VERSION}
    if not path.exists():
        if any(folder.glob("*.parquet")):
            raise ValueError(f"{folder}: holds Parquet files but no {NAME}, so it isn't known what they are; choose another --output")
        write_file(path, (json.dumps(header | manifest, indent=1) + "\n").encode())
        return
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a manifest: {error}") from error
    old, new = _flat(found), _flat(header | manifest)
    changed = [f"{name} {old.get(name)!r}, now {new.get(name)!r}" for name in sorted(old | new) if old.get(name) != new.get(name)]
    if changed:
        raise ValueError(
            f"{folder}: another job was started here ({'; '.join(changed)}); go on with its settings or choose another --output"
        )


def _flat(manifest: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in manifest.items() if isinstance(manifest, dict) else ():
        if name != "info":
            out |= {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
    return out
