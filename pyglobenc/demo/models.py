"""Loads the models that the page offers, keeps a few of them, and lends them to one request at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock
from typing import Any

from pyglobenc.models.pretrained import load_image_model, load_pretrained

# So many text models and so many image models stay in memory.
KEPT = 2


class Models:
    """The models of a page.

    Args:
        texts: names of text models that the page offers, as `load_pretrained` takes them.
        images: names of image models.
        public: refuse every other name. Without it, a user may name any model of the hub and any folder.
        device: name of a torch device; None for a GPU if there is one.
    """

    def __init__(
        self,
        texts: Sequence[str],
        images: Sequence[str] = (),
        public: bool = False,
        device: str | None = None,
    ):
        self.texts, self.images, self.public, self.device = tuple(texts), tuple(images), public, device
        self._lock = Lock()
        self._text = lru_cache(KEPT)(self._load_text)
        self._image = lru_cache(KEPT)(self._load_image)

    @contextmanager
    def text(self, name: str, head: bool) -> Iterator[tuple[Any, Any]]:
        """Lend a text model and its tokenizer; other requests wait until they are given back.

        Args:
            name: name of the model.
            head: load the model with its head, as for `load_pretrained`.

        Raises:
            ValueError: the page may not load this model, or it can't be loaded.
        """
        self._check(name, self.texts)
        with self._lock:
            yield self._text(name, head)

    @contextmanager
    def image(self, name: str, head: bool | None) -> Iterator[tuple[Any, Any]]:
        """Lend an image model and its processor; arguments and errors as for `text`."""
        self._check(name, self.images)
        with self._lock:
            yield self._image(name, head)

    def _check(self, name: str, offered: Sequence[str]) -> None:
        if not isinstance(name, str) or not name.strip():
            raise ValueError("demo: no model is chosen")
        if self.public and name not in offered:
            raise ValueError(f"demo: the model must be one of {', '.join(offered) or '(none)'}, got {name!r}")

    def _load_text(self, name: str, head: bool) -> tuple[Any, Any]:
        return load_pretrained(name, device=self.device, head=head)

    def _load_image(self, name: str, head: bool | None) -> tuple[Any, Any]:
        return load_image_model(name, self.device, head)
