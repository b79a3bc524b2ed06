"""GenerationAttribution: what it refuses, and files that restore it."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import pyglobenc
from pyglobenc import GenerationAttribution


def generation(dtype=np.float32, **changes):
    scores = np.tril(np.array([[0.1, -1, 1e-45, 0, 0], [1 / 3, 2, -0.0, 7, 0]], dtype=dtype), 2)
    out = dict(
        text="the film is\x1b deep.",
        tokens=["[CLS]", "the", "film", "is", "deep"],
        token_ids=[2, 7, 8, 9, 10],
        special=[True, False, False, False, False],
        prompt_length=3,
        scores=scores,
        probabilities=[0.1, 1.0],
        method="saliency",
        model="tiny",
        offsets=[(0, 0), (0, 3), (4, 8), (9, 12), (13, 18)],
        word_ids=[None, 0, 1, 2, 3],
        error=[None, 0.25],
        settings={"answer": "given", "start_layer": 0},
    )
    return GenerationAttribution(**(out | changes))


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("fast", [True, False])
def test_saved_and_loaded_without_loss(tmp_path, suffix, dtype, fast):
    a = generation(dtype) if fast else generation(dtype, offsets=None, word_ids=None, error=None)
    a.save(tmp_path / f"a{suffix}")
    b = pyglobenc.load(tmp_path / f"a{suffix}")
    assert isinstance(b, GenerationAttribution) and b == a and b.scores.dtype == dtype
    assert b.scores.tobytes() == a.scores.tobytes() and b.offsets == a.offsets and b[1] == a[1]
    assert a.to_html() and a.to_png() and repr(a) == repr(b)
    # Files of attributions are read by the same function.
    a[0].save(tmp_path / f"one{suffix}")
    assert pyglobenc.load(tmp_path / f"one{suffix}") == a[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(prompt_length=5), r"prompt_length must lie in \[1, 5\)"),
        (dict(prompt_length=True), "prompt_length must be an integer"),
        (dict(tokens=[]), "prompt_length must lie in"),
        (dict(special=[True]), "special must have n = 5 entries, got 1"),
        (dict(probabilities=[0.1]), "probabilities must have T = 2 entries, got 1"),
        (
            dict(probabilities=[0.1, 1.5]),
            r"probabilities must hold numbers in \[0, 1\], got 1.5 at position 1",
        ),
        (dict(log_scale=[0.0, float("nan")]), "log_scale must hold finite numbers"),
        (dict(scores=np.zeros((2, 4))), r"scores must be \(T, n\) = \(2, 5\)"),
        (dict(scores=np.zeros((2, 5), dtype=int)), "scores must be .* in float32 or float64"),
        (dict(scores=np.full((2, 5), np.nan)), "scores must be finite"),
        (dict(scores=np.ones((2, 5))), "scores must be 0 from each generated token on"),
        (dict(target_kind="mean"), "target_kind must be class or token"),
        (dict(offsets=[(0, 0), (0, 3), (4, 8), (9, 12), (13, 99)]), "offsets must lie within the text"),
        (dict(settings={"a": []}), "settings must be a dict"),
    ],
)
def test_wrong_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"GenerationAttribution: {message}"):
        generation(**changes)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["generation"].pop("tokens"), "tokens is missing"),
        (lambda d: d["generation"].update(other=1), "'other' is no field"),
        (lambda d: d["generation"].update(dtype="float16"), "dtype must be float32 or float64"),
        (lambda d: d["generation"].update(scores=[[0, 0], [0]]), "all of one length"),
        (lambda d: d["generation"].update(scores="no"), "scores must be lists"),
        (lambda d: d["generation"].update(offsets=[[0]]), "offsets must hold pairs"),
        (lambda d: d.update(format_version=2), "its format 2 isn't one of this version's"),
        (lambda d: d.update(generation=[]), "a generation must be an object"),
        (lambda d: d["generation"].update(text="x" * 3), "offsets must lie within the text"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, change, message):
    path = tmp_path / "a.json"
    generation().save(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"load: {path} is not a file of a saved generation: .*{message}"):
        pyglobenc.load(path)


def test_wrong_tensors_and_suffixes(tmp_path):
    path = tmp_path / "a.safetensors"
    a = generation()
    document = {"format": "pyglobenc.generation", "format_version": 1, "generation": a.to_dict()}
    del document["generation"]["scores"]
    save_file({"other": a.scores}, path, {"pyglobenc.generation": json.dumps(document)})
    with pytest.raises(ValueError, match="its only tensor must be scores"):
        pyglobenc.load(path)
    save_file({"scores": a.scores.astype(np.float64)}, path, {"pyglobenc.generation": json.dumps(document)})
    with pytest.raises(ValueError, match="scores must be float32, as dtype says, got float64"):
        pyglobenc.load(path)
    with pytest.raises(ValueError, match="the file's name must end in .json or .safetensors"):
        a.save(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="must end in .json or .safetensors"):
        pyglobenc.load(tmp_path / "a.txt")


def test_sums_need_places_in_the_text():
    a = generation(offsets=None, word_ids=None)
    with pytest.raises(ValueError, match="sentences: the tokens' places in the text aren't known"):
        a.sentences()
    with pytest.raises(ValueError, match="words: the tokenizer doesn't tell"):
        a.words()
    assert a.spans([(0, 2)]).sources == ["[CLS]the"] and a.answer == "isdeep"


def test_nothing_is_written_into_the_models_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    a = generation(model=str(tmp_path))
    for write in (a.save, a.to_html, a.to_png):
        with pytest.raises(ValueError):
            write(tmp_path / "a.json")
