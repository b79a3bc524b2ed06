"""Lets the functions that take a model and its tokenizer take a transformers pipeline in place of both."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from pyglobenc.common.arguments import argument_names

if TYPE_CHECKING:
    from transformers import Pipeline

# The pipelines that read a text or an image exactly as pyglobenc does, by the name of what prepares it.
PIPELINES = {
    "tokenizer": (
        "FeatureExtractionPipeline",
        "FillMaskPipeline",
        "TextClassificationPipeline",
        "TextGenerationPipeline",
        "TokenClassificationPipeline",
        "ZeroShotClassificationPipeline",
    ),
    "image_processor": ("ImageClassificationPipeline", "ImageFeatureExtractionPipeline"),
}
# Settings that hold settings of the tokenizer.
NESTED = ("tokenizer_kwargs", "tokenizer_encode_kwargs", "tokenizer_params")
# Settings that change neither the tokens of a single text nor the pixels of an image.
HARMLESS = ("candidate_labels", "hypothesis_template", "padding", "return_tensors", "timeout", "use_cache")
# A setting of one of these values is as if it weren't made.
DEFAULTS = {
    "add_special_tokens": (True, None),
    "do_sample": (False, None),
    "is_split_into_words": (False,),
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
    "truncation": (False, None, "do_not_truncate"),
}


def takes_pipelines(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function of a model and its tokenizer or processor, so that a pipeline may stand for both.

    The model is the function's first argument, and the tokenizer or processor is the second one. After a
    pipeline the second one may be left out. The pipeline's settings are honoured if the function has an
    argument for them, and refused otherwise.
    """
    names, who = argument_names(function), function.__name__
    reader = "tokenizer" if "tokenizer" in names else "processor"

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        from transformers import Pipeline

        given = args[0] if args else kwargs.get("model")
        if not isinstance(given, Pipeline):
            return function(*args, **kwargs)
        kind = _kind(who, given, names)
        # Tokenizers and processors are callable; texts and images aren't.
        has_reader = reader in kwargs or (len(args) > 1 and (args[1] is None or callable(args[1])))
        if not has_reader and kind == "image_processor" and reader == "tokenizer":
            kwargs.setdefault("processor", given.image_processor)
        elif not has_reader and len(args) > 1:
            args = (args[0], getattr(given, kind), *args[1:])
        elif not has_reader:
            kwargs[reader] = getattr(given, kind)
        if args:
            args = (given.model, *args[1:])
        else:
            kwargs["model"] = given.model
        if type(given).__name__ == "ZeroShotClassificationPipeline":
            _check_pairs(who, args[2] if len(args) > 2 else kwargs.get("text", kwargs.get("texts")))
        for name, value in _settings(who, given, names, kwargs).items():
            kwargs.setdefault(name, value)
        return function(*args, **kwargs)

    return call


def _kind(who: str, pipeline: Pipeline, names: frozenset[str]) -> str:
    """Return the name of what prepares the pipeline's input, a key of PIPELINES.

    Raises:
        TypeError: the function `who`, which has arguments of these names, doesn't take the pipeline.
    """
    argument = {"tokenizer": "tokenizer", "image_processor": "processor"}
    able = {kind: kinds for kind, kinds in PIPELINES.items() if argument[kind] in names}
    found = type(pipeline)
    for kind, kinds in able.items():
        # A user's subclass may prepare its input in another way.
        if found.__name__ in kinds and found.__module__.startswith("transformers.pipelines."):
            return kind
    known = ", ".join(name for kinds in able.values() for name in kinds)
    raise TypeError(
        f"{who}: can't tell how a {found.__name__} prepares its input; it takes {known}; "
        "for another one give its model and its tokenizer or processor"
    )


def _check_pairs(who: str, texts: Any) -> None:
    """Raise ValueError unless texts is a pair or a list of pairs."""
    each = texts if isinstance(texts, list) else [texts]
    if not all(isinstance(one, tuple) for one in each):
        raise ValueError(
            f"{who}: a zero-shot pipeline reads each text with a hypothesis for each label; give the pair to "
            "explain, such as (text, 'This example is politics.')"
        )


def _settings(who: str, pipeline: Pipeline, names: frozenset[str], given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the function `who` that do what the pipeline's settings do.

    Args:
        who: name of the function.
        pipeline: the pipeline.
        names: names of the function's arguments.
        given: the keyword arguments of the call. They are used rather than the pipeline's settings.

    Raises:
        ValueError: the function can't do what a setting does.
    """
    settings: dict[str, Any] = {}
    for name, value in pipeline._preprocess_params.items():
        settings |= value if name in NESTED else {name: value}
    if "target_ids" in pipeline._postprocess_params and given.get("target") is None:
        raise ValueError(
            f"{who}: the pipeline chooses among targets of its own; give the one to explain as target"
        )
    generates = "max_new_tokens" in names
    if generates and given.get("answer") is None:
        settings |= getattr(pipeline, "_generate_kwargs", {})
    settings = {
        name: value
        for name, value in settings.items()
        if name not in HARMLESS and not any(value is one or value == one for one in DEFAULTS.get(name, ()))
    }
    wanted = {}
    if generates and "max_new_tokens" in settings:
        wanted["max_new_tokens"] = settings.pop("max_new_tokens")
    cuts = settings.get("truncation") in (True, "longest_first") and "long" in names
    if cuts and pipeline.tokenizer.truncation_side == "right":
        del settings["truncation"]
        wanted["long"] = "truncate"
    # Without truncation a tokenizer doesn't use its max_length.
    if "truncation" not in settings and not generates:
        length = settings.pop("max_length", None)
        wanted |= {"max_length": length} if cuts and length is not None else {}
    if settings:
        shown = ", ".join(f"{name}={value!r:.40}" for name, value in settings.items())
        hint = "let the pipeline write and give its text as answer" if generates else "make one without it"
        raise ValueError(f"{who}: can't do what the pipeline's settings do ({shown}); {hint}")
    return wanted
