"""Readers of texts with human highlights: the right characters, and an error for every malformed field."""

import json
import sys

import pytest

from pyglobenc.evaluate.readers.highlights import read_eraser, read_hatexplain

DOCUMENT = "a dull film .\n\n  but  the ending\u00a0is good !\r\nwatch it\n"
# The tokens are: a dull film . but the ending\u00a0is good ! watch it
TOKENS = ["a", "dull", "film", ".", "but", "the", "ending\u00a0is", "good", "!", "watch", "it"]


def evidence(start: int, stop: int, **changes) -> dict:
    own = {"docid": "one.txt", "start_token": start, "end_token": stop, "start_sentence": -1}
    return own | {"text": " ".join(TOKENS[start:stop])} | changes


def annotation(*groups, **changes) -> dict:
    record = {"annotation_id": "one.txt", "classification": "POS", "query": "Is it good?", "query_type": None}
    return record | {"evidences": list(groups), "docids": None} | changes


def eraser(folder, *records, documents=None):
    (folder / "docs" / "news").mkdir(parents=True)
    for name, text in (documents or {"one.txt": DOCUMENT, "news/two.txt": "fine work"}).items():
        (folder / "docs" / name).write_bytes(text.encode())
    (folder / "test.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return folder


def test_eraser_counts_tokens_over_lines_and_spaces(tmp_path):
    first = annotation([evidence(1, 3)], [evidence(6, 8), evidence(10, 11)], [evidence(1, 3)])
    second = annotation(
        [evidence(0, 1, docid="news/two.txt", text=None)], annotation_id="two", classification="NEG"
    )
    folder = eraser(tmp_path, first, second)
    found = read_eraser(folder)
    assert found.names == ["one.txt", "two"] and found.labels == ["POS", "NEG"] and not found.left_out
    marked = [
        [text[slice(*span)] for span in spans]
        for text, spans in zip(found.texts, found.rationales, strict=True)
    ]
    assert marked == [["dull film", "ending\u00a0is good", "it"], ["fine"]]
    assert read_eraser(folder / "test.jsonl") == found


@pytest.mark.parametrize("docids", [["one.txt"], None], ids=["named", "like-the-record"])
def test_eraser_finds_the_document_of_a_record_without_evidence(tmp_path, docids):
    found = read_eraser(eraser(tmp_path, annotation(docids=docids)))
    assert found.rationales == [[]] and found.texts[0].startswith("a dull film")


def test_eraser_reads_documents_of_one_file(tmp_path):
    (tmp_path / "val.jsonl").write_text(json.dumps(annotation([evidence(1, 2, text=None)])))
    (tmp_path / "docs.jsonl").write_text(json.dumps({"docid": "one.txt", "document": "a dull\nfilm"}))
    assert read_eraser(tmp_path, "val").rationales == [[(2, 6)]]
    # ERASER's loader would count an empty token between the two spaces.
    (tmp_path / "docs.jsonl").write_text(json.dumps({"docid": "one.txt", "document": "a  dull film"}))
    with pytest.raises(ValueError, match=r"docs.jsonl: line 1: the document has an empty line or two spaces"):
        read_eraser(tmp_path, "val")


@pytest.mark.parametrize(
    "record, message",
    [
        ([], "must be an object, got \\[\\]"),
        (annotation(annotation_id=3), "annotation_id must be a string that isn't empty, got 3"),
        (annotation(classification=""), "classification must be a string"),
        ({"annotation_id": "a", "classification": "POS"}, "evidences is missing"),
        (annotation(evidence(0, 1)), "evidences must be a list of lists"),
        (annotation(["x"]), "an evidence: must be an object, got 'x'"),
        (annotation([evidence(0, 1, docid=None)]), "docid must be a string"),
        (annotation([evidence(-1, 1)]), "start_token must be an integer of at least 0, got -1"),
        (
            annotation([evidence(0, 1, end_token=True)]),
            "end_token must be an integer of at least 0, got True",
        ),
        (annotation([evidence(0, 1, end_token=1.0)]), "end_token must be an integer of at least 0, got 1.0"),
        (annotation([evidence(2, 2)]), r"tokens \[2, 2\) don't lie in the document's 11"),
        (annotation([evidence(9, 12)]), r"tokens \[9, 12\) don't lie in the document's 11"),
        (annotation([evidence(1, 3, text="a dull")]), "text 'a dull' isn't that of its tokens"),
        (annotation([evidence(0, 1, docid="none.txt")], docids=[]), "there is no document 'none.txt'"),
        (annotation([evidence(0, 1, docid="../test.jsonl")]), "lies outside"),
        (annotation([evidence(0, 1, docid="/etc/passwd")]), "lies outside"),
        (annotation([evidence(0, 1, docid="a\0b")]), "can't be the name of a file"),
        (annotation([evidence(0, 1, docid="\ud800")]), "can't be the name of a file"),
        (annotation([evidence(0, 1)], docids=["news/two.txt"]), "refers to 2 documents"),
        (annotation(docids="one.txt"), "docids must be a list, got 'one.txt'"),
    ],
)
def test_eraser_names_the_malformed_field(tmp_path, record, message):
    folder = eraser(tmp_path, annotation(annotation_id="first", docids=["one.txt"]), record)
    with pytest.raises(ValueError, match=rf"test.jsonl: line 2: .*{message}"):
        read_eraser(folder)


def test_eraser_refuses_what_a_data_set_cannot_mean(tmp_path):
    folder = eraser(tmp_path, annotation(), annotation())
    file = folder / "test.jsonl"
    with pytest.raises(ValueError, match="annotation_id 'one.txt' occurs 2 times"):
        read_eraser(folder)
    file.write_text(json.dumps(annotation()) + "\n" + json.dumps(annotation(annotation_id="b", query="Why?")))
    with pytest.raises(ValueError, match="there is no document 'b'"):
        read_eraser(folder)
    (folder / "docs" / "b").write_text("b")
    with pytest.raises(ValueError, match="2 different queries"):
        read_eraser(folder)
    for text, message in (
        ("", "holds no record"),
        ("{", "line 1: not JSON"),
        ("[" * 100_000, "line 1: not JSON of this format, it is nested too deeply"),
        ('{"a": 1, "a": 2}', "line 1: the key 'a' occurs twice"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"test.jsonl: {message}"):
            read_eraser(folder)
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_eraser(folder)
    with pytest.raises(FileNotFoundError):
        read_eraser(folder, "val")
    (folder / "docs.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="both docs and docs.jsonl"):
        read_eraser(folder)


def test_eraser_does_not_follow_a_link_out_of_the_documents(tmp_path):
    (tmp_path / "secret").write_text("secret words")
    folder = eraser(tmp_path / "data", annotation([evidence(0, 1, docid="link", text=None)]))
    (folder / "docs" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="docid 'link' lies outside"):
        read_eraser(folder)


def test_sizes_are_limited(tmp_path, monkeypatch):
    folder, readers = eraser(tmp_path, annotation()), sys.modules[read_eraser.__module__]
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 10)
    with pytest.raises(ValueError, match="one.txt: holds more than"):
        read_eraser(folder)
    monkeypatch.setattr(readers, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="test.jsonl: holds more than"):
        read_eraser(folder)


def post(labels: str, *rationales, tokens=("you", "awful", "bad", "", "people"), **changes) -> dict:
    names = {"h": "hatespeech", "o": "offensive", "n": "normal"}
    annotators = [{"label": names[letter], "annotator_id": 1, "target": ["None"]} for letter in labels]
    own = {"annotators": annotators, "rationales": list(rationales), "post_tokens": list(tokens)}
    return own | changes


def hatexplain(folder, posts, divisions=None):
    (folder / "dataset.json").write_text(json.dumps(posts))
    if divisions is not None:
        (folder / "post_id_divisions.json").write_text(json.dumps(divisions))
    return folder


def test_hatexplain_joins_annotators(tmp_path):
    marks = [0, 1, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 1]
    posts = {"a": post("hho", *marks), "b": post("hon"), "c": post("nnn"), "d": post("hh", tokens=["", " "])}
    folder = hatexplain(tmp_path, posts, {"test": ["c", "a"], "train": [], "val": []})
    found = read_hatexplain(folder)
    assert found.names == ["a", "c"] and found.labels == ["hatespeech", "normal"]
    assert found.left_out == {"no majority label": 1, "no text": 1}
    assert found.texts[0] == "you awful bad  people"
    # The marked token without characters lies between two marked ones, and joins them.
    assert [[found.texts[0][slice(*span)] for span in spans] for spans in found.rationales] == [
        ["awful bad  people"],
        [],
    ]
    majority = read_hatexplain(folder / "dataset.json", combine="majority")
    assert [found.texts[0][slice(*span)] for span in majority.rationales[0]] == ["awful"]
    assert read_hatexplain(folder, "test").names == ["c", "a"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"post_tokens": "you"}, "post_tokens must be a list, got 'you'"),
        ({"post_tokens": ["a", 1]}, "post_tokens must be a list of strings"),
        ({"annotators": []}, "has no annotators"),
        ({"annotators": [{"label": "Hate"}]}, "an annotator's label must be one of hatespeech, .*'Hate'"),
        ({"annotators": [{}]}, "label is missing"),
        ({"rationales": [[0, 1]]}, "one of the rationales marks 2 tokens of 5"),
        ({"rationales": [[0, 1, 2, 0, 0]]}, "rationales must be lists of 0 and 1"),
        ({"rationales": [[0, True, 0, 0, 0]]}, "rationales must be lists of 0 and 1"),
        ({"rationales": [3]}, "rationales must be lists of 0 and 1, got 3"),
    ],
)
def test_hatexplain_names_the_malformed_field(tmp_path, changes, message):
    folder = hatexplain(tmp_path, {"fine": post("hhh"), "bad one": post("hhh", **changes)})
    with pytest.raises(ValueError, match=f"dataset.json: post bad one: .*{message}"):
        read_hatexplain(folder)


def test_hatexplain_refuses_unknown_splits_and_rules(tmp_path):
    folder = hatexplain(tmp_path, {"a": post("hhh")}, {"test": ["a", "b"], "val": "a"})
    for call, message in (
        (lambda: read_hatexplain(folder, "dev"), "split must be one of train, val, test, got 'dev'"),
        (lambda: read_hatexplain(folder, "test"), "there is no post 'b' in .*dataset.json"),
        (lambda: read_hatexplain(folder, "val"), "post_id_divisions.json: val must be a list"),
        (lambda: read_hatexplain(folder, "train"), "post_id_divisions.json: train is missing"),
        (lambda: read_hatexplain(folder, combine="all"), "combine must be union or majority, got 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
