"""`pyglobenc demo` serves a web page that explains texts and images."""

import argparse
import os
import tempfile
import time
from typing import Any

from pyglobenc.cli.options import positive
from pyglobenc.demo import MAX_CHARACTERS, MAX_PIXELS

NAME = "demo"
HELP = "serve a web page that explains texts and images"
MODELS = ("minilm", "minilm-sst2")
MISSING = "demo: Gradio is not installed: pip install 'pyglobenc[demo]'"
LARGEST_PORT = 65535


def port(text: str) -> int:
    """Return the number of a port in an option's text."""
    value = int(text)
    if not 1 <= value <= LARGEST_PORT:
        raise argparse.ArgumentTypeError(f"must lie in [1, {LARGEST_PORT}], got {text[:40]!r}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument(
        "--model",
        nargs="+",
        default=list(MODELS),
        help="text models that the page offers: names on the Hugging Face hub, folders, minilm or "
        "minilm-sst2 (default: the last two)",
    )
    parser.add_argument(
        "--image-model", nargs="+", default=[], metavar="MODEL", help="image models that the page offers"
    )
    parser.add_argument(
        "--method",
        nargs="+",
        help="methods that the page offers (default: all; with --public those that are quick for long texts)",
    )
    parser.add_argument(
        "--public",
        action="store_true",
        help="refuse every model that --model and --image-model don't name, for a page that strangers use",
    )
    parser.add_argument("--host", help="address to listen on (default 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=port, help="port to listen on (default: the first free one from 7860)")
    parser.add_argument(
        "--max-characters",
        type=positive,
        default=MAX_CHARACTERS,
        help=f"longest text that is explained (default {MAX_CHARACTERS})",
    )
    parser.add_argument(
        "--max-pixels",
        type=positive,
        default=MAX_PIXELS,
        help=f"largest number of pixels of an image (default {MAX_PIXELS})",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1... (default: a GPU if there is one)")


def run(options: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C, and return the exit status."""
    # Gradio reads this variable when it is imported, and calls home without it.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with tempfile.TemporaryDirectory(prefix="pyglobenc-demo-") as folder:
        # Uploads and downloads lie here, and are gone with the page.
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise ImportError(f"{MISSING} ({error})") from error
        from pyglobenc.demo.models import Models
        from pyglobenc.demo.page import LAUNCH, build

        models = Models(options.model, options.image_model, options.public, options.device, options.method)
        page = build(models, options.max_characters, options.max_pixels)
        where = dict(server_name=options.host, server_port=options.port)
        _, url, _ = page.launch(**LAUNCH, **where, prevent_thread_lock=True)
        print(f"pyglobenc demo: {url} (Ctrl-C ends it)", flush=True)
        try:
            _wait(page)
        finally:
            page.close(verbose=False)
    return 0


def _wait(page: Any) -> None:
    """Wait while the page is served; Gradio's own waiting would hide Ctrl-C."""
    while page.is_running:
        time.sleep(0.5)
