"""What a page offers: its methods, and its models, of which one request at a time uses some."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock
from typing import Any

from pyglobenc.methods.registry import METHODS, find_method
from pyglobenc.models.pretrained import load_image_model, load_pretrained

# So many text models and so many image models stay in memory.
KEPT = 2
# For a long text these methods take minutes, in which all other users of a page wait.
SLOW = ("attention-flow", "decompx", "integrated-gradients", "occlusion")


class Models:
    """The models and methods of a page. A few models stay in memory.

    Args:
        texts: names of text models that the page offers, as `load_pretrained` takes them.
        images: names of image models.
        public: refuse every other name. Without it, a user may name any model of the hub and any folder.
        device: name of a torch device; None for a GPU if there is one.
        methods: names of the methods that the page offers. None: all, or all but SLOW if the page is public.

    Raises:
        ValueError: a method is unknown.
    """

    def __init__(
        self,
        texts: Sequence[str],
        images: Sequence[str] = (),
        public: bool = False,
        device: str | None = None,
        methods: Sequence[str] | None = None,
    ):
        if methods is None:
            methods = [name for name in METHODS if not (public and name in SLOW)]
        self.methods = tuple(find_method(name, "demo").name for name in methods)
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

    def check_method(self, name: str) -> None:
        """Raise ValueError if the page doesn't offer a method."""
        if name not in self.methods:
            raise ValueError(f"demo: the method must be one of {', '.join(self.methods)}, got {name!r}")

    def _check(self, name: str, offered: Sequence[str]) -> None:
        if not isinstance(name, str) or not name.strip():
            raise ValueError("demo: no model is chosen")
        if self.public and name not in offered:
            raise ValueError(f"demo: the model must be one of {', '.join(offered) or '(none)'}, got {name!r}")

    def _load_text(self, name: str, head: bool) -> tuple[Any, Any]:
        return load_pretrained(name, device=self.device, head=head)

    def _load_image(self, name: str, head: bool | None) -> tuple[Any, Any]:
        return load_image_model(name, self.device, head)
