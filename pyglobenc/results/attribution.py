"""The class Attribution: one text's tokens, their scores, and the settings that they were computed with."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from pyglobenc._version import __version__
from pyglobenc.common.arguments import known_arguments
from pyglobenc.common.files import check_apart, one_line, write_file
from pyglobenc.common.result_fields import DTYPES, check_fields, is_index, is_number, shown
from pyglobenc.viz.units import Unit

FORMAT = "pyglobenc.attribution"
# Version 2 added predictions and sentence pairs, version 3 the error, and version 4 the contrast.
FORMAT_VERSION = 4
SUFFIXES = (".json", ".safetensors")
# A folder that contains one of these files holds a model.
MODEL_FILES = ("config.json", "adapter_config.json")
# These saved entries can be derived from the others.
DERIVED = ("words", "dtype")
# Files of older format versions lack these fields.
ADDED = ("predictions", "text_pair", "parts", "error", "contrast", "contrast_name")
# These fields are lists of pairs, which JSON stores as lists of lists.
PAIRS = ("offsets", "windows", "predictions")


@dataclass(eq=False)
class Attribution:
    """The contribution of each token of a text to one target.

    Attributes:
        text: the whole text; for a sentence pair, the first text.
        tokens, token_ids: the n tokens that the model read, special tokens included.
        special: n flags; True for a token that the tokenizer added, such as [CLS] or [SEP].
        scores: (n,) float32 or float64, finite. For a target token these are the target's row, whose largest
            entry is 1; see log_scale.
        method: the method's name in `pyglobenc.methods.registry`.
        model: name or folder of the model.
        target: position of the target token, or index of the target class, or id of the next token that a
            language model is explained by. It is 0 for a mean over tokens.
        target_name: name of the target token or class.
        target_kind: "token", "class" or "mean". "mean" is the mean of the rows of several tokens.
        log_scale: the method's own values are scores * exp(log_scale). For joined windows see
            `pyglobenc.inputs.windows.join`.
        word_ids: n numbers of the word that each token belongs to; None for a special token. The whole field
            is None without a fast tokenizer. `pyglobenc.inputs.words` says what a word is.
        offsets: n pairs (start, stop) of character positions in the text that the token comes from. None
            without a fast tokenizer.
        merge_words: whether pictures show words instead of tokens.
        cut: number of tokens that truncation removed from the end of the text.
        windows: (start, stop) of the text tokens in each joined window, as token positions. None for a text
            in one piece.
        label, probability: the class that a classifier predicts. For a multi-label classifier
            (config.problem_type) it is the most probable label, if its probability is above 0.5. None if no
            label is predicted, for a regression, and for a model without a classifier.
        predictions: pairs (name, probability), the most probable first: the predicted class, or every label
            with a probability above 0.5. For a regression: pairs (name, value) of its outputs. None for other
            models.
        text_pair: the second text of a sentence pair; None for a single text.
        parts: for a sentence pair, n entries: 0 for a token of the first text, 1 for a token of the second,
            and None for a special token.
        error: how far the scores may be off, where the method measures or estimates it: the relative L2
            distance that rounding moves them by (transformer attribution), or the relative gap of the sum of
            integrated gradients. None where it isn't known. For joined windows it is the largest one.
        contrast, contrast_name: the class or token whose logit is subtracted from the target's; None if there
            is none.
        settings: the options of the computation, as strings, numbers or None.
        version: version of pyglobenc.

    Raises:
        ValueError: a field has another type, length or range than described here, or is not finite. The
            message names the field.
    """

    text: str
    tokens: list[str]
    token_ids: list[int]
    special: list[bool]
    scores: np.ndarray
    method: str
    model: str
    target: int
    target_name: str
    target_kind: str = "token"
    log_scale: float = 0.0
    word_ids: list[int | None] | None = None
    offsets: list[tuple[int, int]] | None = None
    merge_words: bool = False
    cut: int = 0
    windows: list[tuple[int, int]] | None = None
    label: str | None = None
    probability: float | None = None
    predictions: list[tuple[str, float]] | None = None
    text_pair: str | None = None
    parts: list[int | None] | None = None
    error: float | None = None
    contrast: int | None = None
    contrast_name: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    version: str = __version__

    def __post_init__(self):
        self.scores = np.asarray(self.scores)
        try:
            check_fields(vars(self))
        except ValueError as error:
            raise ValueError(f"Attribution: {error}") from None

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Attribution) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        pair = "" if self.text_pair is None else f", {self.text_pair[:40]!r}"
        return (
            f"Attribution({self.text[:40]!r}{pair}, {len(self)} tokens, {self.method}, target "
            f"{self.target_name!r})"
        )

    @known_arguments
    def units(self, merge_words: bool | None = None) -> list[Unit]:
        """Return the tokens, or the words with the sum of their tokens' scores; special tokens stay alone.

        Args:
            merge_words: return words. None: as the attribution's field merge_words says.

        Raises:
            ValueError: words are asked for and word_ids is None.
        """
        merge_words = self.merge_words if merge_words is None else merge_words
        if merge_words and self.word_ids is None:
            raise ValueError(
                "Attribution: words can't be merged, the tokenizer doesn't say which tokens form one; a "
                "fast tokenizer does"
            )
        groups: list[list[int]] = []
        for i in range(len(self)):
            word = self.word_ids[i] if merge_words else None
            if groups and word is not None and word == self.word_ids[groups[-1][0]]:
                groups[-1].append(i)
            else:
                groups.append([i])
        units, ends = [], [0, 0]
        for group in groups:
            part = (self.parts and self.parts[group[0]]) or 0
            unit, ends[part] = self._unit(group, ends[part], self.text_pair if part else self.text)
            units.append(unit)
        return units

    def _unit(self, group: list[int], end: int, text: str) -> tuple[Unit, int]:
        """Return the unit of some tokens, and where the text read so far ends; it ended at `end` before."""
        score, special = float(self.scores[group].sum(dtype=np.float64)), self.special[group[0]]
        raw, apart = "".join(self.tokens[i] for i in group), " " if group[0] else ""
        if special or self.offsets is None:
            return Unit(raw, apart, score, special, tuple(group)), end
        before = group[0] - 1
        if (
            group[0]
            and not self.special[before]
            and (self.parts is None or self.parts[before] == self.parts[group[0]])
        ):
            apart = ""
        start, stop = self.offsets[group[0]][0], self.offsets[group[-1]][1]
        piece = text[start:stop]
        # Several tokens of one character have the same offsets, and some tokens have empty offsets. Such a
        # token is shown by its name in the vocabulary.
        if start < end or not piece.strip():
            return Unit(raw, text[end:start] or apart, score, False, tuple(group)), max(end, stop)
        start += len(piece) - len(piece.lstrip())
        return Unit(piece.strip(), text[end:start] or apart, score, False, tuple(group)), start + len(
            piece.strip()
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values; Python floats hold float32 and float64 scores exactly."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out |= {"scores": self.scores.tolist(), "dtype": self.scores.dtype.name}
        for name in PAIRS:
            out[name] = None if out[name] is None else [list(pair) for pair in out[name]]
        if self.merge_words:
            out["words"] = [
                {"text": unit.text, "score": unit.score, "tokens": list(unit.positions)}
                for unit in self.units()
            ]
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any], scores: np.ndarray | None = None) -> "Attribution":
        """Make an attribution from the result of `to_dict`.

        Args:
            data: the result of `to_dict`.
            scores: (n,) scores; None for those in data.

        Raises:
            ValueError: a field is missing, unknown or invalid. The message names the field.
        """
        values = _named(data, scores is None)
        dtype = data["dtype"]
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {shown(dtype)}")
        if scores is None:
            listed = values["scores"]
            if not isinstance(listed, list) or not all(map(is_number, listed)):
                raise ValueError("scores must be a list of finite numbers")
            with np.errstate(over="ignore"):
                scores = np.array(listed, dtype=dtype)
        elif scores.dtype.name != dtype:
            raise ValueError(f"scores must be {dtype}, as dtype says, got {scores.dtype}")
        for name in PAIRS:
            if isinstance(values.get(name), list):
                values[name] = [tuple(pair) if isinstance(pair, list) else pair for pair in values[name]]
        return cls(**values | {"scores": scores})

    @known_arguments
    def save(self, path: str | Path) -> None:
        """Write a .json or .safetensors file from which `pyglobenc.load` restores every bit."""
        save(path, self)

    @known_arguments
    def show(self, merge_words: bool | None = None) -> None:
        """Print a coloured picture in the terminal; merge_words as for `units`."""
        Attributions([self]).show(merge_words)

    @known_arguments
    def to_html(self, path: str | Path | None = None, merge_words: bool | None = None) -> str:
        """Return a self-contained HTML page, and write it to path if given.

        Args:
            path: file to write; None writes nothing.
            merge_words: as for `units`.

        Raises:
            ValueError: words are asked for and word_ids is None, or path lies in the model's folder.
            OSError: the file can't be written.
        """
        return Attributions([self]).to_html(path, merge_words)

    @known_arguments
    def to_png(self, path: str | Path | None = None, merge_words: bool | None = None) -> bytes:
        """Return a PNG picture, and write it to path if given.

        Args:
            path: file to write; None writes nothing.
            merge_words: as for `units`.

        Raises:
            ValueError: as for `to_html`, or there is too much text for a picture.
            OSError: the file can't be written.
        """
        return Attributions([self]).to_png(path, merge_words)

    def _repr_html_(self) -> str:
        from pyglobenc.viz import html

        return html.fragment([self])


class Attributions(list):
    """A list of the attributions of several texts, with the methods of `Attribution` for the whole list."""

    @known_arguments
    def save(self, path: str | Path) -> None:
        """Write a .json or .safetensors file from which `pyglobenc.load` restores every bit."""
        save(path, self)

    @known_arguments
    def show(self, merge_words: bool | None = None) -> None:
        """Print a coloured picture of each attribution; merge_words as for `Attribution.units`."""
        from pyglobenc.viz import terminal

        terminal.show(self, merge_words)

    @known_arguments
    def to_html(
        self, path: str | Path | None = None, merge_words: bool | None = None, columns: int = 1
    ) -> str:
        """Return one HTML page of all attributions, as `Attribution.to_html` does of one.

        Args:
            path, merge_words: as for `Attribution.to_html`.
            columns: how many attributions stand side by side in a row.

        Raises:
            TypeError, ValueError: as for `Attribution.to_html`, or columns is no integer of at least 1.
            OSError: the file can't be written.
        """
        from pyglobenc.viz import html

        page = html.page(self, merge_words, columns)
        if path is not None:
            write(path, page.encode("utf-8"), self)
        return page

    @known_arguments
    def to_png(
        self, path: str | Path | None = None, merge_words: bool | None = None, columns: int = 1
    ) -> bytes:
        """Return one PNG picture of all attributions; arguments and errors as for `to_html`.

        Raises:
            ValueError: there is no attribution.
        """
        from pyglobenc.viz import png

        if not self:
            raise ValueError("Attributions: there is nothing to draw, the list is empty")
        picture = png.picture(self, merge_words, columns)
        if path is not None:
            write(path, picture, self)
        return picture

    def _repr_html_(self) -> str:
        from pyglobenc.viz import html

        return html.fragment(self)


def to_json(attributions: Attribution | Iterable[Attribution]) -> str:
    """Return the text of a .json file: a header, and each attribution as `Attribution.to_dict` returns it."""
    return json.dumps(_document(attributions), indent=1) + "\n"


def _document(attributions: Attribution | Iterable[Attribution]) -> dict[str, Any]:
    single = isinstance(attributions, Attribution)
    entries = [attribution.to_dict() for attribution in ([attributions] if single else attributions)]
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "single": single}
    return header | {"attributions": entries}


@known_arguments
def save(path: str | Path, attributions: Attribution | Iterable[Attribution]) -> None:
    """Write one attribution or several to a file.

    Args:
        path: file whose suffix gives the format: .json, or .safetensors with the scores (n,) as tensors named
            "0", "1" and so on.
        attributions: one attribution, or several.

    Raises:
        ValueError: the suffix is another one, or the file lies in the folder of an attributed model.
        OSError: the file can't be written. An older file of that name is kept.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"save: the file's name must end in {' or '.join(SUFFIXES)}, got {path.name!r}")
    attributions = attributions if isinstance(attributions, Attribution) else list(attributions)
    single = [attributions] if isinstance(attributions, Attribution) else attributions
    if path.suffix == ".json":
        return write(path, to_json(attributions).encode("ascii"), single)
    from safetensors.numpy import save as to_safetensors

    document = _document(attributions)
    for entry in document["attributions"]:
        del entry["scores"]
    tensors = {
        str(index): np.ascontiguousarray(attribution.scores) for index, attribution in enumerate(single)
    }
    return write(path, to_safetensors(tensors, {FORMAT: json.dumps(document)}), single)


def write(path: str | Path, data: bytes, attributions: Iterable[Attribution]) -> None:
    """Write a file, but refuse to write over or into the folder of a model that was attributed."""
    models = {attribution.model for attribution in attributions}
    check_apart(
        path,
        [model for model in models if any(os.path.isfile(os.path.join(model, name)) for name in MODEL_FILES)],
    )
    write_file(path, data)


@known_arguments
def load(path: str | Path) -> Attribution | Attributions:
    """Read a file that `save` wrote.

    Every field is checked for its type, length and range before anything is returned.

    Args:
        path: the .json or .safetensors file.

    Returns:
        Attribution with scores (n,), or Attributions if several were saved together.

    Raises:
        ValueError: `save` did not write the file, or a newer version of pyglobenc did. The message names the
            file and the field.
        OSError: the file can't be read.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"load: the file's name must end in {' or '.join(SUFFIXES)}, got {path.name!r}")
    try:
        document, tensors = read(path)
        _check_header(document)
        names = [str(index) for index in range(len(document["attributions"]))]
        if tensors is not None and tensors.keys() != set(names):
            raise ValueError(
                f"a file of {len(names)} attributions must have their scores as tensors 0 to "
                f"{len(names) - 1}, got {len(tensors)} tensors"
            )
        entries = []
        for index, entry in zip(names, document["attributions"], strict=True):
            try:
                entries.append(Attribution.from_dict(entry, None if tensors is None else tensors[index]))
            except ValueError as error:
                raise ValueError(
                    f"attribution {index}: {str(error).removeprefix('Attribution: ')}"
                ) from error
        return entries[0] if document["single"] else Attributions(entries)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load: {path} is not a file of saved attributions: {error}") from error


def _named(data: Any, with_scores: bool) -> dict[str, Any]:
    """Return the fields of a saved attribution, and check that no field is missing or unknown."""
    if not isinstance(data, dict):
        raise ValueError(f"an attribution must be an object, got {shown(data)}")
    expected = {f.name for f in fields(Attribution)} | {"dtype"}
    if not with_scores:
        expected.discard("scores")
    for name in sorted(expected - data.keys() - set(ADDED)):
        raise ValueError(f"{name} is missing")
    for name in sorted(data.keys() - expected - set(DERIVED)):
        raise ValueError(f"{shown(name)} is no field of an attribution")
    return {name: value for name, value in data.items() if name not in DERIVED}


def _check_header(document: Any) -> None:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"no {FORMAT!r} header")
    version, single, entries = (document.get(name) for name in ("format_version", "single", "attributions"))
    if not is_index(version):
        raise ValueError(f"format_version must be an integer of at least 0, got {shown(version)}")
    if version > FORMAT_VERSION:
        raise ValueError(f"its format {version} is newer than this version's {FORMAT_VERSION}")
    if not isinstance(entries, list):
        raise ValueError(f"attributions must be a list, got {shown(entries)}")
    if not isinstance(single, bool) or (single and len(entries) != 1):
        raise ValueError(
            f"single must be true or false, and true only for one attribution, got {shown(single)} and "
            f"{len(entries)} attributions"
        )


def read(path: Path, form: str = FORMAT) -> tuple[Any, dict[str, np.ndarray] | None]:
    """Return the document in a file, and the tensors by name if it is a .safetensors file.

    Args:
        path: the .json or .safetensors file.
        form: name of the metadata of a .safetensors file that holds the document.

    Raises:
        ValueError: the file is damaged.
        OSError: it can't be read.
    """
    if path.suffix == ".json":
        return json.loads(path.read_bytes()), None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            document = (file.metadata() or {}).get(form, "null")
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    # NumPy raises its own errors for a dtype that it lacks.
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its tensors can't be read: {one_line(error)}") from error
    return json.loads(document), tensors
