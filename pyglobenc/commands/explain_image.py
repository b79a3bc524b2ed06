"""`pyglobenc explain --image`: an image in, overlays of its classes' maps out."""

import argparse
from pathlib import Path

from pyglobenc.files import check_writable

# what has no meaning for an image
TEXT_OPTIONS = ("html", "json", "save", "model_dtype", "merge_words", "max_length", "stride")


def run(options: argparse.Namespace) -> int:
    """Explain one image; returns the exit status."""
    if options.text or options.file is not None or options.whole:
        options.error("--image explains an image, not a text")
    if options.model == "minilm":
        options.error("--image: name an image classifier with --model")
    refused = [f"--{name.replace('_', '-')}" for name in TEXT_OPTIONS if getattr(options, name)] + ["--long"] * (options.long != "error")
    if refused:
        options.error(f"--image takes no {' or '.join(refused)}; it writes a picture, --png")
    png = options.png or f"{Path(options.image).stem}.attribution.png"
    check_writable(png)
    # these take seconds
    import torch
    from PIL import Image

    from pyglobenc.hf.pretrained import load_image_classifier
    from pyglobenc.images import CLASSES, explain_image
    from pyglobenc.methods.family import METHODS

    method = options.method or CLASSES
    if method not in (CLASSES, *METHODS):
        options.error(f"--image: --method must be one of {', '.join((CLASSES, *METHODS))}, got {method!r}")
    try:
        with Image.open(options.image) as image:
            image.load()
    # files that came from anywhere may raise anything
    except Exception as error:
        if getattr(error, "strerror", None):
            raise
        raise ValueError(f"can't read image {options.image!r}: {error}") from error
    model, processor = load_image_classifier(options.model, options.device, head=method == CLASSES)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    targets = None if options.target is None else [options.target]
    result = explain_image(model, processor, image, method=method, targets=targets, backend=options.backend, dtype=dtype)
    result.to_png(png)
    if not options.quiet:
        for target, label in result.labels.items():
            print(f"{target}: {label}{', predicted' if method == CLASSES and target == result.predicted else ''}")
        print(png)
    return 0
