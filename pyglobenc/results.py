"""Attribution: one text's tokens and their scores, and what they were computed with."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from pyglobenc._version import __version__
from pyglobenc.files import write_file

FORMAT = "pyglobenc.attribution"
# 2 added predictions
FORMAT_VERSION = 2
SUFFIXES = (".json", ".safetensors")
# of what is saved, what follows from the rest
DERIVED = ("words", "dtype")
# fields that are lists of pairs, which JSON knows as lists of lists
PAIRS = ("offsets", "windows", "predictions")


@dataclass(frozen=True)
class Unit:
    """A token, or the tokens of one word merged, as pictures show it."""

    text: str  # as the text has it, where the tokenizer says where it stands
    before: str  # white space between it and the unit before
    score: float  # sum of its tokens' scores
    special: bool
    positions: tuple[int, ...]  # of its tokens, ascending


@dataclass(eq=False)
class Attribution:
    """How much each token of a text counts for one target.

    Attributes:
        text: the text, whole.
        tokens, token_ids: the n tokens that the model saw, special tokens included.
        special: n times whether the tokenizer added the token ([CLS], [SEP]...).
        scores: (n,) float32 or float64, finite. Of a token target: the target's row, largest entry 1; see log_scale.
        method: its name in `pyglobenc.methods.registry`.
        model: name or folder of the model.
        target: position of the target token, or index of the target class.
        target_name: that token or class by name.
        target_kind: "token" or "class".
        log_scale: the method's own value is scores * exp(log_scale); of joined windows see `pyglobenc.windows.join`.
        word_ids: n numbers of the word that each token belongs to, None for special tokens; None without a fast tokenizer.
        offsets: n pairs (start, stop) of characters of the text; None without a fast tokenizer.
        merge_words: pictures show words rather than tokens.
        cut: tokens at the end of the text that were left out by truncation.
        windows: (start, stop) of text tokens in each window that was joined, in positions of tokens; None for a text in one piece.
        label, probability: the class that a classifier predicts; of a multi-label one (config.problem_type) its most probable label,
            if that is above 0.5. None where no label is predicted, of a regression and of models without such a head.
        predictions: names and probabilities of every class or label that a classifier predicts, most probable first: one class, or the
            labels above 0.5. Of a regression, names and plain numbers of its outputs. None of other models.
        settings: the options it was computed with; strings, numbers, None.
        version: of pyglobenc.

    Raises:
        ValueError: fields of different lengths, or scores that aren't finite.
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
    settings: dict[str, Any] = field(default_factory=dict)
    version: str = __version__

    def __post_init__(self):
        self.scores = np.asarray(self.scores)
        if self.scores.dtype not in (np.float32, np.float64):
            raise ValueError(f"Attribution: scores must be float32 or float64, got {self.scores.dtype}")
        if self.scores.shape != (len(self.tokens),):
            raise ValueError(f"Attribution: scores must be (n,) = ({len(self.tokens)},), got {self.scores.shape}")
        for name in ("token_ids", "special", "word_ids", "offsets"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.tokens):
                raise ValueError(f"Attribution: {name} must have n = {len(self.tokens)} entries, got {len(value)}")
        if not (np.isfinite(self.scores).all() and np.isfinite(self.log_scale)):
            raise ValueError("Attribution: scores and log_scale must be finite")

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Attribution) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"Attribution({self.text[:40]!r}, {len(self)} tokens, {self.method}, target {self.target_name!r})"

    def units(self, merge_words: bool | None = None) -> list[Unit]:
        """Tokens, or words with their pieces' scores summed; special tokens stay alone. None: as merge_words of the attribution.

        Raises:
            ValueError: words asked for and not known.
        """
        merge_words = self.merge_words if merge_words is None else merge_words
        if merge_words and self.word_ids is None:
            raise ValueError("Attribution: words can't be merged, the tokenizer doesn't say which tokens form one; a fast tokenizer does")
        groups: list[list[int]] = []
        for i in range(len(self)):
            word = self.word_ids[i] if merge_words else None
            if groups and word is not None and word == self.word_ids[groups[-1][0]]:
                groups[-1].append(i)
            else:
                groups.append([i])
        units, end = [], 0
        for group in groups:
            unit, end = self._unit(group, end)
            units.append(unit)
        return units

    def _unit(self, group: list[int], end: int) -> tuple[Unit, int]:
        """The unit of some tokens, and where the text is read up to: `end` before it."""
        score, special = float(self.scores[group].sum(dtype=np.float64)), self.special[group[0]]
        raw, apart = "".join(self.tokens[i] for i in group), " " if group[0] else ""
        if special or self.offsets is None:
            return Unit(raw, apart, score, special, tuple(group)), end
        if group[0] and not self.special[group[0] - 1]:
            apart = ""
        start, stop = self.offsets[group[0]][0], self.offsets[group[-1]][1]
        piece = self.text[start:stop]
        # pieces of one character all point at it, and some point at nothing: the vocabulary's own name is left
        if start < end or not piece.strip():
            return Unit(raw, self.text[end:start] or apart, score, False, tuple(group)), max(end, stop)
        lead = len(piece) - len(piece.lstrip())
        return Unit(piece[lead:], self.text[end : start + lead] or apart, score, False, tuple(group)), stop

    def to_dict(self) -> dict[str, Any]:
        """Everything in it as JSON knows it; scores as Python floats, which hold float32 and float64 exactly."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out |= {"scores": self.scores.tolist(), "dtype": self.scores.dtype.name}
        for name in PAIRS:
            out[name] = None if out[name] is None else [list(pair) for pair in out[name]]
        if self.merge_words:
            out["words"] = [{"text": unit.text, "score": unit.score, "tokens": list(unit.positions)} for unit in self.units()]
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any], scores: np.ndarray | None = None) -> "Attribution":
        """The inverse of `to_dict`; scores (n,), or None for those in data."""
        values = {name: value for name, value in data.items() if name not in DERIVED}
        values["scores"] = np.array(values["scores"], dtype=data["dtype"]) if scores is None else scores
        for name in PAIRS:
            if values.get(name) is not None:
                values[name] = [tuple(pair) for pair in values[name]]
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write a .json or .safetensors file that `pyglobenc.load` reads back, bit for bit."""
        save(path, self)

    def show(self, merge_words: bool | None = None) -> None:
        """Print a coloured picture; merge_words as in `units`."""
        Attributions([self]).show(merge_words)

    def to_html(self, path: str | Path | None = None, merge_words: bool | None = None) -> str:
        """An HTML page that needs nothing else, also written to path; merge_words as in `units`."""
        return Attributions([self]).to_html(path, merge_words)

    def to_png(self, path: str | Path | None = None, merge_words: bool | None = None) -> bytes:
        """A PNG picture, also written to path; merge_words as in `units`."""
        return Attributions([self]).to_png(path, merge_words)

    def _repr_html_(self) -> str:
        from pyglobenc.viz import html

        return html.fragment([self])


class Attributions(list):
    """Attributions of several texts, a list that is pictured and saved together; methods as of `Attribution`."""

    def save(self, path: str | Path) -> None:
        """Write a .json or .safetensors file that `pyglobenc.load` reads back, bit for bit."""
        save(path, self)

    def show(self, merge_words: bool | None = None) -> None:
        """Print a coloured picture of each."""
        from pyglobenc.viz import terminal

        terminal.show(self, merge_words)

    def to_html(self, path: str | Path | None = None, merge_words: bool | None = None) -> str:
        """One HTML page of all, also written to path."""
        from pyglobenc.viz import html

        page = html.page(self, merge_words)
        if path is not None:
            write_file(path, page.encode("utf-8"))
        return page

    def to_png(self, path: str | Path | None = None, merge_words: bool | None = None) -> bytes:
        """One PNG picture of all, also written to path."""
        from pyglobenc.viz import png

        picture = png.picture(self, merge_words)
        if path is not None:
            write_file(path, picture)
        return picture

    def _repr_html_(self) -> str:
        from pyglobenc.viz import html

        return html.fragment(self)


def to_json(attributions: Attribution | Iterable[Attribution]) -> str:
    """What a .json file holds: a header and every attribution as `Attribution.to_dict` gives it."""
    return json.dumps(_document(attributions), indent=1) + "\n"


def _document(attributions: Attribution | Iterable[Attribution]) -> dict[str, Any]:
    single = isinstance(attributions, Attribution)
    entries = [attribution.to_dict() for attribution in ([attributions] if single else attributions)]
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "single": single}
    return header | {"attributions": entries}


def save(path: str | Path, attributions: Attribution | Iterable[Attribution]) -> None:
    """Write one attribution or several, as the path's suffix says: .json, or .safetensors with the scores as tensors 0, 1...

    Raises:
        ValueError: another suffix.
        OSError: the file can't be written; what stood there is left.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"save: the file's name must end in {' or '.join(SUFFIXES)}, got {path.name!r}")
    if path.suffix == ".json":
        return write_file(path, to_json(attributions).encode("ascii"))
    from safetensors.numpy import save as to_safetensors

    document = _document(attributions)
    single = [attributions] if isinstance(attributions, Attribution) else attributions
    for entry in document["attributions"]:
        del entry["scores"]
    tensors = {str(index): np.ascontiguousarray(attribution.scores) for index, attribution in enumerate(single)}
    return write_file(path, to_safetensors(tensors, {FORMAT: json.dumps(document)}))


def load(path: str | Path) -> Attribution | Attributions:
    """Read what `save` wrote: an Attribution, or Attributions if several were saved together.

    Raises:
        ValueError: not a file that `save` wrote, or by a newer version.
        OSError: the file can't be read.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"load: the file's name must end in {' or '.join(SUFFIXES)}, got {path.name!r}")
    try:
        document, tensors = _read(path)
        if document["format_version"] > FORMAT_VERSION:
            raise ValueError(f"its format {document['format_version']} is newer than this version's {FORMAT_VERSION}")
        entries = [
            Attribution.from_dict(entry, None if tensors is None else tensors[str(index)])
            for index, entry in enumerate(document["attributions"])
        ]
        return entries[0] if document["single"] else Attributions(entries)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"load: {path} is not a file of saved attributions: {error}") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray] | None]:
    if path.suffix == ".json":
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"no {FORMAT!r} header")
        return document, None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            document, names = json.loads((file.metadata() or {})[FORMAT]), file.keys()
            return document, {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
