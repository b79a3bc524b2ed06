"""The published notebooks' calls, on the published outputs."""

import sys
from operator import attrgetter
from types import SimpleNamespace

import networkx
import numpy as np
import pytest
import torch
from models import build, golden, random_batch
from published import published_maps, published_rollout
from scipy.stats import spearmanr
from tiny import tokenizer as tiny_tokenizer
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from pyglobenc.compat import globenc
from pyglobenc.compat.tokenizers import add_encode_plus

NAMES = ("head_N", "N", "N_Res", "N_ResLN", "N_Enc", "mix_N", "mix_N_Res", "mix_N_ResLN", "mix_N_Enc")
CASES = ["globenc_bert", "globenc_bert_padded", "globenc_bert_h12", "globenc_electra"]


def compat_golden(name):
    stock, published = golden(name)
    cls = (
        globenc.ElectraForSequenceClassification
        if "electra" in name
        else globenc.BertForSequenceClassification
    )
    model = cls(stock.config).double().eval()
    model.load_state_dict(stock.state_dict())
    return (
        model,
        published,
        {key: published[key] for key in ("input_ids", "attention_mask", "token_type_ids")},
    )


def close(out, exact, rows, tolerance=1e-9):
    """On the rows of queries that aren't padding; the others of the published maps mean nothing."""
    dim = 2 if out.dim() == 4 else 1
    out, exact = (t.movedim(dim, 1)[rows] for t in (out, exact))
    assert (out - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_tuples_hold_the_published_values(name):
    model, published, batch = compat_golden(name)
    rows, depth = batch["attention_mask"].bool(), model.config.num_hidden_layers
    with torch.no_grad():
        logits, attentions, rollout, norms = model(
            **batch, output_attentions=True, output_norms=True, output_globenc=True, return_dict=False
        )
    torch.testing.assert_close(logits, published["logits"], rtol=1e-9, atol=1e-9)
    close(rollout, published["globenc"], torch.ones_like(rows))
    assert len(attentions) == len(norms) == depth
    for layer in range(depth):
        close(attentions[layer], published[f"attention.{layer}"], torch.ones_like(rows))
        assert len(norms[layer]) == len(NAMES)
        for kind, out in zip(NAMES, norms[layer], strict=True):
            close(out, published[f"{kind}.{layer}"], rows)


def test_order_of_tuples():
    model, _, batch = compat_golden("globenc_bert")
    labels = torch.tensor([1] * len(batch["input_ids"]))
    sizes = {}
    for name, options in {
        "plain": {},
        "attentions": dict(output_attentions=True),
        "norms": dict(output_norms=True),
        "globenc": dict(output_globenc=True),
        "all": dict(
            output_attentions=True,
            output_norms=True,
            output_globenc=True,
            output_hidden_states=True,
            labels=labels,
        ),
    }.items():
        sizes[name] = model(**batch, **options, return_dict=False)
    assert [len(sizes[name]) for name in sizes] == [1, 2, 2, 2, 6]
    loss, logits, hidden, attentions, rollout, norms = sizes["all"]
    assert loss.dim() == 0 and len(hidden) == len(attentions) + 1
    assert torch.equal(sizes["globenc"][1], rollout)
    assert torch.equal(sizes["norms"][1][0][4], norms[0][4])
    torch.testing.assert_close(sizes["attentions"][1][0], attentions[0])
    # as published: without output_norms the place of attentions holds N_Enc
    assert torch.equal(
        model(**batch, output_attentions=True, output_globenc=True, return_dict=False)[1][0], norms[0][4]
    )
    as_dict = model(**batch, output_norms=True, output_globenc=True)
    assert torch.equal(as_dict.globenc, rollout) and torch.equal(as_dict.norms[1][8], norms[1][8])
    assert torch.equal(as_dict.logits, logits)


def test_logits_keep_their_gradient():
    model, _, batch = compat_golden("globenc_bert")
    logits, rollout = model(**batch, output_globenc=True, return_dict=False)
    assert logits.requires_grad and not rollout.requires_grad


def test_saved_and_loaded(tmp_path):
    model, _, batch = compat_golden("globenc_bert")
    model.save_pretrained(tmp_path)
    loaded = globenc.BertForSequenceClassification.from_pretrained(tmp_path)
    exact = model(**batch, output_globenc=True, return_dict=False)[1]
    torch.testing.assert_close(
        loaded(**batch, output_globenc=True, return_dict=False)[1], exact, rtol=1e-9, atol=0
    )


def test_head_mask_is_refused():
    model, _, batch = compat_golden("globenc_bert")
    with pytest.raises(ValueError, match="head_mask is not supported"):
        model(**batch, head_mask=torch.ones(4))


def encoder(model, count, lengths):
    batches = [random_batch(model, 1, lengths[index]) for index in range(count)]
    return lambda index: BatchEncoding({key: value for key, value in batches[index].items()})


def test_notebook_pipeline(tmp_path):
    """The cells of the attention flow notebook, each step against its definition."""
    stock = build("bert-classifier")
    model = globenc.BertForSequenceClassification(stock.config).double()
    model.load_state_dict(stock.state_dict())
    lengths = (7, 9, 5)
    encode = encoder(model, 3, lengths)
    raw, norms = globenc.extract_attentions(model, encode, 3)
    assert [a.shape for a in raw] == [(3, n, n) for n in lengths]
    assert [[a.shape for a in kind] for kind in norms[:2]] == [
        [(3, 4, n, n) for n in lengths],
        [(3, n, n) for n in lengths],
    ]
    assert norms[8][1].shape == (3, 9)
    shorter, shorter_norms = globenc.extract_attentions(model, encode, 1, delete_sep=True)
    assert np.array_equal(shorter[0], raw[0][:, :6, :6]) and np.array_equal(
        shorter_norms[4][0], norms[4][0][:, :6, :6]
    )

    mixed = globenc.build_ratio_residual_attentions(raw, norms)
    assert list(mixed) == ["W-FixedRes", "W-Res", "N-FixedRes"]
    for index in range(3):
        for i in range(lengths[index]):
            row, ratio = raw[index][1, i].copy(), norms[8][index][1, i]
            row[i] = 0
            row = row / row.sum() * ratio
            row[i] += 1 - ratio
            np.testing.assert_allclose(mixed["W-Res"][index][1, i], row, rtol=1e-12)
            half = norms[1][index][1, i] / norms[1][index][1, i].sum() / 2
            half[i] += 0.5
            np.testing.assert_allclose(mixed["N-FixedRes"][index][1, i], half, rtol=1e-12)
        np.testing.assert_allclose(
            mixed["W-FixedRes"][index], raw[index] / 2 + np.eye(lengths[index]) / 2, rtol=1e-12
        )

    flows = globenc.AttentionRollout().compute_flows(
        norms[4], desc="N-Enc", output_hidden_states=True, num_cpus=4
    )
    last = globenc.AttentionRollout().compute_flows(norms[4], disable_tqdm=True)
    for matrices, flow, top in zip(norms[4], flows, last, strict=True):
        np.testing.assert_allclose(flow[2], matrices[2] @ matrices[1] @ matrices[0], rtol=1e-12)
        assert (
            top.shape == (1, *flow.shape[1:])
            and np.array_equal(top[0], flow[2])
            and np.array_equal(flow[0], matrices[0])
        )

    saliency = np.random.default_rng(0).random((3, 16))
    np.save(tmp_path / "saliency.npy", saliency)
    for aggregation in ("CLS", "SUM"):
        found = globenc.compute_spearman_correlation(
            flows, str(tmp_path / "saliency.npy"), aggregation=aggregation, max_length=8
        )
        row = flows[1][2][0] if aggregation == "CLS" else flows[1][2].sum(0)
        assert found[1].shape == (3,)
        assert found[1][2] == pytest.approx(spearmanr(row[:8], saliency[1][:8]).correlation)
    with pytest.raises(ValueError, match="aggregation must be CLS or SUM"):
        globenc.compute_spearman_correlation(flows, str(tmp_path / "saliency.npy"), aggregation="MEAN")


def test_correlation_with_hidden_token_attribution(tmp_path):
    rng = np.random.default_rng(2)
    layers, hta = rng.random((2, 5, 5)), rng.random((2, 3, 8, 8))
    np.save(tmp_path / "hta.npy", hta)
    found = globenc.compute_spearman_correlation_hta([layers, layers], str(tmp_path / "hta.npy"))
    assert found[1].shape == (2, 5)
    assert found[1][1][3] == pytest.approx(spearmanr(layers[1, 3], hta[1, 1, 3, :5]).correlation)


def test_max_flow():
    matrices = np.random.default_rng(1).random((2, 4, 4))
    matrices /= matrices.sum(2, keepdims=True)
    every = globenc.AttentionMaxFlow().compute_flows([matrices], output_hidden_states=True, num_cpus=1)[0]
    last = globenc.AttentionMaxFlow().compute_flows([matrices])[0]
    assert every.shape == (2, 4, 4) and np.array_equal(last, every[1:])
    graph = networkx.DiGraph()
    for (layer, i, j), capacity in np.ndenumerate(matrices):
        graph.add_edge((layer + 1, i), (layer, j), capacity=capacity)
    flow = np.array([networkx.maximum_flow_value(graph, (2, 3), (0, j)) for j in range(4)])
    np.testing.assert_allclose(last[0, 3], flow / flow.sum(), atol=1e-6)


def test_published_module_names():
    from pyglobenc.compat.globenc.attention_rollout import AttentionRollout
    from pyglobenc.compat.globenc.modeling.modeling_bert import BertForSequenceClassification
    from pyglobenc.compat.globenc.modeling.modeling_electra import ElectraForSequenceClassification

    assert AttentionRollout is globenc.AttentionRollout
    assert BertForSequenceClassification is globenc.BertForSequenceClassification
    assert ElectraForSequenceClassification is globenc.ElectraForSequenceClassification
    # imported as src, the package has the modules that the cells reload
    names = (
        "model_attentions metrics task_loaders attention_flow_abstract attention_rollout attention_max_flow"
    ).split()
    for name in (*names, "modeling.modeling_bert", "modeling.modeling_electra"):
        assert attrgetter(name)(globenc) is sys.modules[f"{globenc.__name__}.{name}"]


@pytest.mark.parametrize("name", ["globenc_bert", "globenc_electra"])
def test_demo_cells(tmp_path, name):
    """From a folder to the picture's rows, each value against its definition."""
    stock, _ = golden(name)
    stock.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    cls = (
        globenc.ElectraForSequenceClassification
        if "electra" in name
        else globenc.BertForSequenceClassification
    )
    model = cls.from_pretrained(tmp_path)
    encoded = tokenizer.encode_plus("A deep film.", return_tensors="pt")
    with torch.no_grad():
        _, attentions, norms = model(**encoded, output_attentions=True, output_norms=True, return_dict=False)
        matrices = torch.stack([norms[index][4] for index in range(len(attentions))]).squeeze().cpu().numpy()
        flows = np.array(globenc.AttentionRollout().compute_flows([matrices], output_hidden_states=True)[0])
    rows = np.flip(flows[:, 0, :], axis=0)
    rows = rows / rows.max(axis=1)[:, np.newaxis]
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
    exact = published_rollout(published_maps(stock, encoded)["N_Enc"])[0, :, 0].flip(0)
    assert rows.shape == (model.config.num_hidden_layers, len(tokens)) and tokens[0] == "[CLS]"
    np.testing.assert_allclose(rows, exact / exact.amax(1, keepdim=True), rtol=1e-9)


def test_what_the_config_asks_for(tmp_path):
    model, _, batch = compat_golden("globenc_bert")
    model.save_pretrained(tmp_path)
    model = globenc.BertForSequenceClassification.from_pretrained(tmp_path, output_attentions=True)
    assert len(model(**batch, output_norms=True, return_dict=False)) == 3
    assert len(model(**batch, output_norms=True, output_attentions=False, return_dict=False)) == 2
    assert len(model(**batch, output_attentions=False, return_dict=False)) == 1
    # the published order of arguments, head_mask among them
    positional = model(*batch.values(), None, None, None, torch.tensor([1]), return_dict=False)
    named = model(**batch, labels=torch.tensor([1]), return_dict=False)
    assert positional[0].dim() == 0 and torch.equal(positional[0], named[0])


def test_residuals_of_float32_are_float64():
    raw, norms = (
        [np.float32(np.random.default_rng(0).random((2, 3, 3)))],
        [[np.full((2, 3, 3), 1 / 3, np.float32)]] * 9,
    )
    norms[8] = [np.full((2, 3), 0.25, np.float32)]
    assert {
        m.dtype for matrices in globenc.build_ratio_residual_attentions(raw, norms).values() for m in matrices
    } == {np.dtype("float64")}


def test_encode_plus(monkeypatch):
    tokenizer = tiny_tokenizer()
    options = dict(return_tensors="pt", max_length=6, truncation=True)
    for texts in (["a deep film"], ["a deep film", "good"]):
        assert (
            tokenizer.encode_plus(*texts, **options).input_ids.tolist()
            == tokenizer(*texts, **options).input_ids.tolist()
        )
    padded = tokenizer.encode_plus("good", max_length=6, pad_to_max_length=True, truncation=True)
    assert padded["input_ids"][-1] == tokenizer.pad_token_id and len(padded["input_ids"]) == 6
    there = object()
    monkeypatch.setattr(PreTrainedTokenizerBase, "encode_plus", there)
    add_encode_plus()
    assert PreTrainedTokenizerBase.encode_plus is there


class Rows(list):
    def map(self, function):
        return Rows(function(row) for row in self)


def test_task_loader(monkeypatch):
    asked = []
    votes = {"annotators": {"label": [2, 0, 2]}, "post_tokens": ["deep", "film"]}
    rows = {
        "mnli": {"premise": "deep", "hypothesis": "good film"},
        "sst2": {"sentence": "the film"},
        None: votes,
    }

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        return Rows([rows[name]])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    tokenizer = tiny_tokenizer()
    loader = globenc.TaskLoader(tokenizer, count=5, max_length=4)
    found = {task: loader.load_task(task) for task in ("mnli", "sst2", "hatexplain")}
    assert asked == [
        ("glue", "mnli", "validation_mismatched[:5]"),
        ("glue", "sst2", "validation[:5]"),
        ("hatexplain", None, "validation[:5]"),
    ]
    texts = {"mnli": ("deep", "good film"), "sst2": ("the film",), "hatexplain": ("deep film",)}
    for task, (dataset, encode) in found.items():
        exact = tokenizer(*texts[task], max_length=4, truncation=True, return_tensors="pt")
        assert len(dataset) == 1 and torch.equal(encode(0)["input_ids"], exact["input_ids"])
    assert found["hatexplain"][0][0]["label"] == 2
    globenc.TaskLoader(tokenizer).load_task("sst2")
    assert asked[-1][2] == "validation[:]"
    with pytest.raises(ValueError, match="task must be one of mnli, sst2, hatexplain"):
        loader.load_task("cola")


def test_subclass_changes_the_matrices():
    class Halved(globenc.AttentionRollout):
        def pre_process(self, att_mat):
            return att_mat / 2

    matrices = np.random.default_rng(0).random((2, 3, 3))
    np.testing.assert_allclose(
        Halved().compute_flows([matrices])[0][0], matrices[1] @ matrices[0] / 4, rtol=1e-12
    )
    assert isinstance(globenc.AttentionMaxFlow(), globenc.AttentionFlow)
