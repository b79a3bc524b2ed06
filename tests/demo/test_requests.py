"""What stands behind the page: requests, limits and the models that it may load. Gradio isn't needed."""

import threading

import numpy as np
import pytest
from folders import image_folder, text_folder
from PIL import Image

import pyglobenc
from pyglobenc.demo.examples import IMAGES, TEXTS
from pyglobenc.demo.models import SLOW, Models
from pyglobenc.demo.requests import (
    TextRequest,
    explain_every_layer,
    explain_picture,
    explain_text,
    measure_text,
    number_or_name,
    open_upload,
)
from pyglobenc.inputs.images import open_image
from pyglobenc.methods.registry import METHODS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return text_folder(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def models(folder):
    return Models([folder], public=True, device="cpu")


def test_several_methods_are_explained_as_explain_does(models, folder):
    request = TextRequest(folder, "the good film", "", ("globenc", "saliency"), token="2", label="1")
    done = explain_text(models, request)
    assert [one.method for one in done] == ["globenc", "saliency"] and done[0].model == folder
    with models.text(folder, True) as (model, tokens):
        for one, target in zip(done, (2, 1), strict=True):
            own = pyglobenc.explain(model, tokens, "the good film", one.method, target=target)
            np.testing.assert_array_equal(one.scores, own.scores)
            assert one.target == target and one.merge_words


def test_long_texts_come_in_windows_and_pairs_as_pairs(models, folder):
    long = explain_text(models, TextRequest(folder, "the good film " * 20))[0]
    assert len(long.windows) > 1 and long.cut == 0
    assert explain_text(models, TextRequest(folder, "good", "film"))[0].text_pair == "film"
    assert explain_text(models, TextRequest(folder, "good", " "))[0].text_pair is None


def test_layers_and_faithfulness(models, folder):
    request = TextRequest(folder, "the good film", methods=("globenc", "saliency"))
    found = explain_every_layer(models, request)
    assert found.maps.shape[1:] == (len(found.attribution),) * 2 and found.attribution.method == "globenc"
    rows = measure_text(models, request)
    assert {(row["method"], row["metric"]) for row in rows} >= {
        (method, metric) for method in request.methods for metric in ("comprehensiveness", "sufficiency")
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(text="a" * 51), "at most 50 characters are explained, got 51"),
        (dict(text="a" * 30, pair="b" * 30), "at most 50 characters are explained, got 60"),
        (dict(methods=()), "choose 1 to 4 methods, got 0"),
        (dict(methods=("globenc",) * 5), "choose 1 to 4 methods, got 5"),
        (dict(methods=("none",)), "the method must be one of"),
        (dict(text=""), "text is empty"),
        (dict(text=None), "text is empty"),
        (dict(token="99"), "target must lie in"),
        (dict(token="<b>"), "<b>"),
        (dict(model=""), "no model is chosen"),
        (dict(model=None), "no model is chosen"),
    ],
)
def test_requests_are_refused_with_the_reason(folder, changes, message):
    request = TextRequest(**(dict(model=folder, text="the good film") | changes))
    with pytest.raises((ValueError, TypeError), match=message):
        explain_text(Models([folder], device="cpu"), request, max_characters=50)


@pytest.mark.parametrize("name", ["bert-base-uncased", "/etc", "./model", "../model", "~", "minilm", "\0"])
def test_a_public_page_loads_only_what_it_offers(models, folder, name, monkeypatch):
    monkeypatch.setattr(models, "_text", None)
    for ask in (explain_text, explain_every_layer, measure_text):
        with pytest.raises(ValueError, match="the model must be one of"):
            ask(models, TextRequest(name, "good"))
    with pytest.raises(ValueError, match=r"the model must be one of \(none\)"):
        explain_picture(models, folder, IMAGES[0], "", "")


def test_a_public_page_offers_no_slow_methods(models, folder):
    for method in SLOW:
        with pytest.raises(ValueError, match="the method must be one of"):
            explain_text(models, TextRequest(folder, "good", methods=("globenc", method)))
        with pytest.raises(ValueError, match="the method must be one of"):
            explain_picture(models, folder, IMAGES[0], method, "")
    own = Models([folder], public=True, device="cpu", methods=["occlusion"])
    assert explain_text(own, TextRequest(folder, "good", methods=["occlusion"]))[0].method == "occlusion"
    assert set(Models([]).methods) == set(METHODS) > set(models.methods) == set(METHODS) - set(SLOW)
    with pytest.raises(ValueError, match="demo: method must be one of"):
        Models([], methods=["none"])


def test_a_private_page_loads_any_folder(folder):
    assert explain_text(Models([], device="cpu"), TextRequest(folder, "good"))[0].model == folder
    with pytest.raises(ValueError, match="there is no such folder"):
        explain_text(Models([], device="cpu"), TextRequest("./nowhere", "good"))


def test_one_request_at_a_time_uses_the_models(models, folder):
    inside, most = [], []

    def ask():
        with models.text(folder, False):
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=ask) for _ in range(8)]
    with models.text(folder, False):
        for thread in threads:
            thread.start()
        assert not most, "the others wait"
    for thread in threads:
        thread.join()
    assert most == [1] * 8
    with pytest.raises(ZeroDivisionError), models.text(folder, False) as (first, _):
        raise ZeroDivisionError
    with models.text(folder, False) as (again, _):
        assert again is first, "an error gives the model back, and it stays loaded"


def test_uploads_go_through_the_list_of_formats(models, tmp_path):
    script = tmp_path / "upload.png"
    script.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ValueError, match="^can't read image 'upload.png': it is none of BMP"):
        open_upload(str(script))
    picture = tmp_path / "a.png"
    Image.new("RGB", (900, 300), "red").save(picture)
    (tmp_path / "small.png").write_bytes(open_upload(str(picture)))
    assert open_image(tmp_path / "small.png").size == (400, 133)
    with pytest.raises(ValueError, match="'a.png': it has 900 x 300 pixels, and at most 100"):
        open_upload(str(picture), max_pixels=100)
    with pytest.raises(ValueError, match="choose an image first"):
        explain_picture(models, "m", None, "", "")
    with pytest.raises(ValueError, match="at most 4 classes are explained, got 5"):
        explain_picture(models, "m", str(picture), "", "1,2,3,4,5")


def test_classes_of_an_image_stand_side_by_side(tmp_path):
    models = Models([], [image_folder(tmp_path / "vit")], public=True, device="cpu")
    name = models.images[0]
    done = explain_picture(models, name, IMAGES[0], "", "owl, 0")
    assert list(done.scores) == [2, 0] and done.to_png().startswith(b"\x89PNG")
    assert list(explain_picture(models, name, IMAGES[0], "", "").scores) == [done.predicted]
    assert list(explain_picture(models, name, IMAGES[0], "globenc", "mean").scores) == ["mean"]


def test_what_users_type_is_a_number_or_a_name():
    typed = [" 3 ", "-1", "mean", "positive", "", "  ", None, "1.5"]
    assert [number_or_name(text) for text in typed] == [3, -1, "mean", "positive", None, None, None, "1.5"]


def test_examples_are_texts_and_images():
    assert all(isinstance(part, str) for row in TEXTS for part in row)
    assert all(min(open_image(path).size) > 100 for path in IMAGES)
