"""Models whose layers lie on several devices: nothing meets that lies apart, and the results are those of one
device.
"""

from itertools import product

import pytest
import torch
from devices import HOST, Devices
from models import build, random_batch
from sweeps import sweep

from pyglobenc import DecompX, GlobEnc, TransformerAttribution
from pyglobenc.hf import find_layers
from pyglobenc.methods.relevance.transformer_attribution import VARIANTS
from pyglobenc.methods.rollout.baselines import ROLLOUTS, Rollout

ONE, TWO = torch.device("cpu:1"), torch.device("cpu:2")
# where embeddings and head lie, and where the batch does; in the first no two neighbours lie together
LAYOUTS = [(HOST, ONE), (ONE, ONE), (TWO, HOST)]
# one of each kind beside transformer_attribution, and LRP
SEVERAL = ("last_layer_attn", "second_layer", "full", "lrp", "attention_rollout", "attn_gradcam")
EVERYWHERE = [("bert-classifier", *layout) for layout in LAYOUTS]


def scattered(name, rest=HOST, dtype=torch.float64):
    """A model of 3 layers with each on a device of its own."""
    devices, model = Devices(), build(name, dtype)
    devices.spread(model, [layer.block for layer in find_layers(model)], rest, [ONE, HOST, TWO])
    return devices, model


def equal(out, exact):
    # moved tensors are copies, which the matrix products may take in another order
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)


def test_tensors_that_lie_apart_do_not_meet():
    devices = Devices()
    with devices.apart():
        host = torch.randn(3, 3, requires_grad=True)
        one, two = host.to("cpu:1"), torch.ones(3, 3, device="cpu:2")
        assert [t.device for t in (host, one, two, two[1:], one @ one, one + torch.tensor(1.0))] == [
            HOST,
            ONE,
            TWO,
            TWO,
            ONE,
            ONE,
        ]
        assert [
            t.device
            for t in (torch.zeros_like(two), torch.arange(3, device=one.device), one.to(two), two.cpu())
        ] == [
            TWO,
            ONE,
            TWO,
            HOST,
        ]
        for apart in (
            lambda: one + two,
            lambda: host @ one,
            lambda: torch.cat([one, host]),
            lambda: host[two[0].long()],
        ):
            with pytest.raises(RuntimeError, match="tensors on cpu"):
                apart()
        (one.to(two) * two).sum().backward()
        assert host.grad.device == HOST
    assert torch.equal(host.grad, torch.ones(3, 3)) and torch.equal(one, host)


@pytest.mark.parametrize(
    "name, rest, given",
    EVERYWHERE + [(name, *LAYOUTS[0]) for name in ("mpnet", "deberta-v3", "modernbert", "gemma2", "beit")],
)
def test_globenc(name, rest, given):
    devices, model = scattered(name, rest)
    plain = build(name)
    batch = random_batch(plain, 2, 9, pads=[0, 3])
    options = dict(layers=True, maps=["head_N", "N_Res", "mix_N", "rollout"])
    exact = GlobEnc(plain)(**batch, **options)
    with devices.apart():
        there = {key: value.to(given) for key, value in batch.items()}
        out = GlobEnc(model)(**there, **options)
        scores = GlobEnc(model)(**there).scores
    equal(out.layer_scores, exact.layer_scores)
    equal(scores, exact.scores)
    for kind in exact.maps:
        equal(out.maps[kind], exact.maps[kind])


@pytest.mark.parametrize("method", ROLLOUTS)
def test_family(method):
    devices, model = scattered("bert-classifier")
    plain = build("bert-classifier")
    batch = random_batch(plain, 2, 9, pads=[0, 3])
    exact = Rollout(plain, method)(**batch, layers=True, maps=["layers", "rollout"])
    with devices.apart():
        out = Rollout(model, method)(**batch, layers=True, maps=["layers", "rollout"])
    equal(out.layer_scores, exact.layer_scores)
    equal(out.maps["rollout"], exact.maps["rollout"])


def test_packed_sequences():
    devices, model = scattered("bert-classifier")
    with devices.apart():
        packed = GlobEnc(model).packed(input_ids=[[5, 6, 7], [8, 9]])
    alone = GlobEnc(build("bert-classifier"))(input_ids=torch.tensor([[8, 9]]))
    equal(packed[1].scores, alone.scores)
    equal(packed[1].output.logits, alone.output.logits)


@pytest.mark.parametrize(
    "rest, variant",
    sweep(
        product((HOST, ONE, TWO), ("transformer_attribution", "last_layer", "full", "lrp")),
        [(HOST, "transformer_attribution"), (ONE, "last_layer"), (TWO, "lrp")],
    ),
    ids=str,
)
def test_packed_relevance(rest, variant):
    devices, model = scattered("bert-classifier", rest)
    options = dict(
        input_ids=[[5, 6, 7], [8, 9], [7, 9]],
        variant=variant,
        layers=True,
        reliability="measured",
        target=[0, 1, 1],
    )
    exact = TransformerAttribution(build("bert-classifier")).packed(**options)
    with devices.apart():
        out = TransformerAttribution(model).packed(**options)
    for one, expected in zip(out, exact, strict=True):
        equal(one.scores, expected.scores)
        equal(one.relevance, expected.relevance)
        torch.testing.assert_close(one.error, expected.error, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name, rest, given, variant",
    [
        *((*place, "transformer_attribution") for place in EVERYWHERE[1:]),
        *sweep(
            [("bert-classifier", *LAYOUTS[0], variant) for variant in VARIANTS],
            [("bert-classifier", *LAYOUTS[0], variant) for variant in SEVERAL],
        ),
        *sweep(
            [("vit", *LAYOUTS[0], variant) for variant in VARIANTS],
            [("vit", *LAYOUTS[0], "transformer_attribution")],
        ),
    ],
)
def test_transformer_attribution(name, rest, given, variant):
    devices, model = scattered(name, rest)
    plain = build(name)
    batch = random_batch(plain, 2, 9, pads=[0, 3])
    options = dict(variant=variant, layers=True, maps=["map", "R_in"], target=[0, 1], contrast=[1, 0])
    exact = TransformerAttribution(plain)(**batch, **options)
    with devices.apart():
        out = TransformerAttribution(model)(
            **{key: value.to(given) for key, value in batch.items()}, **options
        )
    equal(out.scores, exact.scores)
    equal(out.relevance, exact.relevance)
    for kind in exact.maps:
        equal(out.maps[kind], exact.maps[kind])
    if exact.error is not None:
        equal(out.error, exact.error)


def test_measured_error():
    devices, model = scattered("distilbert", dtype=torch.float32)
    plain = build("distilbert", torch.float32)
    batch = random_batch(plain, 2, 9, pads=[0, 3])
    exact = TransformerAttribution(plain)(**batch, reliability="measured")
    with devices.apart():
        out = TransformerAttribution(model)(**batch, reliability="measured")
    assert torch.equal(out.scores, exact.scores) and torch.equal(out.error, exact.error)


@pytest.mark.parametrize("rest", [HOST, TWO], ids=str)
def test_a_head_that_reads_the_mean(rest):
    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.top = build("bert"), torch.nn.Linear(48, 3).double()

        def forward(self, input_ids, attention_mask):
            h = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
            mask = attention_mask.to(h.device)
            return self.top((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    devices, model, plain = Devices(), Around().eval(), Around().eval()
    devices.spread(model, [layer.block for layer in find_layers(model)], rest, [ONE, HOST, TWO])
    batch = random_batch(plain.encoder, 2, 9, pads=[0, 3])
    for method in (GlobEnc, TransformerAttribution):
        exact = method(plain)(**batch)
        with devices.apart():
            out = method(model)(**batch)
        equal(out.scores, exact.scores)


@pytest.mark.parametrize("bias, memory", [("equal", 0), ("absdot", 0), ("absdot", 1 << 30)])
@pytest.mark.parametrize("name, rest, given", EVERYWHERE)
def test_decompx(name, rest, given, bias, memory):
    devices, model = scattered(name, rest)
    plain = build(name)
    batch = random_batch(plain, 2, 9, pads=[0, 3])
    exact = DecompX(plain)(**batch, target=1, bias=bias)
    with devices.apart():
        there = {key: value.to(given) for key, value in batch.items()}
        out = DecompX(model, memory=memory)(**there, target=1, bias=bias)
        equal(out.scores.cpu(), exact.scores)
