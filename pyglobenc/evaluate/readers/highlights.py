"""Reads texts with human highlights: the formats of ERASER and of HateXplain."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

from pyglobenc.common.characters import printable
from pyglobenc.common.files import decode, read_at_most

# The largest file of the published data sets holds less than 100 MB.
MAX_BYTES = 512 << 20
MAX_DOCUMENT_BYTES = 64 << 20
SPLITS = ("train", "val", "test")
HATEXPLAIN_LABELS = ("hatespeech", "offensive", "normal")
# The file that says which posts of HateXplain belong to which split lies beside the posts.
DIVISIONS = "post_id_divisions.json"
POSTS = "dataset.json"

Span = tuple[int, int]


@dataclass(frozen=True)
class Highlights:
    """Texts, their gold labels, and the characters that humans marked as the reason for the label.

    Attributes:
        names: N names of the records.
        texts: N texts.
        labels: N names of the gold classes.
        rationales: for each text, pairs (start, stop) of characters, ascending: one pair for each span. The
            list is empty for a text without highlights.
        left_out: number of records that were left out, by the reason.
    """

    names: list[str]
    texts: list[str]
    labels: list[str]
    rationales: list[list[Span]]
    left_out: dict[str, int] = field(default_factory=dict)


def read_eraser(path: str | Path, split: str = "test") -> Highlights:
    """Read a data set in the format of ERASER (DeYoung et al., ACL 2020).

    A line of the annotation file holds an annotation_id, a classification, and groups of evidences. An
    evidence marks the tokens [start_token, end_token) of a document. Tokens are separated by single spaces or
    line ends. The highlights of a record are the union of all its groups.

    Args:
        path: the folder that holds `split`.jsonl, or the .jsonl file itself. Documents are files in the
            folder `docs` beside it, or lines of the file docs.jsonl.
        split: name of the annotation file without .jsonl; it is not used if path is a file.

    Returns:
        Highlights of all records, in the order of the file.

    Raises:
        ValueError: a field is missing, has another type or is out of range; the text of an evidence differs
            from its tokens; records have different queries, which a single text can't hold; or a record
            refers to several documents. The message names the file and the line.
        OSError: a file can't be read.
    """
    path = Path(path)
    file = path if path.is_file() else path / f"{split}.jsonl"
    documents = _documents(file.parent)
    names, texts, labels, rationales, queries = [], [], [], [], set()
    for where, record in _lines(file):
        names.append(_text_of(record, "annotation_id", where))
        labels.append(_text_of(record, "classification", where))
        query = record.get("query")
        queries.add(query if isinstance(query, str) else json.dumps(query))
        evidences = _evidences(record, where)
        text = documents(_document_name(record, evidences, where), where)
        texts.append(text)
        rationales.append(_spans(text, evidences, where))
    _check_unique(names, file)
    if len(queries) > 1:
        raise ValueError(
            f"{file}: the records have {len(queries)} different queries; a model would have to read them "
            f"beside the documents, and only data sets with one query for all records are supported"
        )
    return Highlights(names, texts, labels, rationales)


def read_hatexplain(path: str | Path, split: str | None = None, combine: str = "union") -> Highlights:
    """Read posts in the format of HateXplain (Mathew et al., AAAI 2021).

    The file maps each post's name to its post_tokens, annotators and rationales. The text of a post is its
    tokens, joined by spaces. Its label is the one that more than half of the annotators gave.

    Args:
        path: the folder that holds dataset.json, or the .json file itself.
        split: "train", "val" or "test", read from post_id_divisions.json beside the posts. None: all posts.
        combine: which tokens are highlighted. "union": those that any annotator marked, as in the scripts of
            HateXplain. "majority": those that more than half of the rationales mark.

    Returns:
        Highlights of the posts with a majority label and a text, in the order of the file. `left_out` counts
        the others.

    Raises:
        ValueError: a field is missing, has another type or is out of range. The message names the file and
            the post.
        OSError: a file can't be read.
    """
    if combine not in ("union", "majority"):
        raise ValueError(f"read_hatexplain: combine must be union or majority, got {combine!r}")
    path = Path(path)
    file = path if path.is_file() else path / POSTS
    posts = _object(_json(_read(file, MAX_BYTES), str(file)), str(file))
    left_out: Counter[str] = Counter()
    names, texts, labels, rationales = [], [], [], []
    for name in posts if split is None else _division(file.parent / DIVISIONS, split, posts):
        where = f"{file}: post {printable(name)}"
        post = _object(posts[name], where)
        tokens, label = _strings(post, "post_tokens", where), _majority_label(post, where)
        marks = _marks(post, len(tokens), where)
        if label is None or not any(token.strip() for token in tokens):
            left_out["no majority label" if label is None else "no text"] += 1
            continue
        # More than half of the rationales, or at least one of them.
        needed = len(marks) // 2 + 1 if combine == "majority" else 1
        votes = [sum(column) >= needed for column in zip(*marks, strict=True)] or [False] * len(tokens)
        names.append(name)
        texts.append(" ".join(tokens))
        labels.append(label)
        rationales.append(_joined(compress(_token_spans(tokens), votes)))
    return Highlights(names, texts, labels, rationales, dict(left_out))


# The readers by the name that the command line gives them.
FORMATS: dict[str, Callable[..., Highlights]] = {"eraser": read_eraser, "hatexplain": read_hatexplain}


def _read(path: Path, most: int) -> str:
    with open(path, "rb") as file:
        return decode(read_at_most(file, str(path), most), str(path))


def _json(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            double = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"{where}: the key {double!r} occurs twice in one object")
        return entries

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not JSON of this format, it is nested too deeply") from error


def _lines(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects in a .jsonl file, each with its file and line for messages."""
    # Only \n ends a record; str.splitlines would also split at characters that JSON strings may hold.
    lines = [
        (f"{file}: line {number}", line) for number, line in enumerate(_read(file, MAX_BYTES).split("\n"), 1)
    ]
    records = [(where, _object(_json(line, where), where)) for where, line in lines if line.strip()]
    if not records:
        raise ValueError(f"{file}: holds no record")
    return records


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be an object, got {_shown(value)}")
    return value


def _field(record: dict[str, Any], name: str, where: str) -> Any:
    if name not in record:
        raise ValueError(f"{where}: {name} is missing")
    return record[name]


def _text_of(record: dict[str, Any], name: str, where: str) -> str:
    value = _field(record, name, where)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: {name} must be a string that isn't empty, got {_shown(value)}")
    return value


def _list(record: dict[str, Any], name: str, where: str) -> list[Any]:
    value = _field(record, name, where)
    if not isinstance(value, list):
        raise ValueError(f"{where}: {name} must be a list, got {_shown(value)}")
    return value


def _strings(record: dict[str, Any], name: str, where: str) -> list[str]:
    for value in _list(record, name, where):
        if not isinstance(value, str):
            raise ValueError(f"{where}: {name} must be a list of strings, got one that holds {_shown(value)}")
    return record[name]


def _shown(value: Any) -> str:
    text = printable(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_unique(names: list[str], file: Path) -> None:
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{file}: annotation_id {_shown(name)} occurs {count} times")


def _evidences(record: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the evidences of all groups, with their fields checked."""
    evidences = []
    for group in _list(record, "evidences", where):
        if not isinstance(group, list):
            raise ValueError(f"{where}: evidences must be a list of lists, got {_shown(group)} in it")
        evidences += [_object(evidence, f"{where}: an evidence") for evidence in group]
    for evidence in evidences:
        _text_of(evidence, "docid", where)
        for name in ("start_token", "end_token"):
            value = _field(evidence, name, where)
            if type(value) is not int or value < 0:
                raise ValueError(f"{where}: {name} must be an integer of at least 0, got {_shown(value)}")
    return evidences


def _document_name(record: dict[str, Any], evidences: list[dict[str, Any]], where: str) -> str:
    """Return the name of the only document that a record refers to."""
    names = {evidence["docid"] for evidence in evidences}
    if record.get("docids") is not None:
        names |= set(_strings(record, "docids", where))
    if len(names) > 1:
        raise ValueError(f"{where}: refers to {len(names)} documents; only one is supported")
    # Movie reviews without evidence are named like their document.
    return names.pop() if names else record["annotation_id"]


def _documents(folder: Path) -> Callable[[str, str], str]:
    """Return a function of a document's name, and of a place for messages, that returns the text."""
    file, texts = folder / "docs.jsonl", folder / "docs"
    if file.exists():
        if texts.exists():
            raise ValueError(f"{folder}: holds both docs and docs.jsonl, and it isn't clear which one counts")
        known = {}
        for where, record in _lines(file):
            text = known[_text_of(record, "docid", where)] = _text_of(record, "document", where)
            # ERASER's own loader counts an empty token between two spaces here, but not in a file of `docs`.
            if sum(len(line.strip().split(" ")) for line in text.split("\n")) != len(_eraser_tokens(text)):
                raise ValueError(f"{where}: the document has an empty line or two spaces in a row")

        def find(name: str, where: str) -> str:
            if name not in known:
                raise ValueError(f"{where}: there is no document {_shown(name)} in {file}")
            return known[name]

        return find

    root = os.path.realpath(texts)

    def load(name: str, where: str) -> str:
        try:
            place = os.path.realpath(os.path.join(root, name))
        except ValueError as error:
            raise ValueError(f"{where}: docid {_shown(name)} can't be the name of a file") from error
        # A name may hold a folder, but it must not lead out of the folder of documents.
        if os.path.commonpath([root, place]) != root:
            raise ValueError(f"{where}: docid {_shown(name)} lies outside {texts}")
        if not os.path.isfile(place):
            raise ValueError(f"{where}: there is no document {_shown(name)} in {texts}")
        return _read(Path(place), MAX_DOCUMENT_BYTES)

    return load


def _eraser_tokens(text: str) -> list[Span]:
    """Return the characters (start, stop) of each token of a document, as ERASER's loader counts them."""
    tokens, begin = [], 0
    for line in text.split("\n"):
        inner = begin + len(line) - len(line.lstrip())
        tokens += [(inner + m.start(), inner + m.end()) for m in re.finditer("[^ ]+", line.strip())]
        begin += len(line) + 1
    return tokens


def _spans(text: str, evidences: list[dict[str, Any]], where: str) -> list[Span]:
    """Return the characters of each evidence, without duplicates."""
    tokens, spans = _eraser_tokens(text), set()
    for evidence in evidences:
        start, stop = evidence["start_token"], evidence["end_token"]
        if not start < stop <= len(tokens):
            raise ValueError(
                f"{where}: the evidence's tokens [{start}, {stop}) don't lie in the document's {len(tokens)}"
            )
        span = (tokens[start][0], tokens[stop - 1][1])
        own = evidence.get("text")
        if isinstance(own, str) and "".join(own.split()) != "".join(text[slice(*span)].split()):
            raise ValueError(
                f"{where}: the evidence's text {_shown(own)} isn't that of its tokens [{start}, {stop}), "
                f"{_shown(text[slice(*span)])}; remove the text if the tokens are right"
            )
        spans.add(span)
    return sorted(spans)


def _division(file: Path, split: str, posts: dict[str, Any]) -> list[str]:
    """Return the names of a split's posts."""
    if split not in SPLITS:
        raise ValueError(f"read_hatexplain: split must be one of {', '.join(SPLITS)}, got {split!r}")
    names = _strings(_object(_json(_read(file, MAX_BYTES), str(file)), str(file)), split, str(file))
    for name in names:
        if name not in posts:
            raise ValueError(f"{file}: there is no post {_shown(name)} in {file.with_name(POSTS)}")
    return names


def _majority_label(post: dict[str, Any], where: str) -> str | None:
    labels = []
    for annotator in _list(post, "annotators", where):
        label = _field(_object(annotator, f"{where}: an annotator"), "label", where)
        if label not in HATEXPLAIN_LABELS:
            raise ValueError(
                f"{where}: an annotator's label must be one of {', '.join(HATEXPLAIN_LABELS)}, got "
                f"{_shown(label)}"
            )
        labels.append(label)
    if not labels:
        raise ValueError(f"{where}: has no annotators")
    label, count = Counter(labels).most_common(1)[0]
    return label if 2 * count > len(labels) else None


def _marks(post: dict[str, Any], tokens: int, where: str) -> list[list[int]]:
    """Return the rationales of a post, each with 0 or 1 for every token."""
    for marks in (rationales := _list(post, "rationales", where)):
        if not isinstance(marks, list) or any(type(mark) is not int or not 0 <= mark <= 1 for mark in marks):
            raise ValueError(f"{where}: rationales must be lists of 0 and 1, got {_shown(marks)} in them")
        if len(marks) != tokens:
            raise ValueError(f"{where}: one of the rationales marks {len(marks)} tokens of {tokens}")
    return rationales


def _token_spans(tokens: list[str]) -> list[Span]:
    """Return the characters (start, stop) of each token in the tokens joined by spaces."""
    spans, end = [], -1
    for token in tokens:
        spans.append((end + 1, end + 1 + len(token)))
        end = spans[-1][1]
    return spans


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Join ascending spans that are one space apart; a token without characters has no span."""
    joined: list[Span] = []
    for start, stop in spans:
        if joined and start - joined[-1][1] <= 1:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    return joined
