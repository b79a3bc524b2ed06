"""Answers the page's requests with the package's public functions. Gradio isn't imported here."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from pyglobenc.demo import MAX_CHARACTERS, MAX_PIXELS
from pyglobenc.demo.models import Models
from pyglobenc.evaluate import evaluate
from pyglobenc.explain import explain
from pyglobenc.explain.layers import explain_layers
from pyglobenc.inputs.images import explain_image, open_image
from pyglobenc.inputs.targets import class_named
from pyglobenc.inputs.windows import Text
from pyglobenc.methods.registry import METHODS
from pyglobenc.results import Attributions
from pyglobenc.results.images import ImageAttribution
from pyglobenc.results.layers import LayerAttribution

MOST_METHODS, MOST_CLASSES = 4, 4
PREVIEW = 400  # pixels, the longer side of an image's preview


@dataclass(frozen=True)
class TextRequest:
    """What a user asks about a text.

    Attributes:
        model: name of the model.
        text, pair: the text, and the second text of a sentence pair ("" for none).
        methods: names of at most MOST_METHODS methods.
        token: the target of methods that explain a token: its position, "mean", or "" for the default.
        label: the target of methods that explain a class: its index or label, or "" for the predicted class.
        merge_words: show words instead of tokens.
    """

    model: str
    text: str
    pair: str = ""
    methods: Sequence[str] = ("globenc",)
    token: str = ""
    label: str = ""
    merge_words: bool = True

    def check(self, models: Models, max_characters: int) -> None:
        """Raise ValueError if there are too many characters or methods, or if a method isn't offered."""
        count = len(self.text or "") + len(self.pair or "")
        if count > max_characters:
            raise ValueError(f"demo: at most {max_characters} characters are explained, got {count}")
        if not 1 <= len(self.methods) <= MOST_METHODS:
            raise ValueError(f"demo: choose 1 to {MOST_METHODS} methods, got {len(self.methods)}")
        for name in self.methods:
            models.check_method(name)

    @property
    def given(self) -> Text:
        """The text or the pair, as `explain` takes it."""
        return (self.text, self.pair) if self.pair and self.pair.strip() else self.text or ""

    @property
    def head(self) -> bool:
        """Whether a method needs the model's head."""
        return any(METHODS[name].target == "class" for name in self.methods)

    def target(self, method: str) -> int | str | None:
        """Return the target of a method, as `explain` takes it."""
        return number_or_name(self.label if METHODS[method].target == "class" else self.token)


def number_or_name(text: str | None) -> int | str | None:
    """Return what a user typed as an integer, as a name, or as None if it is empty."""
    text = (text or "").strip()
    try:
        return int(text)
    except ValueError:
        return text or None


def explain_text(models: Models, request: TextRequest, max_characters: int = MAX_CHARACTERS) -> Attributions:
    """Explain a text by every method of a request.

    Raises:
        TypeError, ValueError: the request is refused, or `explain` refuses it.
    """
    request.check(models, max_characters)
    done = Attributions()
    with models.text(request.model, request.head) as (model, tokenizer):
        for method in request.methods:
            chosen = dict(method=method, target=request.target(method), merge_words=request.merge_words)
            one = explain(model, tokenizer, request.given, long="windows", progress=False, **chosen)
            one.model = request.model
            done.append(one)
    return done


def explain_every_layer(
    models: Models, request: TextRequest, max_characters: int = MAX_CHARACTERS
) -> LayerAttribution:
    """Explain a text by the first method of a request, in every layer and with the layers' maps.

    Raises:
        TypeError, ValueError: the request is refused, or `explain_layers` refuses it.
    """
    request.check(models, max_characters)
    method = request.methods[0]
    with models.text(request.model, request.head) as (model, tokenizer):
        chosen = dict(target=request.target(method), merge_words=request.merge_words, maps=True)
        found = explain_layers(model, tokenizer, request.given, method, **chosen)
    found.attribution.model = request.model
    return found


def measure_text(
    models: Models, request: TextRequest, max_characters: int = MAX_CHARACTERS
) -> list[dict[str, Any]]:
    """Return comprehensiveness and sufficiency of every method of a request, as rows of `evaluate`.

    Raises:
        TypeError, ValueError: the request is refused, or `evaluate` refuses it.
    """
    request.check(models, max_characters)
    with models.text(request.model, True) as (model, tokenizer):
        options = dict(words=request.merge_words, target=number_or_name(request.label))
        options |= dict(methods=list(request.methods), bootstrap=0, progress=False)
        return evaluate(model, tokenizer, [request.given], **options).rows


def open_upload(path: str, max_pixels: int = MAX_PIXELS) -> bytes:
    """Return a small PNG of an uploaded image.

    Raises:
        ValueError, OSError: as `open_image`, with the file's name alone.
    """
    image, out = _opened(path, max_pixels), BytesIO()
    image.thumbnail((PREVIEW, PREVIEW))
    image.convert("RGB").save(out, "PNG")
    return out.getvalue()


def _opened(path: str, max_pixels: int) -> Any:
    try:
        return open_image(path, max_pixels)
    except ValueError as error:
        # Users needn't know where the server keeps files.
        raise ValueError(str(error).replace(path, Path(path).name)) from error


def explain_picture(
    models: Models, name: str, path: str | None, method: str, targets: str, max_pixels: int = MAX_PIXELS
) -> ImageAttribution:
    """Explain classes of an image side by side.

    Args:
        models: the page's models.
        name: name of the image model.
        path: the uploaded file.
        method: name of a method; "" for the default of `explain_image`.
        targets: indices or labels of classes, or token positions, separated by commas; "mean"; or "" for the
            default.
        max_pixels: as for `open_image`.

    Raises:
        TypeError, ValueError, OSError: the request is refused, the file can't be read, or `explain_image`
            refuses it.
    """
    if not path:
        raise ValueError("demo: choose an image first")
    listed: Any = [number_or_name(part) for part in (targets or "").split(",") if part.strip()]
    if len(listed) > MOST_CLASSES:
        raise ValueError(f"demo: at most {MOST_CLASSES} classes are explained, got {len(listed)}")
    listed = "mean" if listed == ["mean"] else listed or None
    if method:
        models.check_method(method)
    # A rollout needs no classifier.
    head = True if method and METHODS[method].target == "class" else None
    image = _opened(path, max_pixels)
    with models.image(name, head) as (model, processor):
        if isinstance(listed, list):
            listed = [
                class_named(model.config, None, one, "class") if isinstance(one, str) else one
                for one in listed
            ]
        return explain_image(
            model, processor, image, method=method or None, targets=listed, max_pixels=max_pixels
        )
