import errno
import json
import os
import threading
from dataclasses import fields

import numpy as np
import pytest
from safetensors.numpy import save_file

import pyglobenc
from pyglobenc.common import files
from pyglobenc.common.files import check_writable, decode, one_line, write_file
from pyglobenc.results import Attribution, Attributions, save

# These are the smallest subnormal of float32, its largest number, a third, and minus zero.
AWKWARD = [1e-45, 3.4028234e38, 1 / 3, -0.0, -1e-8, 1.0]


def attribution(dtype=np.float32, **changes):
    text = "Na\u00efve \U0001f389\tfilm\x1b"
    out = dict(
        text=text,
        tokens=["[CLS]", "na", "##ive", "\u00f0\u0178", "##x", "film"],
        token_ids=[2, 7, 8, 9, 10, 11],
        special=[True, False, False, False, False, False],
        scores=np.array(AWKWARD, dtype=dtype),
        method="globenc",
        model="a \ud800 name",
        target=0,
        target_name="[CLS]",
        log_scale=0.1 + 0.2,
        word_ids=[None, 0, 0, 1, 1, 2],
        offsets=[(0, 0), (0, 2), (2, 5), (6, 7), (6, 7), (8, 12)],
        settings={"stride": None, "backend": "auto", "batch_size": 8},
    )
    return Attribution(**(out | changes))


def bits(a):
    return a.scores.dtype, a.scores.tobytes()


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fast", [True, False])
def test_saved_and_loaded_without_loss(tmp_path, suffix, dtype, fast):
    a = attribution(dtype, merge_words=fast, label="GOOD", probability=1 / 3, cut=7, windows=[(1, 4), (2, 6)])
    if not fast:
        a = attribution(dtype, word_ids=None, offsets=None)
    path = tmp_path / f"a{suffix}"
    a.save(path)
    b = pyglobenc.load(path)
    assert isinstance(b, Attribution) and b == a and bits(b) == bits(a)
    for f in fields(Attribution):
        if f.name != "scores":
            assert getattr(b, f.name) == getattr(a, f.name) and type(getattr(b, f.name)) is type(
                getattr(a, f.name)
            ), f.name


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_several_are_saved_together(tmp_path, suffix):
    several = Attributions([attribution(), attribution(np.float64, text="other"), attribution(target=3)])
    path = tmp_path / f"a{suffix}"
    several.save(path)
    loaded = pyglobenc.load(path)
    assert (
        isinstance(loaded, Attributions)
        and loaded == several
        and list(map(bits, loaded)) == list(map(bits, several))
    )
    Attributions([attribution()]).save(path)
    assert isinstance(pyglobenc.load(path), Attributions)


def test_equality_sees_every_field():
    assert attribution() == attribution() and attribution() != "text"
    assert (
        attribution() != attribution(np.float64)
        and attribution() != attribution(target=1)
        and attribution() != attribution(cut=1)
    )


def test_json_is_for_others_too(tmp_path):
    attribution(merge_words=True).save(tmp_path / "a.json")
    document = json.loads((tmp_path / "a.json").read_text("ascii"))
    entry = document["attributions"][0]
    assert document["format"] == "pyglobenc.attribution" and entry["tokens"][1] == "na"
    assert [word["tokens"] for word in entry["words"]] == [[0], [1, 2], [3, 4], [5]]


def test_words_sum_their_pieces():
    a = attribution(np.float64, scores=np.array([4.0, 0.25, 0.5, 1.0, 2.0, -1.0]))
    words = a.units(merge_words=True)
    assert [unit.text for unit in words] == ["[CLS]", "Na\u00efve", "\U0001f389", "film"]
    assert [unit.score for unit in words] == [4.0, 0.75, 3.0, -1.0]
    assert [unit.positions for unit in words] == [(0,), (1, 2), (3, 4), (5,)]
    assert [unit.before for unit in words] == ["", " ", " ", "\t"]
    assert [unit.special for unit in words] == [True, False, False, False]
    assert a.units() == a.units(merge_words=False)


def test_tokens_show_the_text_and_pieces_of_one_character_the_vocabulary():
    units = attribution().units()
    assert [unit.text for unit in units] == ["[CLS]", "Na", "\u00efve", "\U0001f389", "##x", "film"]
    assert [unit.before for unit in units] == ["", " ", "", " ", "", "\t"]


def test_without_a_fast_tokenizer_tokens_are_shown_and_words_refused():
    a = attribution(word_ids=None, offsets=None)
    assert [unit.text for unit in a.units()] == a.tokens
    with pytest.raises(ValueError, match="words can't be merged"):
        a.units(merge_words=True)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(scores=np.arange(6)), "float32 or float64, got int64"),
        (dict(scores=np.zeros(5)), r"\(6,\), got \(5,\)"),
        (dict(special=[True]), "special must have n = 6 entries, got 1"),
        (dict(offsets=[]), "offsets must have n = 6 entries, got 0"),
        (dict(scores=np.full(6, np.nan)), "must be finite"),
        (dict(log_scale=float("inf")), "log_scale must be finite"),
        (dict(log_scale="0"), "log_scale must be finite and a number, got '0'"),
        (dict(text=b"bytes"), "text must be a string, got bytes"),
        (dict(tokens=[]), "tokens must hold at least one token"),
        (
            dict(token_ids=[2, 7, 8, 9, 10, 2**63]),
            "token_ids must hold integers of at least 0, got an integer of 64 bits at position 5",
        ),
        (
            dict(special=[True, False, False, False, False, 0]),
            "special must hold True or False, got 0 at position 5",
        ),
        (
            dict(offsets=[(0, 0), (0, 2), (2, 5), (6, 7), (6, 7), (12, 8)]),
            "offsets must hold pairs .* got tuple at position 5",
        ),
        (dict(target=6), "target must be a position below n = 6, got 6"),
        (dict(target=True), "target must be an integer of at least 0, got True"),
        (dict(target_kind="both"), "target_kind must be one of token, class, mean, got 'both'"),
        (dict(windows=[(1, 7)]), "windows must end at most at n = 6, got 7 at position 0"),
        (dict(probability=1.5), r"probability must be a number in \[0, 1\] or None, got 1.5"),
        (dict(settings={"stride": [1]}), "settings must be a dict from strings"),
        (dict(merge_words=True, word_ids=None), "merge_words needs word_ids"),
    ],
)
def test_wrong_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        attribution(**changes)


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must end in .json or .safetensors, got 'a.csv'"):
        save(tmp_path / "a.csv", attribution())
    with pytest.raises(ValueError, match="must end in .json or .safetensors, got 'a.csv'"):
        pyglobenc.load(tmp_path / "a.csv")


def foreign_safetensors(path):
    save_file({"0": np.zeros(3)}, path)


def truncated_safetensors(path):
    attribution().save(path)
    path.write_bytes(path.read_bytes()[:-5])


def newer(path):
    attribution().save(path)
    path.write_text(path.read_text().replace('"format_version": 4', '"format_version": 99'))


def emptied(path):
    attribution().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attributions": []}))


def without_scores(path):
    attribution().save(path)
    path.write_text(path.read_text().replace('"scores"', '"scored"'))


@pytest.mark.parametrize(
    "name, write, message",
    [
        ("a.json", lambda path: path.write_text("{"), "not a file of saved attributions"),
        ("a.json", lambda path: path.write_text("[1]"), "no 'pyglobenc.attribution' header"),
        ("a.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "not a file of saved attributions"),
        ("a.json", newer, "its format 99 is newer"),
        ("a.json", emptied, "not a file of saved attributions"),
        ("a.json", lambda path: path.write_text("[" * 100_000), "not a file of saved attributions"),
        ("a.json", without_scores, "scores"),
        ("a.safetensors", lambda path: path.write_bytes(b"nothing"), "not a file of saved attributions"),
        ("a.safetensors", foreign_safetensors, "not a file of saved attributions"),
        ("a.safetensors", truncated_safetensors, "not a file of saved attributions"),
    ],
)
def test_what_was_not_saved_is_not_loaded(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        pyglobenc.load(tmp_path / name)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("offsets", [[0, "1"]] * 6, "offsets must hold pairs"),
        ("dtype", "U1000000000", "dtype must be float32 or float64, got 'U1000000000'"),
        ("scores", [1.0, 0.5, None, 0, 0, 0], "scores must be a list of finite numbers"),
        ("scores", [1e39] * 6, "scores must be finite"),
        ("extra", 1, "'extra' is no field of an attribution"),
        ("log_scale", "missing", "log_scale is missing"),
    ],
)
def test_a_wrong_field_of_a_file_is_named(tmp_path, name, value, message):
    path = tmp_path / "a.json"
    Attributions([attribution(), attribution()]).save(path)
    document = json.loads(path.read_text())
    document["attributions"][1][name] = value
    if value == "missing":
        del document["attributions"][1][name]
    path.write_text(json.dumps(document))
    with pytest.raises(
        ValueError, match=f"{path} is not a file of saved attributions: attribution 1: {message}"
    ):
        pyglobenc.load(path)


def test_files_of_the_first_format_are_read(tmp_path):
    path = tmp_path / "a.json"
    attribution().save(path)
    document = json.loads(path.read_text())
    document["format_version"] = 1
    del document["attributions"][0]["predictions"]
    path.write_text(json.dumps(document))
    assert pyglobenc.load(path) == attribution()


@pytest.mark.parametrize("name", ["a.json", "a.safetensors"])
def test_loading_a_missing_file_names_it(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        pyglobenc.load(tmp_path / name)


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*args):
    raise KeyboardInterrupt


WRITERS = {
    "a.json": lambda path: attribution().save(path),
    "a.safetensors": lambda path: attribution().save(path),
    "a.html": lambda path: attribution().to_html(path),
    "a.png": lambda path: attribution().to_png(path),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    "step, fault, error",
    [
        ("fsync", full_disk, OSError),
        ("replace", full_disk, OSError),
        ("replace", interrupt, KeyboardInterrupt),
    ],
)
def test_a_write_that_fails_leaves_what_stood_there(tmp_path, monkeypatch, name, step, fault, error):
    path = tmp_path / name
    path.write_text("before")
    monkeypatch.setattr(os, step, fault)
    with pytest.raises(error) as caught:
        WRITERS[name](path)
    assert path.read_text() == "before" and os.listdir(tmp_path) == [name]
    if error is OSError:
        assert one_line(caught.value) == f"{path}: No space left on device"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_a_full_device_says_so():
    with pytest.raises(OSError, match="No space left on device") as caught:
        attribution().to_html("/dev/full")
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "/dev/full"


def test_files_are_replaced_through_links_and_by_their_own_name(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"new"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_file(tmp_path / "nowhere" / "file", b"")


def test_a_replaced_file_keeps_its_permissions_and_a_new_one_has_the_umask_s(tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "old").chmod(0o640)
    umask = os.umask(0o027)
    try:
        for name in ("old", "new"):
            write_file(tmp_path / name, b"new")
    finally:
        os.umask(umask)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("old", "new")] == [0o640, 0o640]
    assert (tmp_path / "old").read_bytes() == b"new"
    (tmp_path / "old").chmod(0o600)
    write_file(tmp_path / "old", b"secret")
    assert (tmp_path / "old").stat().st_mode & 0o777 == 0o600


def test_a_link_is_replaced_where_links_are_not_followed(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_file(tmp_path / "link", b"new", follow=False)
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "link").read_bytes() == b"new"
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_temporary_file_that_is_there_already_is_not_written(tmp_path, monkeypatch):
    (tmp_path / "victim").write_bytes(b"old")
    monkeypatch.setattr(files, "uuid4", lambda: type("Known", (), {"hex": "known"}))
    (tmp_path / ".a.known.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "a", b"new")
    assert (tmp_path / "victim").read_bytes() == b"old" and not (tmp_path / "a").exists()


def test_two_writers_of_one_file_leave_one_of_the_two(tmp_path):
    data = [bytes([letter]) * 200_000 for letter in b"ab"]
    threads = [
        threading.Thread(target=lambda one: [write_file(tmp_path / "a", one) for _ in range(20)], args=(one,))
        for one in data
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not (tmp_path / "a").exists() or (tmp_path / "a").read_bytes() in data
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() in data


def test_check_writable_names_what_is_wrong(tmp_path):
    check_writable(tmp_path / "new")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_writable(tmp_path / "nowhere" / "new")


def test_check_writable_sees_permissions(tmp_path, monkeypatch):
    # Root may write anywhere, so the system's answer is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="not writable"):
        check_writable(tmp_path / "new")


def test_decode():
    assert decode("\ufeffa\r\nb\rc\n\u00e9".encode(), "f") == "a\nb\nc\n\u00e9"
    with pytest.raises(ValueError, match="^f: not UTF-8 text .byte 0xff at offset 2.$"):
        decode(b"ab\xff", "f")


def test_an_empty_list_has_no_picture():
    with pytest.raises(ValueError, match="Attributions: there is nothing to draw"):
        Attributions().to_png()
