"""`pyglobenc explain --generate` and `--answer`: each token of a language model's answer is explained."""

import argparse
from collections.abc import Sequence
from typing import Any

from pyglobenc.cli.options import dtype_named, positive
from pyglobenc.inputs.windows import Text
from pyglobenc.results.generation import GenerationAttribution


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name an answer."""
    parser.add_argument(
        "--generate",
        metavar="N",
        type=positive,
        help="let a language model generate up to N tokens after the text, always the most probable one, and "
        "explain each of them",
    )
    parser.add_argument("--answer", help="explain the tokens of this answer instead of generating one")
    parser.add_argument(
        "--chat", action="store_true", help="make the text a user's message by the model's chat template"
    )


def wanted(options: argparse.Namespace) -> bool:
    """Return whether the user asks for an answer's explanation."""
    return options.generate is not None or options.answer is not None


def check(options: argparse.Namespace, texts: Sequence[Text]) -> None:
    """Refuse options that don't go with an answer's explanation, if the user asks for one."""
    if not wanted(options):
        if options.chat:
            options.error("--chat goes with --generate or --answer")
        return
    if options.generate is not None and options.answer is not None:
        options.error("--generate and --answer exclude each other")
    others = {"pair": False, "target": None, "contrast": None, "merge_words": False, "long": "error"}
    others |= dict.fromkeys(("stride", "target_span", "reasoning_span", "hops"))
    for name, default in others.items():
        if getattr(options, name) != default:
            options.error(f"--{name.replace('_', '-')} doesn't go with --generate or --answer")
    if len(texts) != 1:
        options.error(
            f"--generate and --answer take one text at a time, got {len(texts)}; --whole joins lines"
        )


def explained(options: argparse.Namespace, model: Any, tokenizer: Any, text: str) -> GenerationAttribution:
    """Return the attribution of the answer to a text."""
    from pyglobenc.inputs.generation import explain_generation

    names = ("method", "answer", "start_layer", "max_length", "backend")
    found = explain_generation(
        model,
        tokenizer,
        [{"role": "user", "content": text}] if options.chat else text,
        max_new_tokens=options.generate,
        dtype=dtype_named(options.dtype),
        **{name: getattr(options, name) for name in names},
    )
    found.model = options.model
    return found
