"""The Gradio page: it reads the user's choices, calls `pyglobenc.demo.requests`, and shows pictures."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Sequence
from functools import wraps
from html import escape
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from pyglobenc.common.characters import printable
from pyglobenc.common.files import one_line
from pyglobenc.demo import MAX_CHARACTERS, MAX_PIXELS
from pyglobenc.demo.examples import IMAGES, TEXTS
from pyglobenc.demo.models import Models
from pyglobenc.demo.requests import (
    MOST_METHODS,
    TextRequest,
    explain_every_layer,
    explain_picture,
    explain_text,
    measure_text,
    open_upload,
)
from pyglobenc.results import to_json
from pyglobenc.viz.html import fragment

log = logging.getLogger("pyglobenc")

TITLE = "pyglobenc: which tokens does a transformer's result rest on?"
# A request whose user has gone is dropped, so a longer queue would only make others wait.
MOST_WAITING = 32
# Uploads and downloads are deleted after this many seconds. The second number is how often this is done.
KEPT_SECONDS, SWEPT_SECONDS = 3600, 600
MAX_UPLOAD = "20mb"
# A message is cut to this many characters, because it may repeat a long argument.
MOST = 600
METRICS = ("method", "metric", "value")
# System fonts, so that the page asks no other server for fonts.
FONTS = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
LAUNCH = dict(share=False, max_file_size=MAX_UPLOAD, theme=gr.themes.Default(**FONTS), quiet=True)
# Nothing is rendered by a second server, and neither runs nor traffic are recorded.
LAUNCH |= dict(ssr_mode=False, run_history=False, enable_monitoring=False)
# Gradio would refuse to start if its first request to localhost takes 3 seconds, as on a busy machine.
LAUNCH |= dict(_frontend=False)


def build(models: Models, max_characters: int = MAX_CHARACTERS, max_pixels: int = MAX_PIXELS) -> gr.Blocks:
    """Return the page, ready for `launch(**LAUNCH)`.

    Args:
        models: the models that the page offers.
        max_characters: longest text, or pair of texts, that is explained.
        max_pixels: largest number of pixels of an image.

    Returns:
        The page. All its requests run one after the other, in the order of Gradio's queue.
    """
    sweep = (SWEPT_SECONDS, KEPT_SECONDS)
    with gr.Blocks(title="pyglobenc", analytics_enabled=False, delete_cache=sweep) as page:
        gr.Markdown(f"# {TITLE}")
        with gr.Tab("Text"):
            _text_tab(models, max_characters)
        if models.images or not models.public:
            with gr.Tab("Image"):
                _image_tab(models, max_pixels)
    return page.queue(max_size=MOST_WAITING, api_open=False, default_concurrency_limit=1)


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show the message of an error on the page."""

    @wraps(function)
    def answer(*values: Any) -> Any:
        try:
            return function(*values)
        except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError) as error:
            # Gradio shows a message as HTML.
            raise gr.Error(
                escape(one_line(error)[:MOST]), title="Not explained", print_exception=False
            ) from error
        except Exception as error:
            log.exception("demo: unexpected error")
            raise gr.Error(f"unexpected {type(error).__name__}, which the server has logged") from error

    return answer


def _model_choice(models: Models, offered: Sequence[str]) -> gr.Dropdown:
    own = dict(allow_custom_value=True, info="or any name on the Hugging Face hub, or a folder")
    return gr.Dropdown(
        list(offered), value=next(iter(offered), None), label="Model", **({} if models.public else own)
    )


def _download(name: str, data: bytes) -> gr.DownloadButton:
    """Return a button with a file to download, which the page's delete_cache deletes."""
    path = save_bytes_to_cache(data, name, get_upload_folder())
    return gr.DownloadButton(value=path, interactive=True)


def _text_tab(models: Models, max_characters: int) -> None:
    asked = _text_choices(models, max_characters)
    button = gr.Button("Explain", variant="primary", elem_id="explain")
    shown = gr.HTML(elem_id="shown", apply_default_css=False)
    with gr.Row():
        files = [gr.DownloadButton(kind, interactive=False) for kind in ("HTML", "PNG", "JSON")]

    @told
    def explained(*values: Any) -> list[Any]:
        done = explain_text(models, TextRequest(*values), max_characters)
        columns = len(done)
        data = (done.to_html(columns=columns).encode(), done.to_png(columns=columns), to_json(done).encode())
        names = [f"attribution.{kind}" for kind in ("html", "png", "json")]
        return [fragment(done, columns=columns), *map(_download, names, data)]

    button.click(explained, asked, [shown, *files], api_name="explain")
    _layers(models, asked, max_characters)
    _faithfulness(models, asked, max_characters)


def _text_choices(models: Models, max_characters: int) -> list[gr.Component]:
    """Return the components whose values are the fields of `TextRequest`, in their order."""
    with gr.Row():
        with gr.Column():
            text = gr.Textbox(TEXTS[0][0], label="Text", lines=3, max_length=max_characters, elem_id="text")
            pair = gr.Textbox(label="Second text of a pair (optional)", max_length=max_characters)
            labels = [" / ".join(filter(None, row)) for row in TEXTS]
            gr.Examples(TEXTS, [text, pair], label="Examples", example_labels=labels)
        with gr.Column():
            model = _model_choice(models, models.texts)
            methods = gr.Dropdown(
                list(models.methods),
                value=[name for name in models.methods if name == "globenc"] or list(models.methods[:1]),
                multiselect=True,
                max_choices=MOST_METHODS,
                label=f"Methods, side by side (1 to {MOST_METHODS})",
                elem_id="methods",
            )
            with gr.Row():
                token = gr.Textbox(
                    label="Token",
                    info="position, or mean; for methods that explain a token",
                    max_length=20,
                    elem_id="token",
                )
                label = gr.Textbox(
                    label="Class", info="index or label; for methods that explain a class", max_length=100
                )
            words = gr.Checkbox(True, label="Merge tokens to words")
    return [model, text, pair, methods, token, label, words]


def _layers(models: Models, asked: list[gr.Component], max_characters: int) -> None:
    with gr.Accordion("Layer by layer", open=False):
        gr.Markdown(
            "For the first method, if it is a rollout or transformer-attribution: the text at the chosen "
            "layer, each token's score along the layers, and the layer's map between all tokens. Layer 0 is "
            "the lowest."
        )
        layer = gr.Slider(0, 11, 11, step=1, label="Layer", elem_id="layer")
        look = gr.Button("Show the layers", elem_id="look")
        shown = gr.HTML(elem_id="layers", apply_default_css=False)

    @told
    def looked(number: float, *values: Any) -> list[Any]:
        found = explain_every_layer(models, TextRequest(*values), max_characters)
        top = len(found) - 1
        number = min(int(number), top)
        pictures = _picture(found.to_png(), "scores along the layers")
        pictures += _picture(found.map_to_png(number), f"the map of layer {number}")
        return [gr.Slider(maximum=top, value=number), fragment([found.at(number)]) + pictures]

    gr.on([look.click, layer.release], looked, [layer, *asked], [layer, shown], api_name="layers")


def _faithfulness(models: Models, asked: list[gr.Component], max_characters: int) -> None:
    with gr.Accordion("How faithful are they?", open=False):
        gr.Markdown(
            "How much the predicted probability falls if the highest tokens are removed (comprehensiveness, "
            "higher is better) or kept alone (sufficiency, lower is better). This needs a classifier."
        )
        measure = gr.Button("Measure", elem_id="measure")
        table = gr.Dataframe(headers=list(METRICS), interactive=False, elem_id="faithfulness")

    @told
    def measured(*values: Any) -> list[list[Any]]:
        rows = measure_text(models, TextRequest(*values), max_characters)
        return [[row["method"], row["metric"], f"{row['mean']:.4f}"] for row in rows]

    measure.click(measured, asked, table, api_name="measure")


def _image_tab(models: Models, max_pixels: int) -> None:
    with gr.Row():
        with gr.Column():
            # Gradio's own image component would decode files before they are checked.
            upload = gr.File(label="Image", file_count="single", type="filepath", elem_id="upload")
            preview = gr.HTML(elem_id="preview")
            if IMAGES:
                gr.Examples([[path] for path in IMAGES], [upload], label="Examples")
        with gr.Column():
            model = _model_choice(models, models.images)
            method = gr.Dropdown(
                ["", *models.methods], value="", label="Method", info="empty: the model's default"
            )
            targets = gr.Textbox(
                label="Classes, side by side",
                info="indices or labels, separated by commas; empty: the predicted class",
                max_length=100,
                elem_id="classes",
            )
    button = gr.Button("Explain", variant="primary", elem_id="explain-image")
    shown = gr.HTML(elem_id="shown-image")
    file = gr.DownloadButton("PNG", interactive=False)

    @told
    def previewed(path: str | None) -> str:
        return "" if path is None else _picture(open_upload(path, max_pixels), "the image")

    @told
    def explained(name: str, path: str | None, *values: Any) -> list[Any]:
        done = explain_picture(models, name, path, *values, max_pixels=max_pixels)
        png, names = done.to_png(), ", ".join(done.labels.values())
        return [_picture(png, names), _download("attribution.png", png)]

    upload.change(previewed, upload, preview, api_name="preview")
    button.click(explained, [model, upload, method, targets], [shown, file], api_name="explain_image")


def _picture(png: bytes, name: str) -> str:
    """Return an HTML element that holds a PNG picture."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(printable(name))}" src="data:image/png;base64,{data}" style="max-width:100%">'
