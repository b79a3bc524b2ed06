"""The class GenerationAttribution: the scores of all tokens for each token that was generated."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from pyglobenc._version import __version__
from pyglobenc.common.arguments import known_arguments
from pyglobenc.common.generation_fields import check_generation
from pyglobenc.common.result_fields import DTYPES, is_index, is_number, is_pair, shown
from pyglobenc.results import attribution as texts
from pyglobenc.results.attribution import SUFFIXES, Attribution, Attributions
from pyglobenc.results.span_sums import SpanSums, sentence_ends
from pyglobenc.viz.heatmap import Heat

FORMAT, FORMAT_VERSION = "pyglobenc.generation", 1


@dataclass(eq=False)
class GenerationAttribution:
    """The contribution of each token of a prompt and its answer to each of the answer's T tokens.

    It is a sequence of T `Attribution`s, one for each generated token: `len(a)`, `a[t]` and iteration.

    Attributes:
        text: the prompt followed by the answer, as the tokens spell it. A prompt of messages is the text that
            the chat template makes of them.
        tokens, token_ids: the n tokens of prompt and answer, special tokens included.
        special: n flags; True for special tokens.
        prompt_length: number of tokens of the prompt. The generated tokens are the other T = n -
            prompt_length.
        scores: (T, n) float32 or float64, finite. Row t explains the generated token at position
            prompt_length + t, and is 0 from there on.
        probabilities: T probabilities that the model gives to the generated tokens, by softmax of its logits.
        method: the method's name in `pyglobenc.methods.registry`.
        model: name or folder of the model.
        target_kind: what the method explains: "class" for the logit of the generated token, "token" for the
            position before it, whose output that logit is computed from.
        log_scale: T numbers; the method's own values are scores * exp(log_scale) in each row.
        offsets: n pairs (start, stop) of the characters of text that each token comes from; None without a
            fast tokenizer.
        word_ids: n numbers of the word of each token; None for a special token. The field is None without a
            fast tokenizer.
        error: T numbers as in `Attribution`, each None where it isn't known; None if no row has one.
        settings: the options of the computation, as strings, numbers or None.
        version: version of pyglobenc.

    Raises:
        ValueError: a field has another type, length or range than described here. The message names it.
    """

    text: str
    tokens: list[str]
    token_ids: list[int]
    special: list[bool]
    prompt_length: int
    scores: np.ndarray
    probabilities: list[float]
    method: str
    model: str
    target_kind: str = "class"
    log_scale: list[float] | None = None
    offsets: list[tuple[int, int]] | None = None
    word_ids: list[int | None] | None = None
    error: list[float | None] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    version: str = __version__

    def __post_init__(self):
        self.scores = np.asarray(self.scores)
        if self.log_scale is None:
            self.log_scale = [0.0] * len(self.scores)
        try:
            check_generation(vars(self))
        except ValueError as error:
            raise ValueError(f"GenerationAttribution: {error}") from None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, t: int) -> Attribution:
        """Return the attribution of generated token t; a negative t counts from the end."""
        if not -len(self) <= t < len(self):
            raise IndexError(f"GenerationAttribution: there are {len(self)} generated tokens, got {t}")
        t %= len(self)
        at = self.prompt_length + t - (self.target_kind == "token")
        target = at if self.target_kind == "token" else self.token_ids[at]
        error = None if self.error is None else self.error[t]
        named = dict(target=target, target_name=self.tokens[at], target_kind=self.target_kind, error=error)
        return self._attribution(self.scores[t], log_scale=self.log_scale[t], **named)

    def __iter__(self) -> Iterator[Attribution]:
        return (self[t] for t in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationAttribution) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return (
            f"GenerationAttribution({self.prompt[-40:]!r} -> {self.answer[:40]!r}, {self.prompt_length} + "
            f"{len(self)} tokens, {self.method})"
        )

    @property
    def prompt(self) -> str:
        """The text of the prompt; its tokens without a space between where offsets aren't known."""
        return self._text(0, self.prompt_length)

    @property
    def answer(self) -> str:
        """The text of the generated tokens."""
        return self._text(self.prompt_length, len(self.tokens))

    @property
    def generated_tokens(self) -> list[str]:
        """The names of the T generated tokens."""
        return self.tokens[self.prompt_length :]

    def shares(self) -> np.ndarray:
        """Return the scores (T, n) float64, each row divided by the sum of its absolute values.

        Rows of different sizes become comparable in this way. A row of zeros stays 0.
        """
        scores = self.scores.astype(np.float64)
        sums = np.abs(scores).sum(1, keepdims=True)
        return np.divide(scores, sums, out=np.zeros_like(scores), where=sums > 0)

    def mean(self) -> Attribution:
        """Return the mean of all rows' shares as one attribution of the whole text."""
        return self._attribution(self.shares().mean(0), target=0, target_name="mean", target_kind="mean")

    def spans(
        self,
        sources: Sequence[tuple[int, int]],
        targets: Sequence[tuple[int, int]] | None = None,
        shares: bool | None = None,
    ) -> SpanSums:
        """Add the scores within spans of tokens.

        Args:
            sources: C pairs (start, stop) of token positions. The scores of a span's tokens are added.
            targets: R pairs (start, stop) of positions of generated tokens, whose rows are added. None: each
                generated token alone.
            shares: add `shares` in the place of `scores`. None does so for methods that explain a position:
                the rows of a rollout have scales of their own, so their sums would mean nothing.

        Returns:
            SpanSums with scores (R, C).

        Raises:
            ValueError: a span is empty or lies outside the tokens, or a target isn't generated.
        """
        n, first = len(self.tokens), self.prompt_length
        targets = [(i, i + 1) for i in range(first, n)] if targets is None else targets
        for name, spans, low in (("sources", sources, 0), ("targets", targets, first)):
            for span in spans:
                if not is_pair(span) or not low <= span[0] < span[1] <= n:
                    raise ValueError(
                        f"spans: {name} must be pairs (start, stop) of tokens from {low} to {n}, got {span}"
                    )
        rows = [range(start - first, stop - first) for start, stop in targets]
        return self._sums([range(*span) for span in sources], rows, shares)

    def sentences(self, shares: bool | None = None) -> SpanSums:
        """Add the scores within the sentences of prompt and answer, for each sentence of the answer.

        A sentence ends at a full stop, an exclamation mark or a question mark with white space after it, and
        at the end of a line. Special tokens belong to none.

        Args:
            shares: as for `spans`.

        Returns:
            SpanSums with a column for each sentence of prompt and answer, and a row for each of the answer's.

        Raises:
            ValueError: the offsets of the tokens aren't known.
        """
        if self.offsets is None:
            raise ValueError(
                "sentences: the tokens' places in the text aren't known; a fast tokenizer tells them"
            )
        ends = sentence_ends(self.text, self._bounds(self.prompt_length, len(self.tokens))[0])
        groups: dict[tuple[int, bool], list[int]] = {}
        for i, (low, high) in enumerate(self.offsets):
            if not self.special[i] and low < high:
                # White space at a token's beginning may belong to the sentence before.
                low += len(self.text[low:high]) - len(self.text[low:high].lstrip())
                owner = bisect_right(ends, min(low, high - 1))
                groups.setdefault((owner, i >= self.prompt_length), []).append(i)
        return self._grouped(groups, shares)

    def words(self, shares: bool | None = None) -> SpanSums:
        """Add the scores within words, for each word of the answer; special tokens belong to none.

        Args:
            shares: as for `spans`.

        Raises:
            ValueError: the tokenizer doesn't tell which tokens form a word.
        """
        if self.word_ids is None:
            raise ValueError(
                "words: the tokenizer doesn't tell which tokens form a word; a fast tokenizer does"
            )
        groups: dict[tuple[int, bool], list[int]] = {}
        for i, word in enumerate(self.word_ids):
            if word is not None and not self.special[i]:
                groups.setdefault((word, i >= self.prompt_length), []).append(i)
        return self._grouped(groups, shares)

    def _grouped(self, groups: dict[Any, list[int]], shares: bool | None) -> SpanSums:
        """Return the sums over groups of positions; the groups of generated tokens are also the rows."""
        first, columns = self.prompt_length, list(groups.values())
        rows = [[i - first for i in group] for group in columns if group[0] >= first]
        return self._sums(columns, rows, shares)

    def _sums(
        self, columns: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], shares: bool | None
    ) -> SpanSums:
        shares = self.target_kind == "token" if shares is None else shares
        scores = self.shares() if shares else self.scores.astype(np.float64)
        by_column = (
            np.stack([scores[:, list(group)].sum(1) for group in columns], 1) if columns else scores[:, :0]
        )
        table = np.stack([by_column[list(group)].sum(0) for group in rows]) if rows else by_column[:0]
        first = self.prompt_length
        names = [self._text(group[0], group[-1] + 1) for group in columns]
        of_rows = [self._text(first + group[0], first + group[-1] + 1) for group in rows]
        what = ("sums of", "shares" if shares else "scores")
        return SpanSums(names, of_rows, table, (*self._caption(), what))

    def heat(self) -> Heat:
        """Return what pictures show: a row for each generated token, a column for each token."""
        units = self[0].units(merge_words=False)
        names = [unit.text for unit in units]
        notes = [f"{chance:.0%}" for chance in self.probabilities]
        first = self.prompt_length
        return Heat(self._caption(), names[first:], names, self.scores, notes, self.special, first)

    def show(self) -> None:
        """Print the mean over all generated tokens, and a heat map with a row for each of them."""
        from pyglobenc.viz import heatmap, terminal

        terminal.show([self.mean()], merge_words=False)
        heatmap.show(self.heat())

    @known_arguments
    def to_html(self, path: str | Path | None = None) -> str:
        """Return a self-contained HTML page with the heat map, and write it to path if given.

        Args:
            path: file to write; None writes nothing.

        Raises:
            ValueError: path lies in the model's folder.
            OSError: the file can't be written.
        """
        from pyglobenc.viz import heatmap

        return _written(path, heatmap.page(self.heat(), self.mean()), self)

    @known_arguments
    def to_png(self, path: str | Path | None = None) -> bytes:
        """Return a PNG picture of the heat map, and write it to path if given.

        Args:
            path: file to write; None writes nothing.

        Raises:
            ValueError: there are too many generated tokens for a picture, or path lies in the model's folder.
            OSError: the file can't be written.
        """
        from pyglobenc.viz import heatmap

        return _written(path, heatmap.png(self.heat()), self)

    def _repr_html_(self) -> str:
        from pyglobenc.viz import heatmap

        return heatmap.fragment(self.heat(), self.mean())

    @known_arguments
    def save(self, path: str | Path) -> None:
        """Write a .json or .safetensors file from which `pyglobenc.load` restores every bit.

        Raises:
            ValueError: the suffix is another one, or the file lies in the model's folder.
            OSError: the file can't be written. An older file of that name is kept.
        """
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise ValueError(f"save: the file's name must end in {' or '.join(SUFFIXES)}, got {path.name!r}")
        if path.suffix == ".json":
            texts.write(path, self.to_json().encode("ascii"), [self])
            return
        from safetensors.numpy import save

        document = _document(self)
        del document["generation"]["scores"]
        scores = np.ascontiguousarray(self.scores)
        texts.write(path, save({"scores": scores}, {FORMAT: json.dumps(document)}), [self])

    def to_json(self) -> str:
        """Return the text of a .json file."""
        return json.dumps(_document(self), indent=1) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values; Python floats hold float32 and float64 scores exactly."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        offsets = None if self.offsets is None else [list(pair) for pair in self.offsets]
        return out | {"scores": self.scores.tolist(), "dtype": self.scores.dtype.name, "offsets": offsets}

    @classmethod
    def from_dict(cls, data: dict[str, Any], scores: np.ndarray | None = None) -> "GenerationAttribution":
        """Make an object from the result of `to_dict`, with scores (T, n), or None for those in data.

        Raises:
            ValueError: a field is missing, unknown or invalid. The message names the field.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a generation must be an object, got {shown(data)}")
        names = {f.name for f in fields(cls)} | {"dtype"}
        for name in sorted(names - data.keys() - ({"scores"} if scores is not None else set())):
            raise ValueError(f"{name} is missing")
        for name in sorted(data.keys() - names):
            raise ValueError(f"{shown(name)} is no field of a generation")
        values = {name: value for name, value in data.items() if name != "dtype"}
        if data["dtype"] not in DTYPES:
            raise ValueError(f"dtype must be {' or '.join(DTYPES)}, got {shown(data['dtype'])}")
        if scores is None:
            rows = values["scores"]
            if not isinstance(rows, list) or not all(
                isinstance(row, list) and len(row) == len(rows[0]) and all(map(is_number, row))
                for row in rows
            ):
                raise ValueError("scores must be lists of finite numbers, all of one length")
            with np.errstate(over="ignore"):
                scores = np.array(rows, dtype=data["dtype"])
        elif scores.dtype.name != data["dtype"]:
            raise ValueError(f"scores must be {data['dtype']}, as dtype says, got {scores.dtype}")
        if isinstance(values["offsets"], list):
            values["offsets"] = [
                tuple(pair) if isinstance(pair, list) else pair for pair in values["offsets"]
            ]
        return cls(**values | {"scores": scores})

    def _attribution(self, scores: np.ndarray, **target: Any) -> Attribution:
        """Return one row of scores (n,) as an attribution of the whole text."""
        columns = dict(offsets=self.offsets, word_ids=self.word_ids)
        common = dict(method=self.method, model=self.model, settings=self.settings, version=self.version)
        return Attribution(
            self.text, self.tokens, self.token_ids, self.special, scores, **columns, **common, **target
        )

    def _caption(self) -> list[tuple[str, str]]:
        how = f"{len(self)} tokens, {self.settings.get('answer', 'given')}"
        return [
            ("method", self.method),
            ("model", self.model),
            ("prompt", f"{self.prompt_length} tokens"),
            ("answer", how),
        ]

    def _bounds(self, start: int, stop: int) -> tuple[int, int]:
        """Return where the text of tokens start to stop begins and ends, without special tokens."""
        inside = [self.offsets[i] for i in range(start, stop) if not self.special[i]]
        if not inside:
            # The text of special tokens alone is empty.
            return (len(self.text), len(self.text)) if start >= self.prompt_length else (0, 0)
        return inside[0][0], inside[-1][1]

    def _text(self, start: int, stop: int) -> str:
        if self.offsets is None:
            return "".join(self.tokens[start:stop])
        low, high = self._bounds(start, stop)
        return self.text[low:high]


@known_arguments
def load(path: str | Path) -> Attribution | Attributions | GenerationAttribution:
    """Read a file that one of the methods `save` wrote.

    Every field is checked for its type, length and range before anything is returned.

    Args:
        path: the .json or .safetensors file.

    Returns:
        What was saved: Attribution with scores (n,), Attributions if several were saved together, or
        GenerationAttribution with scores (T, n).

    Raises:
        ValueError: pyglobenc did not write the file, or a newer version did. The message names the file and
            the field.
        OSError: the file can't be read.
    """
    path = Path(path)
    try:
        document, tensors = texts.read(path, FORMAT) if path.suffix in SUFFIXES else (None, None)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return texts.load(path)
    try:
        version = document.get("format_version")
        if not is_index(version) or version > FORMAT_VERSION:
            raise ValueError(
                f"its format {shown(version)} isn't one of this version's, up to {FORMAT_VERSION}"
            )
        if tensors is not None and tensors.keys() != {"scores"}:
            raise ValueError(f"its only tensor must be scores, got {len(tensors)} tensors")
        return GenerationAttribution.from_dict(
            document.get("generation"), None if tensors is None else tensors["scores"]
        )
    except (ValueError, RecursionError) as error:
        why = str(error).removeprefix("GenerationAttribution: ")
        raise ValueError(f"load: {path} is not a file of a saved generation: {why}") from error


def _document(generation: GenerationAttribution) -> dict[str, Any]:
    header = {"format": FORMAT, "format_version": FORMAT_VERSION}
    return header | {"generation": generation.to_dict()}


def _written(path: str | Path | None, picture: str | bytes, generation: GenerationAttribution) -> Any:
    """Write a picture to a path if there is one, and return the picture."""
    if path is not None:
        data = picture.encode("utf-8") if isinstance(picture, str) else picture
        texts.write(path, data, [generation])
    return picture
