"""How far GlobEnc says that rounding moves it, and how far it does."""

import copy
import warnings

import pytest
import torch
from chefer import relative
from models import SMALL, build, random_batch
from transformers import BertConfig, BertModel

from pyglobenc import GlobEnc, Rollout, capture
from pyglobenc.hf import find_layers
from pyglobenc.methods.precision.reliability import PrecisionWarning, nudged


def extreme(seed):
    """A model in bfloat16 with large scores, of every other one the LayerNorms' gammas are small beside a few
    features' beta.
    """
    torch.manual_seed(seed)
    model = BertModel(BertConfig(**SMALL, initializer_range=0.1)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query.weight" in name or "key.weight" in name:
                parameter.mul_(1 + seed % 7)
            elif seed % 2 and "LayerNorm.weight" in name:
                parameter.mul_(0.01)
            elif seed % 2 and "LayerNorm.bias" in name:
                parameter[:4] = 20.0
    return model.bfloat16()


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
def test_half_models_say_how_far_they_are_off():
    said, true = [], []
    for seed in range(28):
        model = extreme(seed)
        batch = random_batch(model, batch=1, n=16)
        result = GlobEnc(model)(**batch, reliability="measured")
        said.append(float(result.error))
        true.append(relative(result.scores, GlobEnc(copy.deepcopy(model).double())(**batch).scores))
    said, true = torch.tensor(said), torch.tensor(true)
    assert said.isfinite().all() and (true > 1e-2).sum() >= 5
    # one draw of the rounding is told by another
    assert ((true > 4e-2) & (said < 1e-2)).sum() <= 1
    assert 0.1 <= (true / said).median() <= 4


@pytest.mark.parametrize("name", ["bert", "albert", "modernbert", "llama", "gpt2", "vit"])
def test_measuring_changes_nothing_else(name):
    model = build(name, torch.float32)
    batch = random_batch(model, batch=2, n=9)
    alone, measured = (GlobEnc(model)(**batch, reliability=how) for how in ("off", "measured"))
    assert alone.error is None and torch.equal(alone.scores, measured.scores)
    assert ((measured.error > 0) & (measured.error < 1e-3)).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_lost_result_warns():
    model = extreme(3)
    with pytest.warns(PrecisionWarning, match="GlobEnc: rounding moves"):
        GlobEnc(model)(**random_batch(model, batch=1, n=16), reliability="measured")
    with pytest.raises(ValueError, match="reliability must be"):
        GlobEnc(model)(**random_batch(model, batch=1, n=16), reliability="estimated")


@pytest.mark.parametrize("mode", ["bfloat16", "float16", "autocast", "float64-arithmetic"])
def test_an_unmeasured_error_of_a_half_model_is_unknown(mode):
    half = torch.float16 if mode == "float16" else torch.bfloat16
    model = build("bert", torch.float32 if mode == "autocast" else half)
    batch = random_batch(model, batch=2, n=9, pads=[0, 3])
    packed = {"input_ids": [ids[mask.bool()].tolist() for ids, mask in zip(*batch.values(), strict=True)]}
    dtype = torch.float64 if mode == "float64-arithmetic" else None
    for method in (GlobEnc(model, dtype=dtype), Rollout(model, "attention-rollout", dtype=dtype)):
        for call, given in ((method, batch), (method.packed, packed)):
            with (
                torch.autocast("cpu", half, enabled=mode == "autocast"),
                pytest.warns(PrecisionWarning, match="unknown .the model ran in half") as warned,
            ):
                found = call(**given)
            assert warned[0].filename == __file__
            results = found if isinstance(found, list) else [found]
            assert torch.cat([one.error for one in results]).isnan().tolist() == [True, True]


def test_an_unmeasured_error_of_a_full_model_is_none():
    model = build("bert", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GlobEnc(model)(**random_batch(model, batch=2, n=9)).error is None


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_biases_do_not_hide_the_nudge(name):
    """A query that is nearly its bias rounds the nudge of the layer's input away, and is moved itself."""
    model = build(name, torch.bfloat16)
    with torch.no_grad():
        for layer in find_layers(model):
            for module in (layer.query, layer.key, layer.value):
                module.weight.mul_(1e-3)
                module.bias = torch.nn.Parameter(torch.full_like(module.weight[:, 0], 3.0))
    batch, seen = random_batch(model, batch=1, n=9), []
    for second in (False, True):
        with torch.no_grad(), capture(model) as trace:
            if second:
                with nudged(find_layers(model)):
                    model(**batch)
            else:
                model(**batch)
            seen.append([(layer.q, layer.k, layer.v) for layer in trace.layers])
    for layer, moved in zip(*seen, strict=True):
        for t, other in zip(layer, moved, strict=True):
            assert (t != other).float().mean() > 0.2
