"""`pyglobenc explain` takes texts, prints a picture of their attributions, and writes files."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyglobenc.cli import explain_generation, explain_image, methods
from pyglobenc.cli.options import (
    add_arithmetic,
    add_lengths,
    add_model,
    add_target,
    dtype_named,
    natural,
    positive,
    span,
)
from pyglobenc.common.files import check_writable, decode, one_line, read_at_most, write_file
from pyglobenc.explain import explain_each
from pyglobenc.inputs.images import MAX_PIXELS
from pyglobenc.inputs.windows import Text
from pyglobenc.results.attribution import SUFFIXES, Attribution, Attributions, to_json
from pyglobenc.results.generation import GenerationAttribution

NAME = "explain"
HELP = "show how much each token of a text contributes to a model's result"
# These limit a file and standard input, because all texts and their tokens are kept in memory.
MAX_BYTES, MAX_TEXTS = 1 << 26, 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.epilog = (
        "Every line of --file or of standard input is a text; blank lines are ignored. With --whole the "
        "whole input is one text. "
        "With --pair each line holds two texts, separated by a tab. "
        "After Ctrl-C or an error, the output files hold the texts that were finished."
    )
    parser.add_argument("text", nargs="*", help="texts (default: read --file or standard input)")
    parser.add_argument(
        "--pair",
        action="store_true",
        help="explain sentence pairs: every two texts, or the two columns of a file, form a pair",
    )
    parser.add_argument(
        "--file", metavar="FILE", help="UTF-8 file with one text per line; - is standard input"
    )
    parser.add_argument(
        "--whole", action="store_true", help="take the whole file or standard input as one text"
    )
    parser.add_argument(
        "--image",
        nargs="+",
        metavar="FILE",
        help="explain images; --model must be an image model. With texts, which come before --image, explain "
        "their similarity with one image; --model must be CLIP",
    )
    parser.add_argument(
        "--max-pixels",
        type=positive,
        default=MAX_PIXELS,
        help=f"largest number of pixels of an image (default {MAX_PIXELS})",
    )
    add_model(parser, "minilm", "which is a PyPI package")
    explain_generation.add_arguments(parser)
    default = (
        "default globenc, for image classifiers transformer-attribution, with --generate gradient-x-input, "
        "for texts with an image gradient-rollout"
    )
    parser.add_argument("--method", help=f"attribution method ({default}); 'help' lists them")
    add_target(parser, names=True)
    parser.add_argument(
        "--start-layer",
        type=natural,
        default=0,
        help="lowest layer of transformer-attribution's rollout (default 0; the published code for images "
        "takes 1 in its tests, that for text the last layer)",
    )
    _add_spans(parser)
    parser.add_argument(
        "--merge-words", action="store_true", help="show words, with the sum of their tokens' scores"
    )
    add_lengths(parser, "refuse it")
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="texts or windows in a batch (default 8)"
    )
    add_arithmetic(parser)
    _add_outputs(parser)


def _add_spans(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target-span",
        type=span,
        metavar="START:STOP",
        help="explain the tokens START to STOP - 1 together (information-flow)",
    )
    parser.add_argument(
        "--reasoning-span",
        type=span,
        metavar="START:STOP",
        help="tokens through which hops go on (information-flow; default: the target's)",
    )
    parser.add_argument(
        "--hops",
        type=natural,
        help="number of hops (information-flow; default 1 with --reasoning-span, else 0)",
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", metavar="FILE", help="write an HTML page")
    parser.add_argument("--png", metavar="FILE", help="write a PNG picture")
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write JSON that pyglobenc.load reads; - prints it instead of the picture",
    )
    parser.add_argument(
        "--save", metavar="FILE", help="write a .safetensors or .json file that pyglobenc.load reads"
    )
    parser.add_argument("--quiet", action="store_true", help="print no picture and no progress")


def run(options: argparse.Namespace) -> int:
    """Explain the texts or images, and return the exit status."""
    if options.method == "help":
        return methods.run(options)
    compared = explain_image.compared(options)
    _check_names(options)
    if options.image is not None and not compared:
        return explain_image.run(options)
    answers = explain_generation.wanted(options)
    options.method = options.method or ("gradient-x-input" if answers else "globenc")
    texts = _texts(options)
    explain_generation.check(options, texts)
    _check_outputs(options)
    # These imports take seconds.

    from pyglobenc.cli.outputs import check_outputs
    from pyglobenc.methods.registry import METHODS
    from pyglobenc.models.pretrained import load_pretrained

    # Standard input may be a file, which must not be written over.
    read = () if options.text else (0,) if options.file in (None, "-") else (options.file,)
    check_outputs((path for path, _ in _outputs(options)), options.model, (*read, *(options.image or ())))
    if compared:
        result = explain_image.compare(options, texts)
        _write(options, result, picture=not options.quiet)
        if not options.quiet and options.json != "-":
            explain_image.report(options.image, [result.image], [options.png])
        return 0
    if options.method not in METHODS:
        options.error(f"--method: must be one of {', '.join(METHODS)}, got {options.method!r}")
    # Only methods that explain a class, and generation, need the model's head.
    head = answers or METHODS[options.method].target == "class"
    model, tokenizer = load_pretrained(
        options.model, dtype_named(options.model_dtype), options.device, options.trust_remote_code, head
    )
    if answers:
        result = explain_generation.explained(options, model, tokenizer, texts[0])
        _write(options, result, picture=not options.quiet)
    else:
        _explain_each(options, model, tokenizer, texts)
    return 0


def _explain_each(options: argparse.Namespace, model: Any, tokenizer: Any, texts: list[Text]) -> None:
    """Explain the texts and write the result; after an error, write what was finished before it."""
    names = (
        "method",
        "target",
        "contrast",
        "start_layer",
        "target_span",
        "reasoning_span",
        "hops",
        "merge_words",
        "long",
        "max_length",
        "stride",
        "batch_size",
        "backend",
    )
    chosen = {name: getattr(options, name) for name in names} | {
        "dtype": dtype_named(options.dtype),
        "progress": not options.quiet,
    }
    done = Attributions()
    try:
        for attribution in explain_each(model, tokenizer, texts, **chosen):
            attribution.model = options.model
            done.append(attribution)
    except BaseException:
        if done and (_outputs(options) or options.json == "-"):
            print(
                f"pyglobenc: stopped after {len(done)} of {len(texts)} texts, which are written",
                file=sys.stderr,
            )
            _write(options, done, picture=False)
        raise
    _write(options, done[0] if len(texts) == 1 else done, picture=not options.quiet)


def _check_names(options: argparse.Namespace) -> None:
    """Refuse "-" for every output but JSON, and a file that is named twice."""
    for name in ("html", "png"):
        if getattr(options, name) == "-":
            options.error(f"--{name}: must name a file; only --json can be -")
    named = [options.file, *(options.image or ()), options.save, options.json, options.html, options.png]
    files = [os.path.realpath(name) for name in named if name not in (None, "-")]
    for name in files:
        if files.count(name) > 1 and (os.path.isfile(name) or not os.path.exists(name)):
            options.error(f"{name} is named twice and would be overwritten")


def _texts(options: argparse.Namespace) -> list[Text]:
    """Return the texts or pairs that the user gave; blank lines are left out."""
    if options.text and (options.file is not None or options.whole):
        options.error(
            "give texts as arguments or in a file, not both; --whole goes with a file or standard input"
        )
    if options.pair and options.whole:
        options.error("--pair and --whole exclude each other: a pair is one line with two columns")
    if options.pair and len(options.text) % 2:
        options.error(f"--pair needs an even number of texts, got {len(options.text)}")
    if options.text:
        return list(zip(options.text[::2], options.text[1::2], strict=True)) if options.pair else options.text
    if options.file not in (None, "-"):
        name = options.file
        with open(name, "rb") as file:
            data = read_at_most(file, name, MAX_BYTES)
    else:
        if sys.stdin is None or sys.stdin.isatty():
            options.error("give a text, --file FILE, or text on standard input")
        name = "standard input"
        data = read_at_most(sys.stdin.buffer, name, MAX_BYTES)
    text = decode(data, name)
    texts = [text] if options.whole else [line for line in text.split("\n") if line.strip()]
    if not text.strip():
        raise ValueError(f"{name}: holds no text")
    if len(texts) > MAX_TEXTS:
        most = f"at most {MAX_TEXTS} are explained at once; pyglobenc attribute takes any number"
        raise ValueError(f"{name}: holds {len(texts)} texts, and {most}")
    return (
        [_pair(line, f"{name}: pair {number}") for number, line in enumerate(texts, 1)]
        if options.pair
        else texts
    )


def _pair(line: str, name: str) -> tuple[str, str]:
    """Return the two texts of a line, which a tab separates."""
    columns = line.rstrip("\r").split("\t")
    if len(columns) != 2:
        raise ValueError(f"{name} must be two texts with a tab between, got {len(columns)} columns")
    return columns[0], columns[1]


def _outputs(
    options: argparse.Namespace,
) -> list[tuple[str, Callable[[str, Attribution | Attributions], None]]]:
    """Return the files to write, each with its writer; those that can be made again from others come last."""
    ways = {
        "save": lambda path, result: result.save(path),
        "json": lambda path, result: write_file(path, _json(result).encode("ascii")),
        "html": lambda path, result: result.to_html(path),
        "png": lambda path, result: result.to_png(path),
    }
    return [
        (path, write) for name, write in ways.items() if (path := getattr(options, name)) not in (None, "-")
    ]


def _json(result: Attribution | Attributions | GenerationAttribution) -> str:
    return result.to_json() if isinstance(result, GenerationAttribution) else to_json(result)


def _check_outputs(options: argparse.Namespace) -> None:
    if options.save is not None and Path(options.save).suffix not in SUFFIXES:
        options.error(f"--save: the file's name must end in {' or '.join(SUFFIXES)}, got {options.save!r}")
    if options.json == "-" and sys.stdout is None:
        raise ValueError("--json -: standard output is closed")
    for path, _ in _outputs(options):
        check_writable(path)


def _write(
    options: argparse.Namespace, result: Attribution | Attributions | GenerationAttribution, picture: bool
) -> None:
    """Write the files and print the result; if one output fails, the others are still written."""
    failed = []
    for path, write in _outputs(options):
        try:
            write(path, result)
        except (OSError, ValueError) as error:
            failed.append(error)
    if options.json == "-":
        print(_json(result), end="")
    elif picture:
        result.show()
    if failed:
        raise failed[0] if len(failed) == 1 else ValueError("; ".join(map(one_line, failed)))
