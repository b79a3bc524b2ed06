"""Checks the arguments of `evaluate`: methods, metrics, settings and protocols."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from pyglobenc.evaluate.examples import REMOVALS, Example, Metric, Settings
from pyglobenc.evaluate.metrics import METRICS, OF_PROTOCOL
from pyglobenc.evaluate.metrics.rationales import check_top_k

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("pyglobenc")

# The means of this many resamples take 80 MB.
MAX_RESAMPLES = 10_000_000
FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)
ALL = "all"
# This target stands for the true class of each text.
LABEL = "label"
# What `evaluate` computes without being told.
USUAL_METRICS = ("comprehensiveness", "sufficiency")
# The arguments that a published protocol sets. Another value of them is refused.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "eraser": {"fractions": FRACTIONS, "target": None, "words": False},
    "globenc": {"target": None, "words": False, "long": "truncate", "metrics": ("correlation",)},
    "chefer-movies": {"target": LABEL, "long": "truncate", "max_length": 512},
    # The published scripts for images leave the first layer out of transformer attribution's rollout.
    "chefer-segmentation": {"start_layer": 1},
    "chefer-perturbation": {"start_layer": 1},
}
# The published evaluation on movie reviews uses the last layer alone.
PUBLISHED_METHODS = {"chefer-movies": {"transformer-attribution": "transformer-attribution-last"}}
# The values of these arguments that stand for the protocol's own.
USUAL = {"target": None, "long": "error", "max_length": None, "start_layer": None, "metrics": USUAL_METRICS}
# What a metric may need, in words.
NEEDS = {
    "labels": "labels (labels=), and none were given",
    "classifier": "the probabilities of classes",
    "classes": "the probabilities of classes",
    "decoder": "a language model with its head (ForCausalLM)",
    "needles": "needles (needles=), and none were given",
    "rationales": "rationales (rationales=), and none were given",
    "masks": "masks (masks=), and none were given",
}


def check_protocol(protocol: str | None, given: Mapping[str, Any], of_images: bool) -> dict[str, Any]:
    """Return the arguments with those that a protocol sets, and refuse other values of these.

    Args:
        protocol: name of a protocol, or None.
        given: the arguments of the call by name.
        of_images: whether images are evaluated.

    Raises:
        ValueError: the protocol is unknown, or is for images and texts are given, or the other way round, or
            an argument has another value. The message names the argument.
    """
    if given["start_layer"] is not None:
        check_count("start_layer", given["start_layer"], 0)
    if protocol is None:
        return dict(given)
    if protocol not in PROTOCOLS:
        raise ValueError(f"evaluate: protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    of_protocol = {"metrics": tuple(OF_PROTOCOL.get(protocol, USUAL_METRICS))} | PROTOCOLS[protocol]
    if ("start_layer" in of_protocol) != of_images:
        raise ValueError(f"evaluate: protocol {protocol!r} is for {'texts' if of_images else 'images'}")
    chosen = dict(given)
    for name, value in of_protocol.items():
        if name in USUAL and given[name] == USUAL[name]:
            chosen[name] = value
        elif given[name] != value and name != "metrics":
            raise ValueError(f"evaluate: protocol {protocol!r} needs {name}={value!r}, got {given[name]!r}")
    return chosen


def check_count(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise TypeError or ValueError unless a value is an integer in [least, most]; most None: no limit."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"evaluate: {name} must be an integer, got {value!r:.80}")
    if value < least:
        raise ValueError(f"evaluate: {name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"evaluate: {name} must be at most {most}, got {value}")


def check_lists(given: Mapping[str, Any]) -> None:
    """Check that arguments of `evaluate` that hold several values are lists, arrays or strings.

    Raises:
        TypeError: one is something else. The message names it.
    """
    for name, value in given.items():
        many = isinstance(value, Sequence) and not isinstance(value, bytes)
        if not many and not getattr(value, "ndim", 0):
            raise TypeError(f"evaluate: {name} must be a list, got {value!r:.80}")


def check_kind(of_texts: Mapping[str, Any], of_images: Mapping[str, Any]) -> bool:
    """Tell whether `evaluate` gets images, and refuse arguments of the other kind.

    Args:
        of_texts, of_images: the arguments that texts or images alone have, by name; None if not given.

    Raises:
        TypeError: there are neither texts with a tokenizer nor images, or an argument belongs to the others.
    """
    images = of_images["images"] is not None
    if not images and (of_texts["texts"] is None or of_texts["tokenizer"] is None):
        raise TypeError("evaluate: give a tokenizer and texts, or images (images=, processor=)")
    wrong = [name for name, value in (of_texts if images else of_images).items() if value is not None]
    if wrong:
        kind = "images" if images else "texts"
        raise TypeError(f"evaluate: {' and '.join(wrong)} can't be given with {kind}")
    return images


def make_settings(
    tokenizer: PreTrainedTokenizerBase | None,
    fractions: Sequence[float],
    remove: str,
    words: bool,
    seed: int,
    protocol: str | None,
    top_k: int | float | None = None,
) -> tuple[Settings, list[str]]:
    """Check the arguments that metrics read; return them, and a note if `remove` had to change.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """
    if remove not in REMOVALS:
        raise ValueError(f"evaluate: remove must be one of {', '.join(REMOVALS)}, got {remove!r}")
    if isinstance(fractions, str) or not all(isinstance(fraction, Real) for fraction in fractions):
        raise TypeError(f"evaluate: fractions must be a list of numbers, got {fractions!r:.80}")
    fractions = tuple(float(fraction) for fraction in fractions)
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"evaluate: fractions must lie above 0 and be at most 1, got {fractions}")
    check_count("seed", seed, 0)
    check_top_k(top_k)
    notes: list[str] = []
    if tokenizer is None:
        return Settings(fractions, remove, seed=seed, protocol=protocol), notes
    if not hasattr(tokenizer, "mask_token_id"):
        raise TypeError(f"evaluate: tokenizer must be a transformers tokenizer, got {tokenizer!r:.80}")
    mask_id = tokenizer.mask_token_id
    if remove == "mask" and mask_id is None:
        notes.append("The tokenizer has no mask token, so removed tokens are deleted (remove='delete').")
        log.warning("evaluate: the tokenizer has no mask token, so removed tokens are deleted")
        remove = "delete"
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Settings(fractions, remove, mask_id, pad_id, words, seed, protocol, top_k), notes


def wanted_methods(methods: str | Sequence[str], protocol: str | None) -> list[str]:
    """Return the names of the methods that are asked for, or the protocol's variants of them.

    Raises:
        ValueError: a method is unknown.
    """
    from pyglobenc.evaluate.attributions import RANDOM
    from pyglobenc.methods.registry import METHODS

    published = PUBLISHED_METHODS.get(protocol, {})
    names = _names("methods", methods, [*METHODS, RANDOM])
    return list(dict.fromkeys(published.get(name, name) for name in names))


def _names(what: str, asked: str | Sequence[str], known: Sequence[str]) -> list[str]:
    """Return each of the names once; "all" stands for all known ones."""
    every = isinstance(asked, str) and asked == ALL
    names = list(known) if every else [asked] if isinstance(asked, str) else list(asked)
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"evaluate: {what} must be {ALL!r} or of {', '.join(known)}, got {name!r}")
    if not names:
        raise ValueError(f"evaluate: {what} is empty")
    return list(dict.fromkeys(names))


def choose_metrics(
    asked: str | Sequence[str], examples: Sequence[Example], why_no_classes: str, protocol: str | None = None
) -> tuple[list[Metric], list[str]]:
    """Return the metrics that are asked for, and notes on those that "all" leaves out.

    Raises:
        ValueError: a metric is unknown, or lacks what it needs.
    """
    there = {
        "labels": examples[0].label is not None,
        "classifier": examples[0].probabilities is not None,
        "classes": examples[0].probabilities is not None and examples[0].answer is None,
        "decoder": examples[0].answer is not None,
        "rationales": any(one.rationale is not None for one in examples),
        "needles": any(one.needle is not None for one in examples),
        "masks": any(one.mask is not None for one in examples),
    }
    known, chosen = METRICS | OF_PROTOCOL.get(protocol, {}), []
    without: dict[str, list[str]] = {}
    for name in _names("metrics", asked, list(known)):
        missing = sorted(need for need in known[name].needs if not there[need])
        if not missing:
            chosen.append(known[name])
            continue
        reason = NEEDS[missing[0]]
        if missing[0] in ("classifier", "classes") and why_no_classes:
            reason += f"; {why_no_classes}"
        if asked != ALL:
            raise ValueError(f"evaluate: the metric {name} needs {reason}")
        without.setdefault(reason, []).append(name)
    notes = [f"Left out without {reason}: {', '.join(left_out)}." for reason, left_out in without.items()]
    if not chosen:
        raise ValueError("evaluate: no metric is left; " + " ".join(notes))
    return chosen, notes
