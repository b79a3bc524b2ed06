import pytest
import torch
from models import ARCHITECTURES, EACH, IMAGES, PRE_NORM, build, golden, random_batch
from published import Float64Throughout, published_maps, published_rollout
from sweeps import sweep

from pyglobenc import GlobEnc
from pyglobenc.methods.rollout.globenc import MAPS

GOLDEN = ["globenc_bert", "globenc_bert_padded", "globenc_bert_h12", "globenc_electra"]


def inputs(published):
    return {name: published[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def real_rows(name, t, mask):
    """Entries of queries that aren't padding: the published maps of the others mean nothing."""
    mask = mask.bool()
    if name == "rollout":
        return t[mask]
    if name == "head_N":
        return t.permute(0, 3, 1, 2, 4)[mask]
    return t.transpose(1, 2)[mask]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", GOLDEN)
def test_equals_published_outputs(name, dtype, tolerance):
    model, published = golden(name)
    depth = model.config.num_hidden_layers
    result = GlobEnc(model.to(dtype))(**inputs(published), targets=[0, 3], layers=True, maps=MAPS)
    for kind in MAPS:
        exact = (
            published["globenc"]
            if kind == "rollout"
            else torch.stack([published[f"{kind}.{i}"] for i in range(depth)], dim=1)
        )
        out = real_rows(kind, result.maps[kind], published["attention_mask"])
        exact = real_rows(kind, exact, published["attention_mask"])
        assert (out - exact).abs().max() <= tolerance * exact.abs().max(), kind
    rows = result.scores * result.log_scale.exp()[..., None]
    exact = published["globenc"][:, [0, 3]]
    assert (rows - exact).abs().max() <= tolerance * exact.abs().max()
    assert torch.equal(result.scores.amax(-1), torch.ones_like(result.log_scale))
    assert (result.output.logits - published["logits"]).abs().max() <= 10 * tolerance


EVERY = [*ARCHITECTURES, *PRE_NORM, *IMAGES]


@pytest.mark.parametrize(
    "name, side, attention",
    sweep(
        [(name, *how) for name in EVERY for how in (("right", "eager"), ("left", "sdpa"))],
        [(name, "right", "eager") for name in EVERY]
        + [(name, "left", "sdpa") for name in EACH if name not in IMAGES],
    ),
)
def test_every_architecture_equals_direct_computation(name, side, attention):
    if name in IMAGES and side == "left":
        pytest.skip("images have no padding")
    model = build(name, attention=attention)
    pads = [0, 4, 7]
    batch = random_batch(model, batch=3, n=11, pads=pads, side=side)
    maps = published_maps(model, batch)
    kinds = [kind for kind in MAPS if kind in maps]
    targets = torch.tensor([[7, 10], [4, 6], [7, 8]] if side == "left" else [[0, 3], [6, 1], [3, 3]])
    with Float64Throughout():
        result = GlobEnc(model)(**batch, maps=kinds, layers=True, targets=targets)
        plain = GlobEnc(model)(**batch, layers=True, targets=targets)
    for kind in kinds:
        assert (result.maps[kind] - maps[kind]).abs().max() <= 1e-10 * maps[kind].abs().max(), kind
    rollout = published_rollout(maps["N_Enc" if "N_Enc" in kinds else "N_Res"])
    exact = rollout.gather(2, targets[:, None, :, None].expand(-1, rollout.shape[1], -1, rollout.shape[3]))
    for found in (result, plain):
        rows = found.layer_scores * found.layer_log_scale.exp()[..., None]
        assert (rows - exact).abs().max() <= 1e-10 * rollout.abs().max()


@pytest.mark.parametrize("name", [*PRE_NORM, *IMAGES])
def test_pre_norm_models_have_two_stages(name):
    model = build(name, torch.float32)
    batch = random_batch(model, batch=1, n=6)
    for options in ({"stage": "N_Enc"}, {"stage": "N_ResLN"}, {"maps": ["mix_N_Enc"]}):
        with pytest.raises(ValueError, match="normalises before it; its stages are N, N_Res"):
            GlobEnc(model)(**batch, **options)
    assert torch.equal(GlobEnc(model)(**batch).scores, GlobEnc(model)(**batch, stage="N_Res").scores)


@pytest.mark.parametrize("side", ["right", "left"])
def test_default_target(side):
    first, last = ([0, 0], [8, 4]) if side == "right" else ([0, 4], [8, 8])
    for name, rows in (("bert", first), ("llama", last)):
        model = build(name)
        batch = random_batch(model, batch=2, n=9, pads=[0, 4], side=side)
        targets = torch.tensor(rows)[:, None]
        assert torch.equal(GlobEnc(model)(**batch).scores, GlobEnc(model)(**batch, targets=targets).scores)


@pytest.mark.parametrize("stage", ["N", "N_Res", "N_ResLN", "N_Enc"])
def test_row_mode_agrees_with_full_mode(stage):
    model = build("bert")
    batch = random_batch(model, batch=2, n=9, pads=[0, 3])
    rows = GlobEnc(model)(**batch, stage=stage, targets=torch.tensor([[0, 8], [5, 2]]), layers=True)
    full = GlobEnc(model)(
        **batch, stage=stage, targets=torch.tensor([[0, 8], [5, 2]]), layers=True, maps=["rollout", stage]
    )
    torch.testing.assert_close(rows.layer_scores, full.layer_scores, rtol=1e-11, atol=0)
    exact = full.maps["rollout"].gather(1, torch.tensor([[0, 8], [5, 2]])[..., None].expand(-1, -1, 9))
    torch.testing.assert_close(rows.scores * rows.log_scale.exp()[..., None], exact, rtol=1e-11, atol=0)
    torch.testing.assert_close(
        published_rollout(full.maps[stage])[:, -1], full.maps["rollout"], rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_padded_batch_equals_each_example_alone(name, side):
    model = build(name)
    pads = [0, 6, 10]
    batch = random_batch(model, batch=3, n=12, pads=pads, side=side)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    if name == "distilbert" and side == "left":
        pytest.skip("DistilBERT takes no position ids, so left padding moves its tokens")
    if name == "distilbert":
        del batch["position_ids"]
    first = [0 if side == "right" else count for count in pads]
    together = GlobEnc(model)(**batch, targets=torch.tensor(first)[:, None], layers=True)
    for b, count in enumerate(pads):
        real = slice(first[b], first[b] + 12 - count)
        alone = GlobEnc(model)(input_ids=batch["input_ids"][b : b + 1, real], layers=True)
        torch.testing.assert_close(
            together.layer_scores[b : b + 1, ..., real], alone.layer_scores, rtol=1e-9, atol=0
        )
        torch.testing.assert_close(
            together.layer_log_scale[b : b + 1], alone.layer_log_scale, rtol=1e-9, atol=1e-12
        )
        padding = batch["attention_mask"][b] == 0
        assert not together.layer_scores[b, ..., padding].any()


@pytest.mark.parametrize("depth", [24, 48])
def test_deep_models_do_not_overflow(depth):
    model = build("bert", torch.float32, num_hidden_layers=depth)
    for name, parameter in model.named_parameters():
        # row sums of the norms grow with the LayerNorm weights
        if "output.LayerNorm.weight" in name:
            parameter.data *= 12
    batch = random_batch(model, batch=1, n=10)
    result = GlobEnc(model)(**batch, layers=True, maps=["rollout"])
    exact = GlobEnc(model, dtype=torch.float64)(**batch, layers=True, maps=["rollout"])
    assert result.log_scale.item() > 89, "exp of this overflows float32, as the plain product would"
    assert torch.isfinite(result.maps["rollout"]).all()
    torch.testing.assert_close(result.maps["rollout"], exact.maps["rollout"], rtol=1e-3, atol=0)
    torch.testing.assert_close(result.layer_scores.double(), exact.layer_scores, rtol=1e-3, atol=1e-6)


def test_one_token():
    model = build("bert")
    batch = {"input_ids": torch.tensor([[7]])}
    result = GlobEnc(model)(**batch, maps=MAPS)
    assert result.scores.item() == 1
    assert result.maps["mix_N_Enc"].abs().max() < 1e-14
    torch.testing.assert_close(
        result.maps["N_Enc"], published_maps(model, batch)["N_Enc"], rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "deberta-v3", "modernbert", "mistral", "gemma2", "dinov2"])
def test_half_precision_model(name, half):
    model = build(name, half)
    batch = random_batch(model, batch=2, n=9, pads=[0, 2])
    result = GlobEnc(model)(**batch)
    assert result.scores.dtype == torch.float32
    # the same rounded activations, attributed in float64
    exact = GlobEnc(model, dtype=torch.float64)(**batch)
    torch.testing.assert_close(result.scores.double(), exact.scores, rtol=1e-4, atol=1e-5)


def test_float64_arithmetic_on_a_float32_model():
    model = build("bert", torch.float32)
    batch = random_batch(model, batch=1, n=9)
    result = GlobEnc(model, dtype=torch.float64)(**batch)
    assert result.scores.dtype == torch.float64
    torch.testing.assert_close(result.scores, GlobEnc(model.double())(**batch).scores, rtol=1e-4, atol=1e-6)


class TestBadInput:
    model = build("bert")
    batch = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }

    def fails(self, message, error=ValueError, model=None, batch=None, init=None, **call):
        with pytest.raises(error, match=message):
            GlobEnc(model or self.model, **(init or {}))(**(self.batch if batch is None else batch), **call)

    def test_options(self):
        self.fails("stage must be one of", stage="N_Attn")
        self.fails("maps must be a sequence", maps=["N_Enc", "nothing"])
        self.fails("maps must be a sequence", maps="N_Enc")
        self.fails("backend must be one of auto", init=dict(backend="gpu"))
        self.fails("dtype must be None", init=dict(dtype=torch.float16))

    def test_targets(self):
        self.fails(r"targets must lie in \[0, 3\)", targets=[3])
        self.fails(r"targets must lie in \[0, 3\)", targets=[-1])
        self.fails("a target is a padding token", targets=[2])
        self.fails("targets must be integers", TypeError, targets=[0.5])
        self.fails(r"targets must be T positions", targets=torch.zeros(3, 1, dtype=torch.long))
        self.fails(r"targets must be T positions", targets=[])

    def test_inputs(self):
        self.fails("neither input_ids nor inputs_embeds", batch={})
        self.fails(
            "at least one example and one token", batch={"input_ids": torch.zeros(1, 0, dtype=torch.long)}
        )
        self.fails("must be a tensor", TypeError, batch={"input_ids": [[1, 2]]})
        self.fails(
            "41 tokens and the model takes 40", batch={"input_ids": torch.ones(1, 41, dtype=torch.long)}
        )
        self.fails("attention_mask must be", batch=self.batch | {"attention_mask": torch.ones(2, 4)})
        self.fails(
            "no real token", batch=self.batch | {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}
        )
        # the mask that is added to scores, 0 where this one is 1
        self.fails(
            "must hold 0 and 1 alone",
            batch=self.batch | {"attention_mask": torch.tensor([[0, 0, -1e9], [0, -1e9, 0]])},
        )
        self.fails("got list", batch=self.batch | {"attention_mask": [[1, 1, 1], [1, 1, 0]]})
        self.fails(r"input_ids must be \(B, n\)", batch={"input_ids": torch.ones(1, 2, 3, dtype=torch.long)})
        self.fails(r"inputs_embeds must be \(B, n, d\)", batch={"inputs_embeds": torch.ones(2, 48)})
        self.fails("int64 or int32, got torch.float32", TypeError, batch={"input_ids": torch.ones(1, 3)})
        self.fails(
            r"input_ids must lie in \[0, 97\), got 5 to 97", batch={"input_ids": torch.tensor([[5, 97]])}
        )
        self.fails("takes no start_layer or target", TypeError, target=1, start_layer=0)

    def test_a_model_that_returns_tuples(self):
        expected = GlobEnc(self.model)(**self.batch).scores
        assert torch.equal(GlobEnc(build("bert", return_dict=False))(**self.batch).scores, expected)

    def test_a_model_made_in_inference_mode(self):
        with torch.inference_mode():
            model = build("bert")
        self.fails("made in torch.inference_mode", model=model)

    def test_roberta_positions_start_after_padding(self):
        model = build("roberta")
        GlobEnc(model)(input_ids=torch.full((1, 38), 7))
        self.fails(
            "39 tokens and the model takes 38", model=model, batch={"input_ids": torch.full((1, 39), 7)}
        )

    def test_training_mode(self):
        self.fails("training mode", model=build("bert").train())

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_not_finite(self, value):
        model = build("bert")
        model.encoder.layer[1].output.dense.weight.data[3, 4] = value
        self.fails(r"parameter encoder.layer.1.output.dense.weight holds NaN or infinity", model=model)

    def test_activations_not_finite(self):
        model = build("bert", torch.float32)
        model.encoder.layer[0].attention.self.value.weight.data *= 1e38
        self.fails("not finite", model=model)

    def test_not_a_transformers_model(self):
        self.fails("PreTrainedModel", TypeError, model=torch.nn.Linear(2, 2))
