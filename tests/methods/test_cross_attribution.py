"""Attribution through cross attention equals the paper's equations on stored attention probabilities."""

import pytest
import torch
from allocations import measure_allocations
from published import Float64Throughout
from sweeps import slow, sweep
from two_streams import (
    ALL,
    CLASSIFIERS,
    build,
    clip,
    co_attention,
    encoder_decoder,
    lxmert,
    maps,
    objects,
    sources,
    targets,
)

from pyglobenc.hf.streams.capture import AttentionTrace
from pyglobenc.hf.trace.attention import RECORDERS
from pyglobenc.methods.cross.attribution import CrossAttribution
from pyglobenc.methods.cross.encoder_decoder import AttentionMap, encoder_decoder_rows
from pyglobenc.methods.precision.reliability import NoRelevanceWarning
from pyglobenc.ops import attention


def assert_equal(out: torch.Tensor, exact: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert out.shape == exact.shape
    assert (out - exact).abs().max() <= tolerance * exact.abs().max()


def eager(model, batch: dict):
    """Return the output of a model that stores its attention probabilities."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model(**batch, output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation(before)


def direct(model, batch: dict, target: int, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows at position (B,) of both relevances, (B, n) and (B, m)."""
    out = eager(model, batch)
    rows = torch.arange(len(position))
    value = out.logits[:, target] if out.logits.dim() == 2 else out.logits[rows, position, target]
    attentions = (out.encoder_attentions, out.decoder_attentions, out.cross_attentions)
    found = maps(value, [one for stream in attentions for one in stream])
    ends = [len(stream) for stream in attentions]
    r_tt, r_ts = encoder_decoder(
        found[: ends[0]], found[ends[0] : ends[0] + ends[1]], found[ends[0] + ends[1] :]
    )
    return r_tt[rows, position], r_ts[rows, position]


# The others share the modules of one of these, or pair other stacks.
EACH = ("bart", "marian", "mbart", "pegasus", "blenderbot", "m2m_100", "t5", "umt5", "bart-classifier")
EACH += ("t5-classifier", "vit-gpt2", "deit-bert", "dinov2-roberta")


@pytest.mark.parametrize("name", sweep(ALL, EACH))
def test_every_architecture_equals_the_equations(name):
    model = build(name)
    batch = sources(model, 3) | ({} if name in CLASSIFIERS else targets(3))
    with Float64Throughout():
        explain = CrossAttribution(model)
        result = explain(**batch, target=1)
        expected = direct(model, batch, 1, result.position)
        assert (expected[1].amax(1) > 0).all()
        assert_equal(result.scores, expected[0])
        assert_equal(result.source_scores, expected[1])
        assert (result.target == 1).all() and not result.nothing.any()
        if name not in CLASSIFIERS:
            assert result.position.tolist() == [3, 5, 4]
            earlier = explain(**batch, target=7, position=[2, 3, 1])
            expected = direct(model, batch, 7, torch.tensor([2, 3, 1]))
            assert_equal(earlier.scores, expected[0])
            assert_equal(earlier.source_scores, expected[1])
            assert (earlier.scores[0, 3:] == 0).all()
        # Each example gets what it gets alone, without padding.
        for row in range(3):
            alone = {key: value[row : row + 1] for key, value in batch.items()}
            for ids, mask in (
                ("input_ids", "attention_mask"),
                ("decoder_input_ids", "decoder_attention_mask"),
            ):
                if mask in alone:
                    end = int(alone.pop(mask).sum())
                    alone[ids] = alone[ids][:, :end]
            one = explain(**alone, target=1)
            n, m = one.scores.shape[1], one.source_scores.shape[1]
            assert_equal(result.scores[row, :n], one.scores[0])
            assert_equal(result.source_scores[row, :m], one.source_scores[0])
            assert (result.source_scores[row, m:] == 0).all() and (result.scores[row, n:] == 0).all()


def test_clip_equals_the_equations():
    model = clip()
    batch = sources(model, 3)
    batch["input_ids"][batch["input_ids"] == 2] = 96
    pixels = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    with Float64Throughout():
        result = CrossAttribution(model)(**batch, pixel_values=pixels)
        out = eager(model, batch | dict(pixel_values=pixels))
        value = out.logits_per_image.diagonal()
        assert_equal(result.logit, value.detach())
        streams = (out.text_model_output.attentions, out.vision_model_output.attentions)
        found = maps(value, [one for stream in streams for one in stream])
        ends = (batch["attention_mask"].sum(1) - 1, torch.zeros(3, dtype=torch.long))
        assert torch.equal(result.position, ends[0]) and result.target is None
        for scores, layers, at in zip(
            (result.scores, result.source_scores), (found[:3], found[3:]), ends, strict=True
        ):
            r = torch.eye(scores.shape[1], dtype=torch.float64)
            for a in layers:
                r = r + a @ r
            assert_equal(scores, r[torch.arange(3), at])
        alone = CrossAttribution(model)(input_ids=batch["input_ids"][2:, :4], pixel_values=pixels[2:])
        assert_equal(result.scores[2, :4], alone.scores[0])
        assert_equal(result.source_scores[2], alone.source_scores[0])


def lxmert_direct(model, batch: dict, target: int) -> list[torch.Tensor]:
    """Return the first text token's rows of both relevances, (B, n) and (B, m)."""
    probabilities, handles, encoder = [], [], model.lxmert.encoder
    for module in model.modules():
        if type(module).__name__ == "LxmertAttention":
            # The dropout receives the probabilities.
            keep = module.dropout.register_forward_pre_hook(
                lambda module, args: probabilities.append(args[0])
            )
            handles.append(keep)
    value = model(**batch).question_answering_score[:, target].sum()
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(value, probabilities, allow_unused=True)
    found = [
        (alpha * (torch.zeros_like(alpha) if gradient is None else gradient)).clamp(min=0).mean(1).detach()
        for alpha, gradient in zip(probabilities, gradients, strict=True)
    ]
    first, second = len(encoder.layer), len(encoder.layer) + len(encoder.r_layers)
    layers = [(found[at : at + 2], found[at + 2 : at + 4]) for at in range(second, len(found), 4)]
    return [one[:, 0] for one in co_attention([found[:first], found[first:second]], layers)[0]]


@pytest.mark.parametrize("x_layers", [1, 2, 4])
def test_lxmert_equals_the_equations(x_layers):
    model = lxmert(x_layers=x_layers)
    batch = sources(model, 3) | objects(model, 3)
    explain = CrossAttribution(model)
    result = explain(**batch, target=1)
    expected = lxmert_direct(model, batch, 1)
    for scores, exact in zip((result.scores, result.source_scores), expected, strict=True):
        assert (exact.amax(1) > 0).all()
        assert_equal(scores, exact)
    assert (result.position == 0).all() and (result.target == 1).all()
    alone = {name: value[1:2] for name, value in batch.items() if "mask" not in name}
    alone["input_ids"] = alone["input_ids"][:, :6]
    alone |= {name: alone[name][:, :3] for name in ("visual_feats", "visual_pos")}
    one = explain(**alone, target=1)
    assert_equal(result.scores[1, :6], one.scores[0])
    assert_equal(result.source_scores[1, :3], one.source_scores[0])
    for name in ("visual_feats", "visual_pos"):
        with pytest.raises(ValueError, match=f"no {name}"):
            explain(**{key: value for key, value in batch.items() if key != name})
    # The image's attention to the text is followed too.
    handle = model.lxmert.encoder.x_layers[0].visual_attention.output.dense.register_forward_pre_hook(
        lambda module, args: (args[0].flip(1),)
    )
    with pytest.raises(ValueError, match="is not what the rules assume"):
        explain(**batch)
    handle.remove()


@pytest.mark.parametrize("name", ["bart", "t5", "vit-gpt2"])
def test_several_tokens_of_an_answer(name):
    model = build(name)
    batch = sources(model, 2)
    ids = targets(2, pads=(0, 0))["decoder_input_ids"]
    explain = CrossAttribution(model)
    positions = torch.arange(ids.shape[1] - 1).expand(2, -1)
    every = explain(**batch, decoder_input_ids=ids, position=positions, target=ids[:, 1:])
    assert torch.equal(every.target, ids[:, 1:]) and torch.equal(every.position, positions)
    assert not every.output.logits.requires_grad
    for position in range(ids.shape[1] - 1):
        # A shorter answer ends at the token's position, and gives the same.
        end = position + 1
        alone = explain(**batch, decoder_input_ids=ids[:, :end], target=ids[:, end])
        assert_equal(every.scores[:, position, :end], alone.scores)
        assert (every.scores[:, position, end:] == 0).all()
        assert_equal(every.source_scores[:, position], alone.source_scores)
        assert_equal(every.logit[:, position], alone.logit)


@pytest.mark.parametrize("name", ["bart", "t5", "vit-gpt2"])
def test_the_first_generated_token_is_the_default(name):
    # Generation reads the number of the decoder's layers from the config's encoder.
    depths = {"bart": dict(encoder_layers=3), "t5": dict(num_layers=3)}
    model = build(name, **depths.get(name, {}))
    batch = sources(model, 2)
    result = CrossAttribution(model)(**batch)
    start = model.config.decoder_start_token_id
    given = CrossAttribution(model)(**batch, decoder_input_ids=torch.full((2, 1), start))
    assert torch.equal(result.source_scores, given.source_scores) and result.scores.shape == (2, 1)
    generated = model.generate(**batch, max_new_tokens=2, do_sample=False)
    assert torch.equal(result.target, generated[:, 1])


def test_a_contrast_is_the_difference_of_two_logits():
    model = build("bart")
    batch = sources(model, 1) | targets(1, pads=(0,))
    result = CrossAttribution(model)(**batch, target=7, contrast=9)
    logits = result.output.logits[0, 5]
    assert_equal(result.logit, (logits[7] - logits[9])[None])
    assert not torch.allclose(result.source_scores, CrossAttribution(model)(**batch, target=7).source_scores)


def assert_untouched(model, before: dict, hooks: int) -> None:
    modules = list(model.modules())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules) == hooks
    assert not any(module in RECORDERS for module in modules)
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert all(p.grad is None for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("name", ["bart", "t5", "vit-gpt2", "clip", "lxmert"])
def test_the_model_is_left_as_it_was(name):
    model = {"clip": clip, "lxmert": lxmert}[name]() if name in ("clip", "lxmert") else build(name)
    batch = sources(model, 2) | (objects(model, 2) if name == "lxmert" else {})
    if name == "clip":
        batch["pixel_values"] = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    explain = CrossAttribution(model)
    expected = explain(**batch)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.inference_mode():
        frozen = explain(**batch)
    assert_equal(frozen.source_scores, expected.source_scores)
    assert_untouched(model, flags, 0)
    last = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm) or "Norm" in type(m).__name__][-1]

    def fail(module, args):
        raise RuntimeError("broken")

    handle = last.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        explain(**batch)
    handle.remove()
    assert_untouched(model, flags, 0)
    with pytest.raises((TypeError, ValueError)):
        explain(**batch, target=1000)
    assert_untouched(model, flags, 0)


def modules_of(model) -> dict[str, torch.nn.Module]:
    layer = model.model.decoder.layers[1]
    return {
        "the cross attention's output": layer.encoder_attn.out_proj,
        "the self-attention's output": layer.self_attn.out_proj,
        "the encoder's sum": model.model.encoder.layers[1].self_attn.out_proj,
        "a layer's output": layer,
    }


@pytest.mark.parametrize("place", ["the cross attention's output", "the self-attention's output"])
def test_a_changed_residual_sum_is_refused(place):
    for name in ("bart", "mbart"):
        model = build(name)
        batch = sources(model, 2) | targets(2)
        hooked = modules_of(model)[place]
        handle = hooked.register_forward_hook(lambda module, args, output: output * 1.001)
        # A hook that was there before the capture is part of the module, and its output is what is added.
        CrossAttribution(model)(**batch)
        handle.remove()
        norm = model.model.decoder.layers[1].final_layer_norm
        norm = norm if name == "mbart" else model.model.decoder.layers[1].encoder_attn_layer_norm
        handle = norm.register_forward_pre_hook(lambda module, args: (args[0] * 1.001,))
        with pytest.raises(ValueError, match="capture: the input of .* is not what the rules assume"):
            CrossAttribution(model)(**batch)
        handle.remove()


def test_changes_between_layers_are_refused():
    model = build("t5")
    batch = sources(model, 2) | targets(2)
    for block in (model.decoder.block[1], model.encoder.block[1]):
        forward = block.forward

        def changed(hidden_states, *args, forward=forward, **kwargs):
            return forward(hidden_states.flip(1), *args, **kwargs)

        block.forward = changed
        with pytest.raises(ValueError, match="is not what the rules assume"):
            CrossAttribution(model)(**batch)
        del block.forward
    handle = model.encoder.final_layer_norm.register_forward_hook(lambda module, args, output: output.flip(1))
    with pytest.raises(ValueError, match="doesn't attend to the encoder's last output token by token"):
        CrossAttribution(model)(**batch)
    handle.remove()
    attention = model.decoder.block[1].layer[1].EncDecAttention
    attention.o.register_forward_pre_hook(lambda module, args: (args[0].flip(1),))
    with pytest.raises(ValueError, match="is not what the rules assume"):
        CrossAttribution(model)(**batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    exact_model = build("bart")
    batch = sources(exact_model, 2) | targets(2)
    exact = CrossAttribution(exact_model)(**batch, target=3)
    model = build("bart", dtype)
    result = CrossAttribution(model)(**batch, target=3)
    assert result.scores.dtype == result.source_scores.dtype == torch.float32
    assert CrossAttribution(model, dtype=torch.float64)(**batch).scores.dtype == torch.float64
    if dtype == torch.float32:
        for backend in ("cpu", "reference"):
            result = CrossAttribution(model, backend=backend)(**batch, target=3)
            # The passes of 5 layers, each of which divides by no small number, keep 4 of 7 digits.
            assert_equal(result.scores.double(), exact.scores, 1e-3)
            assert_equal(result.source_scores.double(), exact.source_scores, 1e-3)


def layer(n: int, m: int, dtype: torch.dtype, scale: float) -> tuple[AttentionTrace, torch.Tensor]:
    """Return a random attention, and a gradient of size `scale` of its output."""
    q, grad = (torch.randn(1, 2, n, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(1, 2, m, 8, dtype=torch.float64) for _ in range(2))
    o, lse = attention(q, k, v)
    tensors = (t.to(dtype) for t in (q, k, v, o, lse))
    return AttentionTrace(*tensors, None, 8**-0.5, (-1, -1), None, None), (grad * scale).to(dtype)


def test_small_gradients_keep_their_digits():
    # Sums of R - I are of size 1e-9. As differences of float32 numbers near 1 they would all be 0.
    made = [[layer(n, m, torch.float32, 1e-9) for _ in range(2)] for n, m in ((9, 9), (5, 5), (5, 9))]
    rows = []
    for dtype in (torch.float32, torch.float64):
        of = [[AttentionMap(one, grad, dtype, "reference") for one, grad in stream] for stream in made]
        rows.append(encoder_decoder_rows(*of, torch.eye(5, dtype=dtype)[None, 2:3])[1])
    # A float32 product of 9 terms keeps 5 digits, and a few follow one another.
    assert rows[1].max() > 1e-12
    assert_equal(rows[0].double(), rows[1], 1e-4)


def test_no_gradient_is_no_relevance():
    model = build("t5-classifier")
    torch.nn.init.zeros_(model.classification_head.dense.weight)
    batch = sources(model, 2)
    with pytest.raises(ValueError, match=r"the head reads \[0, 0\] tokens"):
        CrossAttribution(model)(**batch, target=1)
    model = build("bart")
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        for one in (layer.self_attn, getattr(layer, "encoder_attn", layer.self_attn)):
            torch.nn.init.zeros_(one.out_proj.weight)
    with pytest.warns(NoRelevanceWarning):
        result = CrossAttribution(model)(**batch, target=1)
    assert result.nothing.all() and (result.scores == 0).all() and (result.source_scores == 0).all()


def test_refusals():
    model = build("bart")
    batch = sources(model, 2) | targets(2)
    explain = CrossAttribution(model)
    for changes, message in (
        (dict(target=97), "target"),
        (dict(position=6), "position"),
        (dict(position=5), "position is a padding token"),
        (dict(decoder_input_ids=batch["decoder_input_ids"] + 90), "decoder_input_ids"),
        (dict(input_ids=batch["input_ids"].double()), "input_ids must be int64 or int32"),
        (dict(input_ids=batch["input_ids"][:1]), "attention_mask must be|decoder_input_ids must be"),
        (dict(attention_mask=batch["attention_mask"] * 0), "a real token in each example"),
        (dict(decoder_attention_mask=batch["attention_mask"]), "decoder_attention_mask must be"),
        (
            dict(input_ids=torch.randint(5, 97, (2, 50)), attention_mask=None),
            "has 50 tokens and the model takes 40",
        ),
        (dict(labels=batch["input_ids"]), "labels can't be honoured"),
        (dict(encoder_outputs=(batch["input_ids"],)), "takes no encoder_outputs"),
        (dict(past_key_values=()), "past_key_values can't be honoured"),
        (dict(pixel_values=torch.rand(2, 3, 12, 12)), "takes no pixel_values"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"CrossAttribution: .*({message})"):
            explain(**batch | changes)
    for other, message in (
        (model.train(), "training mode"),
        (build("bart").model.encoder, "has not both streams"),
        (torch.nn.Linear(2, 2), "must be a transformers"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            CrossAttribution(other)
    with pytest.raises(ValueError, match="unknown architecture of two streams 'bert'"):
        CrossAttribution(build("bert-bert").encoder)
    with pytest.raises(ValueError, match="backend must be one of"):
        CrossAttribution(model.eval(), backend="gpu")
    with pytest.raises(ValueError, match="no head to explain"):
        CrossAttribution(build("bart").model)(**batch)
    startless = build("t5")
    startless.config.decoder_start_token_id = startless.generation_config.decoder_start_token_id = None
    CrossAttribution(startless)(**batch)
    with pytest.raises(ValueError, match="no decoder_start_token_id; give decoder_input_ids"):
        CrossAttribution(startless)(**sources(startless, 2))
    image = clip()
    with pytest.raises(ValueError, match="it takes no target"):
        CrossAttribution(image)(**sources(image, 1), pixel_values=torch.rand(1, 3, 12, 12).double(), target=1)
    with pytest.raises(ValueError, match="no pixel_values"):
        CrossAttribution(image)(**sources(image, 1))
    with pytest.raises(ValueError, match="pixel_values must be|input_ids must be"):
        CrossAttribution(image)(**sources(image, 2), pixel_values=torch.rand(1, 3, 12, 12).double())


@pytest.mark.parametrize("name", ["bart", slow("t5")])
def test_no_array_is_quadratic(name):
    # Above 2,048 tokens a graph stores no probabilities.
    n, heads, tile = 2112, 4, 1 << 18
    model = build(name, torch.float32, **({} if name == "t5" else dict(max_position_embeddings=n)))
    ids = torch.randint(5, 97, (2, 1, n))
    explain = CrossAttribution(model)

    def run(length):
        explain(input_ids=ids[0, :, :length], decoder_input_ids=ids[1, :, :length])

    run(16)
    used = measure_allocations(lambda: run(n))
    if name == "bart":
        # The largest arrays are the logits, (n, 97), and a tile of 16 queries with all keys.
        assert used.largest <= 4 * max(tile, heads * 16 * n, n * 97)
    else:
        # T5 itself stores one bias (H, n, n) of its encoder, one of its decoder, and zeros for the cross
        # attention, whose bucket numbers are int64.
        assert used.peak < 2 * 4 * 3 * heads * n * n
