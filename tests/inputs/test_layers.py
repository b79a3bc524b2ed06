"""`explain_layers`: its rows are those of the methods, and it refuses what has no layers."""

import numpy as np
import pytest
import torch
from tiny import classifier, tokenizer

import pyglobenc
from pyglobenc.methods.rollout.baselines import ROLLOUTS

TEXT = "the good film"


@pytest.fixture(scope="module")
def model():
    return classifier()


@pytest.mark.parametrize("method", ROLLOUTS)
def test_rows_of_every_layer_are_products_of_the_maps(model, method):
    found = pyglobenc.explain_layers(model, tokenizer(), TEXT, method, target=2, maps=True)
    layers, n = found.scores.shape
    assert found.maps.shape == (layers, n, n) and layers == len(found) == model.config.num_hidden_layers
    np.testing.assert_array_equal(found.at(layers - 1).scores, found.attribution.scores)
    assert found.attribution.target == 2 and found.at(0).settings["layer"] == 0
    if method in ("raw-attention", "attention-flow"):
        return
    product = np.eye(n)
    for layer in range(layers):
        product = found.maps[layer].astype(np.float64) @ product
        row = found.scores[layer] * np.exp(found.log_scale[layer])
        np.testing.assert_allclose(row, product[2], rtol=1e-9 if row.dtype == np.float64 else 1e-4)


def test_relevance_of_every_layer_is_the_methods_own(model):
    found = pyglobenc.explain_layers(model, tokenizer(), TEXT, "transformer-attribution", target=1, maps=True)
    batch = tokenizer()(TEXT, return_tensors="pt")
    attribute = pyglobenc.TransformerAttribution(model)
    own = attribute(**batch, target=1, layers=True, maps=("map",))
    np.testing.assert_array_equal(found.scores, own.relevance[0].detach().numpy())
    np.testing.assert_array_equal(found.maps, own.maps["map"][0].detach().numpy())


def test_pairs_means_and_no_maps(model):
    found = pyglobenc.explain_layers(model, tokenizer(), ("good", "film"), target="mean")
    assert found.attribution.text_pair == "film" and found.maps is None
    assert found.attribution.target_kind == "mean"
    with pytest.raises(ValueError, match="there are no maps; explain_layers"):
        found.map_to_png(0)
    for layer, error in ((len(found), ValueError), (-1, ValueError), (True, TypeError), (0.0, TypeError)):
        with pytest.raises(error, match="layer must"):
            found.at(layer)


def test_pictures_name_the_layer(model, tmp_path):
    found = pyglobenc.explain_layers(model, tokenizer(), TEXT, maps=True, merge_words=True)
    assert "<dt>layer</dt><dd>1</dd>" in found.at(1).to_html()
    assert "<dt>layer</dt>" not in found.attribution.to_html()
    assert pyglobenc.load(_saved(found.at(1), tmp_path / "a.json")) == found.at(1)
    assert found.to_png(tmp_path / "curves.png") == (tmp_path / "curves.png").read_bytes()
    assert found.map_to_png(0, tmp_path / "map.png") == (tmp_path / "map.png").read_bytes()
    assert found.map_to_png(0) != found.map_to_png(1) and found._repr_png_() == found.to_png()


def _saved(attribution, path):
    attribution.save(path)
    return path


@pytest.mark.parametrize(
    "text, options, message",
    [
        (TEXT, {"method": "saliency"}, "saliency has no scores by layer"),
        (TEXT, {"method": "none"}, "explain_layers: method must be one of"),
        ([TEXT], {}, "text must be one text or a pair"),
        ("good " * 100, {}, "tokens"),
        (TEXT, {"target": 99}, "target must lie in"),
    ],
)
def test_what_has_no_layers_is_refused(model, text, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pyglobenc.explain_layers(model, tokenizer(), text, **options)
    assert not any(module._forward_hooks for module in model.modules())


def test_devices_and_dtypes(model):
    double = classifier().double()
    found = pyglobenc.explain_layers(double, tokenizer(), TEXT, dtype=torch.float64)
    assert found.scores.dtype == np.float64
