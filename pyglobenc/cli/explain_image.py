"""`pyglobenc explain --image` takes images and writes pictures with an overlay for each explained class.

With a text, it explains how similar a model such as CLIP finds the text and the image.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pyglobenc.cli.options import dtype_named
from pyglobenc.common.characters import printable
from pyglobenc.common.files import check_writable
from pyglobenc.explain.similarity import COMPARING, compare_with_image
from pyglobenc.results.images import ComparedAttributions, ImageAttribution

# These options have no meaning for an image.
TEXT_OPTIONS = ("pair", "html", "json", "save", "model_dtype", "merge_words", "max_length", "stride")
TEXT_OPTIONS += ("target_span", "reasoning_span", "hops")
# These options, with their defaults, have no meaning for the similarity of a text and an image.
OTHERS = {"pair": False, "start_layer": 0, "chat": False}
OTHERS |= dict.fromkeys(("target", "contrast", "stride", "target_span", "reasoning_span", "hops"))
OTHERS |= dict.fromkeys(("generate", "answer", "model_dtype"))


def run(options: argparse.Namespace) -> int:
    """Explain the images, and return the exit status."""
    if options.model == "minilm":
        options.error("--image: name an image model with --model")
    refused = [
        f"--{name.replace('_', '-')}" for name in TEXT_OPTIONS if getattr(options, name) not in (None, False)
    ] + ["--long"] * (options.long != "error")
    if refused:
        options.error(f"--image takes no {' or '.join(refused)}; it writes a picture, --png")
    # There is one file for all images, or one file for each.
    files = [options.png] if options.png else [_picture(name) for name in options.image]
    if len(set(files)) < len(files):
        options.error(
            "--image: two images have the same name, so their pictures would have the same name too; name "
            "one file for all of them with --png"
        )
    for file in files:
        check_writable(file)
    # These imports take seconds.

    from pyglobenc.cli.outputs import check_outputs
    from pyglobenc.inputs.images import explain_image, open_image
    from pyglobenc.methods.registry import METHODS
    from pyglobenc.models.pretrained import load_image_model

    if options.method not in (None, *METHODS):
        options.error(f"--method: must be one of {', '.join(METHODS)}, got {options.method!r}")
    check_outputs(files, options.model, options.image)
    if options.contrast is not None or (isinstance(options.target, str) and options.target != "mean"):
        options.error("--image: --target takes an integer or mean, and there is no --contrast")
    if options.generate is not None or options.answer is not None or options.chat:
        options.error("--image doesn't go with --generate, --answer or --chat")
    images = [open_image(name, options.max_pixels) for name in options.image]
    # A rollout needs no classifier. If the model has one, the default target is the token that it reads.
    head = True if options.method is not None and METHODS[options.method].target == "class" else None
    model, processor = load_image_model(options.model, options.device, head, options.trust_remote_code)
    dtype = dtype_named(options.dtype)
    targets = options.target if options.target in (None, "mean") else [options.target]
    chosen = dict(
        method=options.method,
        targets=targets,
        start_layer=options.start_layer,
        backend=options.backend,
        dtype=dtype,
        max_pixels=options.max_pixels,
    )
    results = explain_image(model, processor, images, **chosen)
    for file, result in zip(files, [results] if options.png else results, strict=True):
        result.to_png(file)
    if not options.quiet:
        report(options.image, results, files)
    return 0


def compared(options: argparse.Namespace) -> bool:
    """Return whether the user gave both texts and an image, and check the options that go with both."""
    if options.image is None or not (options.text or options.file is not None or options.whole):
        return False
    if len(options.image) > 1:
        options.error(f"--image: texts are compared with one image, got {len(options.image)}")
    if options.model == "minilm":
        options.error("--image: name a model of texts and images, such as CLIP, with --model")
    for name, default in OTHERS.items():
        if getattr(options, name) != default:
            options.error(f"--{name.replace('_', '-')} doesn't go with a text and --image")
    if options.long == "windows":
        options.error("--long: a whole text is compared with the image; truncate it")
    if options.method not in (None, COMPARING):
        options.error(
            f"--method: the similarity of a text and an image is explained by {COMPARING} alone, got "
            f"{options.method!r}"
        )
    options.method, options.png = COMPARING, options.png or _picture(options.image[0])
    return True


def compare(options: argparse.Namespace, texts: list[str]) -> ComparedAttributions:
    """Return the attributions of texts and of the image that they are compared with."""
    from pyglobenc.inputs.images import open_image
    from pyglobenc.models.pretrained import load_image_model

    image = open_image(options.image[0], options.max_pixels)
    model, processor = load_image_model(
        options.model, options.device, False, options.trust_remote_code, text=True
    )
    names = ("merge_words", "long", "max_length", "backend")
    chosen = {name: getattr(options, name) for name in names} | {"dtype": dtype_named(options.dtype)}
    found = compare_with_image(model, processor, texts, image, options.max_pixels, **chosen)
    for attribution in found:
        attribution.model = options.model
    return found


def _picture(name: str) -> str:
    """Return the name of an image's picture, if the user names none."""
    return f"{Path(name).stem}.attribution.png"


def report(names: list[str], results: Sequence[ImageAttribution], files: list[str]) -> None:
    """Print what was explained of each image, and the names of the pictures."""
    for name, result in zip(names, results, strict=True):
        label = "; ".join(
            text if text == target else f"{target}: {text}" for target, text in result.labels.items()
        )
        predicted = (
            ""
            if not result.predictions
            else f"; predicted: {', '.join(one for one, _ in result.predictions)}"
        )
        print(printable(f"{name}: {label}{predicted}" if len(results) > 1 else f"{label}{predicted}"))
    for file in files:
        print(printable(file))
