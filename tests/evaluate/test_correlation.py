"""Correlation with saliency against scipy, and layers computed from their definitions one text at a time."""

import numpy as np
import pytest
import torch
from published import Float64Throughout, published_maps, published_rollout
from scipy.stats import spearmanr
from tiny import classifier, tokenizer

import pyglobenc
from pyglobenc.evaluate.correlation import layer_correlations, read_saliencies

OPTIONS = dict(max_length=40, progress=False)
TEXTS = ["the good film is deep, filming.", "a film", "good deep the film.", "deep filming"]


def inputs(text):
    return tokenizer()(text, return_tensors="pt", truncation=False, return_token_type_ids=False)


def direct_saliency(text):
    output = classifier()(**inputs(text), output_hidden_states=True)
    h = output.hidden_states[0]
    (grad,) = torch.autograd.grad(output.logits[0].max(), h)
    return (grad * h).norm(dim=-1)[0].detach().numpy()


def direct_layers(text):
    """Maps N_Enc of every layer, and their rollouts, (L, n, n) each."""
    with Float64Throughout():
        layers = published_maps(classifier(), dict(inputs(text)))["N_Enc"]
    return layers[0].numpy(), published_rollout(layers)[0].numpy()


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("mode", ["row", "sum", "hta"])
def test_layers_equal_their_definition(mode, content):
    lengths = [inputs(text)["input_ids"].shape[1] for text in TEXTS]
    if mode == "hta":
        generator = np.random.default_rng(0)
        saliency = np.zeros((3, len(TEXTS), max(lengths), max(lengths)))
        for text, n in enumerate(lengths):
            saliency[:, text, :n, :n] = generator.random((3, n, n))
    else:
        saliency = "gradient-x-input-norm"
    found = layer_correlations(
        classifier(),
        tokenizer(),
        TEXTS,
        methods=["globenc"],
        saliency=saliency,
        mode=mode,
        content=content,
        **OPTIONS,
    )["globenc"]
    for number, (text, n) in enumerate(zip(TEXTS, lengths, strict=True)):
        inside = slice(1, n - 1) if content else slice(0, n)
        for matrices, values in zip(direct_layers(text), (found.layers, found.rollout), strict=True):
            for layer, matrix in enumerate(matrices):
                if mode == "hta":
                    exact = [
                        spearmanr(matrix[i, inside], saliency[layer, number, i, inside]).statistic
                        for i in range(n)
                    ]
                    values_here = values[number, layer, :n]
                    assert np.isnan(values[number, layer, n:]).all()
                else:
                    row = matrix[0] if mode == "row" else matrix.sum(0)
                    exact = spearmanr(row[inside], direct_saliency(text)[inside]).statistic
                    values_here = values[number, layer]
                np.testing.assert_allclose(values_here, exact, atol=1e-12)
    for row in found.rows():
        assert row["n"] + row["skipped"] == len(TEXTS) and -1 <= row["mean"] <= 1


def test_published_files(tmp_path):
    """Saliencies (examples, max_length) with zeros behind each text give what the gradients give."""
    saliencies, path = np.zeros((len(TEXTS), 64), dtype=np.float32), tmp_path / "saliencies.npy"
    for row, text in zip(saliencies, TEXTS, strict=True):
        found = direct_saliency(text)
        row[: len(found)] = found
    np.save(path, saliencies)
    options = OPTIONS | dict(methods=["globenc", "w"])
    ours = layer_correlations(classifier(), tokenizer(), TEXTS, **options)
    theirs = layer_correlations(classifier(), tokenizer(), TEXTS, saliency=read_saliencies(path), **options)
    for method in ours:
        np.testing.assert_allclose(ours[method].rollout, theirs[method].rollout, atol=1e-12)
    with pytest.raises(
        ValueError, match="text 1 has 12 tokens, but its saliency has 4 entries that aren't 0"
    ):
        layer_correlations(
            classifier(), tokenizer(), TEXTS, saliency=saliencies[[1, 1, 2, 3]][:, :11], **options
        )
    with pytest.raises(ValueError, match=r"saliency must be \(texts, m\) with 4 texts, got \(3, 64\)"):
        layer_correlations(classifier(), tokenizer(), TEXTS, saliency=saliencies[:3], **options)


def test_constant_scores_are_counted_and_left_out():
    saliencies = np.zeros((len(TEXTS), 64))
    for row, text in zip(saliencies, TEXTS, strict=True):
        row[: inputs(text)["input_ids"].shape[1]] = np.arange(1, 1 + inputs(text)["input_ids"].shape[1])
    saliencies[2] = np.where(saliencies[2] > 0, 1, 0)
    found = layer_correlations(
        classifier(), tokenizer(), TEXTS, methods=["globenc"], saliency=saliencies, **OPTIONS
    )["globenc"]
    assert np.isnan(found.rollout[2]).all() and not np.isnan(found.rollout[[0, 1, 3]]).any()
    top = found.rows()[0]
    assert (top["layer"], top["of"], top["n"], top["skipped"]) == (3, "rollout", 3, 1)
    counted = found.rollout[[0, 1, 3], 2]
    assert top["mean"] == pytest.approx(counted.mean()) and top["sd"] == pytest.approx(counted.std())


def test_refusals(tmp_path):
    model, tok = classifier(), tokenizer()
    with pytest.raises(ValueError, match="methods must be of raw-attention, w, .*got 'attention-flow'"):
        layer_correlations(model, tok, TEXTS, methods=["attention-flow"])
    with pytest.raises(ValueError, match="mode must be one of row, sum, hta, got 'max'"):
        layer_correlations(model, tok, TEXTS, mode="max")
    with pytest.raises(ValueError, match="mode='hta' needs saliency as an array"):
        layer_correlations(model, tok, TEXTS, mode="hta")
    with pytest.raises(ValueError, match="saliency must be an array or of gradient-x-input-norm"):
        layer_correlations(model, tok, TEXTS, saliency="lime")
    for name, array in (("text", np.array(["a"])), ("flat", np.zeros(3)), ("nan", np.full((2, 2), np.nan))):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match="read_saliencies: .* (must hold numbers|holds NaN)"):
            read_saliencies(tmp_path / f"{name}.npy")
    (tmp_path / "broken.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="no .npy file of numbers"):
        read_saliencies(tmp_path / "broken.npy")


def test_the_metric_of_evaluate_is_the_last_layer_s_rollout():
    methods = ["globenc", "w", "gradient-x-input-norm", "saliency"]
    table = pyglobenc.evaluate(
        classifier(),
        tokenizer(),
        TEXTS,
        methods=methods,
        metrics="correlation",
        protocol="globenc",
        long="truncate",
        max_length=40,
        progress=False,
    )
    exact = layer_correlations(classifier(), tokenizer(), TEXTS, methods=methods[:2], **OPTIONS)
    for method in methods[:2]:
        np.testing.assert_allclose(
            table.per_text[method, "correlation"], exact[method].rollout[:, -1], atol=1e-12
        )
    np.testing.assert_allclose(table.per_text["gradient-x-input-norm", "correlation"], 1)
    np.testing.assert_allclose(table.per_text["saliency", "correlation.gradient"], 1)
    inside = [
        row for row in table.rows if (row["method"], row["metric"]) == ("globenc", "correlation.content")
    ]
    assert len(inside) == 1 and inside[0]["sd"] >= 0
    text = 0
    a, b = (
        pyglobenc.explain(classifier(), tokenizer(), TEXTS[text], method).scores[1:-1]
        for method in ("globenc", "gradient-x-input-norm")
    )
    found = table.per_text["globenc", "correlation.content"][text]
    assert found == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    with pytest.raises(ValueError, match="protocol 'globenc' needs long='truncate', got 'windows'"):
        pyglobenc.evaluate(classifier(), tokenizer(), TEXTS, protocol="globenc", long="windows")
