"""Information flow equals the papers' equations on stored attention probabilities, and FlashTrace's code."""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location

import pytest
import torch
from allocations import measure_allocations
from attention_parts import parts
from command_line import words
from models import ARCHITECTURES, CAUSAL, EACH, IMAGES, PRE_NORM, build, random_batch
from published import Float64Throughout
from sweeps import sweep
from tiny import tokenizer
from transformers import AutoTokenizer

import pyglobenc
from pyglobenc import InformationFlow
from pyglobenc.cli.main import main

ALL = [*ARCHITECTURES, *PRE_NORM, *IMAGES]


def l1(t: torch.Tensor) -> torch.Tensor:
    return t.abs().sum(-1)


def direct(model, batch, spans, weights=None):
    """Scores of one pass (B, n) by the equations, for a span (start, stop) of each example."""
    rows = []
    for b, (start, stop) in enumerate(spans):
        u = torch.full((stop - start,), 1 / (stop - start)) if weights is None else weights[b]
        score = 0
        for _, x, z, vectors in parts(model, {k: t[b : b + 1] for k, t in batch.items()}):
            y, kept = (torch.einsum("i,id->d", u.to(t.dtype), t[0, start:stop]) for t in (z, x))
            added = torch.einsum("i,hijd->hjd", u.to(x.dtype), vectors[0, :, start:stop])
            prox = (l1(y) - l1(y - added)).clamp(min=0)
            score = score + prox.sum(0) / (prox.sum() + (l1(y) - l1(y - kept)).clamp(min=0))
        rows.append(score)
    return torch.stack(rows)


def assert_equal(out: torch.Tensor, exact: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert (out - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.fixture
def float64_throughout():
    with Float64Throughout():
        yield


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("name", sweep(ALL, EACH))
def test_every_architecture_equals_the_equations(name):
    model = build(name)
    for side in ("right",) if name in IMAGES else ("right", "left"):
        batch = random_batch(model, batch=3, n=11, pads=[0, 4, 7], side=side)
        spans = [(3, 6), (4, 7), (1, 2)] if side == "right" else [(2, 6), (4, 5), (8, 11)]
        result = InformationFlow(model)(**batch, target_span=spans)
        assert_equal(result.scores, direct(model, batch, spans))
        sums = result.layer_scores.sum(2) + result.residual
        assert_equal(sums, torch.ones_like(sums))
        assert_equal(result.head_scores.sum((1, 2)), result.scores.sum(1))


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_hops_equal_the_equations(name):
    model = build(name)
    batch = random_batch(model, batch=2, n=12, pads=[0, 1])
    target, reasoning = [(9, 11), (8, 10)], [(5, 9), (4, 8)]
    result = InformationFlow(model)(**batch, target_span=target, reasoning_span=reasoning, hops=3)
    passes, weights = [direct(model, batch, target)], None
    for _ in range(3):
        weights = [row[slice(*span)] for row, span in zip(passes[-1], reasoning, strict=True)]
        passes.append(direct(model, batch, reasoning, [w / w.sum() for w in weights]))
    assert_equal(result.pass_scores, torch.stack(passes, 1))
    for b, (begin, end) in enumerate(reasoning):
        ratio, expected = 1.0, torch.zeros(12).double()
        for index, one in enumerate(passes):
            expected += ratio * one[b]
            ratio *= one[b, begin:end].sum() / one[b].sum()
            assert abs(result.ratios[b, index] - ratio) <= 1e-9
        expected[begin:] = 0
        expected[slice(*target[b])] = 0
        assert_equal(result.scores[b], expected)
    again = InformationFlow(model)(**batch, target_span=reasoning, hops=1)
    named = InformationFlow(model)(**batch, target_span=reasoning, reasoning_span=reasoning)
    assert torch.equal(again.scores, named.scores) and again.ratios.shape == (2, 2)


def flashtrace():
    """The module flashtrace.core, without the package's own imports of what its other modules need."""
    package = find_spec("flashtrace")
    if package is None:
        pytest.skip("the package flashtrace isn't installed")
    spec = spec_from_file_location("flashtrace_core", f"{package.submodule_search_locations[0]}/core.py")
    core = sys.modules[spec.name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(core)
    finally:
        del sys.modules[spec.name]
    return core


def published(model, batch, span, thinking=None, hops=0):
    """Scores of FlashTrace's own code as its paper defines them, on float32 models; inclusive spans."""
    core = flashtrace()
    metadata = core.extract_model_metadata(model)
    cache, hooks = core.attach_hooks(metadata.layers, torch.float32)
    with torch.no_grad():
        model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    sizes = (metadata.n_layers, metadata.n_heads_q, metadata.n_kv_heads, metadata.head_dim)
    n = batch["input_ids"].shape[1]
    params = core.IFRParameters(*sizes, metadata.group_size, metadata.d_model, n, torch.float32, 128, 32)
    given = dict(
        cache=cache,
        attentions=None,
        weight_pack=core.build_weight_pack(metadata, torch.float32),
        params=params,
        rotary_emb=metadata.rotary_emb,
    )
    if hops:
        return core.compute_multi_hop_ifr(*span, thinking, hops, **given).observation["sum"]
    return core.compute_ifr_sentence_aggregate(*span, **given).token_importance_total


def test_equals_flashtrace():
    model = build("llama", torch.float32)
    batch = random_batch(model, batch=1, n=16)
    flow = InformationFlow(model)
    one = flow(**batch, target_span=(12, 15)).scores[0]
    assert_equal(one, published(model, batch, (12, 14)), 1e-5)
    hops = flow(**batch, target_span=(12, 15), reasoning_span=(6, 12), hops=2).scores[0]
    assert_equal(hops, published(model, batch, (12, 14), (6, 11), 2), 1e-5)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("name", ["llama", "bert", "bert-classifier", "modernbert"])
def test_default_and_mean_targets(name):
    model = build(name)
    batch = random_batch(model, batch=2, n=9, pads=[0, 3])
    flow = InformationFlow(model)
    last = name in CAUSAL
    default = flow(**batch)
    assert default.targets.tolist() == ([8, 5] if last else [0, 0])
    spans = [[8, 9], [5, 6]] if last else [[0, 1], [0, 1]]
    assert torch.equal(default.scores, flow(**batch, target_span=torch.tensor(spans)).scores)
    assert_equal(flow(**batch, target_span="mean").scores, direct(model, batch, [(0, 9), (0, 6)]))


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "roberta"])
def test_a_padded_example_gets_what_it_gets_alone(name):
    model = build(name)
    batch = random_batch(model, batch=2, n=12, pads=[0, 5])
    flow, call = InformationFlow(model), dict(target_span=(5, 7), reasoning_span=(2, 5), hops=2)
    both = flow(**batch, **call)
    alone = flow(input_ids=batch["input_ids"][1:, :7], **call)
    assert_equal(both.scores[1, :7], alone.scores[0])
    assert (both.scores[1, 7:] == 0).all() and (both.pass_scores[1, :, 7:] == 0).all()


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
def test_backends_and_dtypes():
    exact = build("qwen2")
    batch = random_batch(exact, batch=2, n=11, pads=[0, 2])
    scores = InformationFlow(exact)(**batch, target_span=(4, 8)).scores
    for dtype, backend in ((torch.float32, "cpu"), (torch.float32, "reference"), (torch.bfloat16, "auto")):
        out = InformationFlow(build("qwen2", dtype), backend=backend)(**batch, target_span=(4, 8)).scores
        assert out.dtype == torch.float32
        assert_equal(out.double(), scores, 1e-5 if dtype == torch.float32 else 0.2)
    single = build("qwen2", torch.float32)
    assert InformationFlow(single, dtype=torch.float64)(**batch).scores.dtype == torch.float64


def test_refusals_leave_the_model_as_it_was():
    model = build("llama")
    batch = random_batch(model, batch=2, n=9, pads=[0, 3])
    flow = InformationFlow(model)
    for arguments, message in (
        (dict(target_span=(3, 3)), "start < stop"),
        (dict(target_span=(-1, 3)), "0 <= start"),
        (dict(target_span=(3, 10)), "stop <= 9"),
        (dict(target_span=(4, 7)), "target_span holds a padding token"),
        (dict(target_span=(0, 2), reasoning_span=(4, 7)), "reasoning_span holds a padding token"),
        (dict(target_span=[(1, 2)] * 3), "B=2"),
        (dict(target_span=(0.5, 2)), "must hold integers"),
        (dict(target_span="all"), "'mean'"),
        (dict(target_span={1}), r"\(start, stop\)"),
        (dict(target_span="mean", hops=1), "hops need a reasoning_span"),
        (dict(hops=-1), "hops must be at least 0"),
        (dict(hops=1.5), "hops must be an integer"),
        (dict(output_span=(0, 1)), "output_span"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            flow(**batch, **arguments)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    flow(**batch)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_no_array_is_quadratic():
    n, tile = 8192, 1 << 18
    model = build("llama", torch.float32, num_hidden_layers=2, max_position_embeddings=n)
    batch = random_batch(model, batch=1, n=n)
    flow, call = InformationFlow(model), dict(target_span=(n - 64, n), reasoning_span=(n - 600, n - 64))
    flow(**batch, **call)
    with torch.no_grad():
        forward = measure_allocations(lambda: model(**batch))
    used = measure_allocations(lambda: flow(**batch, **call))
    # a tile of 16 queries with all keys and heads, and the logits
    assert used.largest <= 4 * max(tile, 4 * 16 * n, n * 97)
    assert used.largest < n * n / 2 and used.peak <= forward.peak + 4 * n * (2 * 6 * 48) + 16 * tile


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_command_line(name, tmp_path):
    model = build(name, torch.float32)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "a.json"
    options = "explain --model {} {} --method information-flow --target 2 --json {} --quiet"
    assert main(words(options, tmp_path / "model", "deep good film", out)) == 0
    found = pyglobenc.load(out)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "model")("deep good film").input_ids])
    exact = InformationFlow(model)(input_ids=ids, target_span=(2, 3)).scores[0]
    assert found.target == 2
    torch.testing.assert_close(torch.as_tensor(found.scores), exact)


def test_several_tokens_from_one_forward_pass():
    model = build("gemma2")
    batch = random_batch(model, batch=2, n=9, pads=[0, 2])
    # More tokens than the features of a head, which are computed at a time.
    flow, positions = InformationFlow(model), torch.tensor([[3, 8] * 7, [6, 2] * 7])
    runs = []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    several = flow.each(**batch, targets=positions)
    handle.remove()
    assert len(runs) == 1
    for t, result in enumerate(several):
        one = flow(**batch, target_span=torch.stack([positions[:, t], positions[:, t] + 1], 1))
        assert torch.equal(result.targets, positions[:, t])
        for name in ("scores", "pass_scores", "ratios", "layer_scores", "residual", "head_scores"):
            assert_equal(getattr(result, name), getattr(one, name))


FLOW = dict(method="information-flow", progress=False)


def test_explain_takes_spans():
    model, tok = build("llama", torch.float32), tokenizer()
    texts = ["the good film is a deep one", "a film that is good and deep"]
    spans = dict(target_span=(4, 6), reasoning_span=(1, 4), hops=2)
    for text, a in zip(texts, pyglobenc.explain(model, tok, texts, **FLOW, **spans), strict=True):
        exact = InformationFlow(model)(input_ids=torch.tensor([tok(text).input_ids]), **spans)
        torch.testing.assert_close(torch.as_tensor(a.scores), exact.scores[0])
        assert a.target_name == "tokens 4:6" and a.target_kind == "mean"
        assert {name: a.settings[name] for name in spans} == {
            "target_span": "4:6",
            "reasoning_span": "1:4",
            "hops": 2,
        }
    # A position may be the target of hops.
    a = pyglobenc.explain(model, tok, texts[0], **FLOW, target=5, reasoning_span=(1, 4))
    ids = torch.tensor([a.token_ids])
    exact = InformationFlow(model)(input_ids=ids, target_span=(5, 6), reasoning_span=(1, 4))
    torch.testing.assert_close(torch.as_tensor(a.scores), exact.scores[0])
    assert a.target == 5 and a.target_kind == "token"


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            dict(target_span=(1, 99)),
            ValueError,
            "target_span must lie within the .* tokens of text, got 1:99",
        ),
        (dict(reasoning_span=(3, 3)), ValueError, "reasoning_span must have 0 <= start < stop"),
        (dict(target_span=(-2, 3)), ValueError, "target_span must have 0 <= start < stop"),
        (dict(target_span=5), TypeError, "target_span must be two integers"),
        (dict(target_span=(1, True)), TypeError, "target_span must be two integers"),
        (dict(hops=-1), ValueError, "hops must be at least 0"),
        (dict(hops=1.5), TypeError, "hops must be an integer"),
        (dict(target=1, target_span=(1, 2)), ValueError, "target and target_span exclude each other"),
        (dict(target_span=(1, 2), long="windows"), ValueError, "target_span with long='windows'"),
        (dict(method="globenc", target_span=(1, 2)), ValueError, "target_span belongs to information-flow"),
        (dict(method="saliency", hops=0), ValueError, "hops belongs to information-flow; saliency has none"),
    ],
)
def test_explain_refuses_spans(options, error, message):
    with pytest.raises(error, match=message):
        pyglobenc.explain(build("llama", torch.float32), tokenizer(), "the good film", **FLOW | options)


def test_spans_on_the_command_line(tmp_path, capsys):
    build("llama", torch.float32).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    out, text = tmp_path / "a.json", "the good film is a deep one"
    line = "explain --model {} {} --method information-flow --json {} --quiet"
    command = words(line, tmp_path / "model", text, out)
    spans = ["--target-span", "4:6", "--reasoning-span", "1:4", "--hops", "2"]
    assert main([*command, *spans]) == 0
    model = build("llama", torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "model")(text).input_ids])
    exact = InformationFlow(model)(input_ids=ids, target_span=(4, 6), reasoning_span=(1, 4), hops=2)
    torch.testing.assert_close(torch.as_tensor(pyglobenc.load(out).scores), exact.scores[0])
    for wrong, message in (
        (["--target-span", "4"], "invalid span of positions, such as 10:20 value: '4'"),
        (["--target-span", "6:4"], "target_span must have 0 <= start < stop"),
        (["--hops", "1", "--method", "alti"], "hops belongs to information-flow; alti has none"),
        (["--hops", "1", "--generate", "3"], "--hops doesn't go with --generate"),
        (["--hops", "1", "--image", "a.png"], "--hops"),
    ):
        try:
            status = main([*command[:3], *([] if "--image" in wrong else [text]), *command[4:-3], *wrong])
        except SystemExit as stopped:
            status = stopped.code
        assert status != 0 and message in capsys.readouterr().err, wrong
