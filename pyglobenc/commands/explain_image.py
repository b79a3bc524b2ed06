"""`pyglobenc explain --image`: an image in, overlays of its classes' maps out."""

import argparse
from pathlib import Path

from pyglobenc.files import check_writable

METHOD = "transformer-attribution"


def run(options: argparse.Namespace) -> int:
    """Explain one image; returns the exit status."""
    if options.text or options.file is not None or options.whole:
        options.error("--image explains an image, not a text")
    if options.method not in ("globenc", METHOD):
        options.error(f"--image: --method must be {METHOD}, got {options.method!r}")
    if options.model == "minilm":
        options.error("--image: name an image classifier with --model")
    refused = [f"--{name}" for name in ("html", "json", "save") if getattr(options, name) is not None]
    if refused:
        options.error(f"--image writes a picture: --png, not {' or '.join(refused)}")
    png = options.png or f"{Path(options.image).stem}.attribution.png"
    check_writable(png)
    # these take seconds
    import torch
    from PIL import Image

    from pyglobenc.hf.pretrained import load_image_classifier
    from pyglobenc.images import explain_image

    with Image.open(options.image) as image:
        image.load()
    model, processor = load_image_classifier(options.model, options.device)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    targets = None if options.target is None else [options.target]
    result = explain_image(model, processor, image, targets=targets, backend=options.backend, dtype=dtype)
    result.to_png(png)
    if not options.quiet:
        for target, label in result.labels.items():
            predicted = ", predicted" if target == result.predicted else ""
            print(f"{label} ({target}{predicted}): {result.probabilities[target]:.1%}")
        print(png)
    return 0
