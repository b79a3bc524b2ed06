"""Gradient methods and occlusion against direct computations, one text and one copy at a time."""

from itertools import cycle, product

import numpy as np
import pytest
import torch
import transformers
from models import DECODER, build, random_batch, randomize
from sweeps import sweep
from tiny import classifier, tokenizer
from torch import nn

import pyglobenc
from pyglobenc.methods.gradients.attribution import GRADIENTS, STEPS, GradientAttribution
from pyglobenc.methods.precision.reliability import DIGITS_GONE, PrecisionWarning

TOKEN = 4
LANGUAGE = ("gpt2", "llama", "mistral", "qwen2", "qwen3-moe", "phi3", "gemma2", "gemma3")
CLASSIFIERS = (
    "bert-classifier",
    "roberta",
    "electra",
    "distilbert",
    "albert",
    "nomic-bert",
    "deberta-v3",
    "modernbert",
    "llama-classifier",
)
NAMES = [name for name in (*CLASSIFIERS, *LANGUAGE) if name != "qwen3-moe"]


def model_of(name):
    if name != "llama-classifier":
        return build(name)
    config = transformers.LlamaConfig(**DECODER)
    return randomize(transformers.LlamaForSequenceClassification(config)).double().eval()


def direct(model, batch, target=None, values=None):
    """Logit, its gradient and the first layer's input for one example, by transformers' own hidden states."""
    output = model(**batch, output_hidden_states=True)
    logits = output.logits[0, -1] if output.logits.dim() == 3 else output.logits[0]
    target = int(logits.argmax()) if target is None else target
    h = output.hidden_states[0]
    (grad,) = torch.autograd.grad(logits[target], h)
    return target, logits[target].detach(), h.detach()[0], grad[0]


def with_first_input(model, values, run):
    """What run() returns while the first layer gets `values` (n, d)."""
    from pyglobenc.hf import find_layers

    def hook(module, args, kwargs):
        nonlocal done
        if done:
            return None
        done = True
        if args:
            return (values[None].requires_grad_(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": values[None].requires_grad_()}

    done = False
    handle = find_layers(model)[0].block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        return run()
    finally:
        handle.remove()


def direct_scores(method, model, batch, special):
    target, logit, h, grad = direct(model, batch)
    if method == "gradient-x-input":
        return (grad * h).sum(-1)
    if method == "gradient-x-input-norm":
        return (grad * h).norm(dim=-1)
    if method == "saliency":
        return grad.norm(dim=-1)
    ids = batch["input_ids"]
    if method == "occlusion":
        scores = torch.zeros_like(h[:, 0])
        for i in (~special).nonzero()[:, 0]:
            changed = ids.clone()
            changed[0, i] = TOKEN
            scores[i] = logit - direct(model, {"input_ids": changed}, target)[1]
        return scores
    _, base_logit, base, _ = direct(model, {"input_ids": torch.where(special, ids, TOKEN)}, target)
    for steps in STEPS:
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        total = torch.zeros_like(h)
        for node, weight in zip(nodes, weights, strict=True):
            values = base + (1 + node) / 2 * (h - base)

            def run(values=values):
                output = model(**batch)
                logits = output.logits[0, -1] if output.logits.dim() == 3 else output.logits[0]
                return torch.autograd.grad(logits[target], values)[0]

            values.requires_grad_()
            total += weight / 2 * with_first_input(model, values, run)
        scores = (total * (h - base)).sum(-1)
        gap = abs(float(scores.sum() - (logit - base_logit))) / float(scores.abs().sum())
        if gap <= DIGITS_GONE:
            break
    return scores


@pytest.mark.parametrize(
    "name, method",
    sweep(
        product((*CLASSIFIERS, *LANGUAGE), GRADIENTS),
        [
            *product(("bert-classifier",), GRADIENTS),
            ("llama", "integrated-gradients"),
            *zip(NAMES, cycle(GRADIENTS), strict=False),
            # It takes all steps of the integral, for seconds.
            ("qwen3-moe", "occlusion"),
        ],
    ),
)
@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
def test_equals_direct_computation_in_a_padded_batch(name, method):
    model = model_of(name)
    batch = random_batch(model, batch=2, n=8, pads=[0, 3])
    special = torch.zeros(2, 8, dtype=torch.long)
    special[:, 0] = special[0, 7] = special[1, 4] = 1
    result = GradientAttribution(model, method)(**batch, replacement=TOKEN, special_tokens_mask=special)
    for b, n in enumerate((8, 5)):
        one = {"input_ids": batch["input_ids"][b : b + 1, :n]}
        exact = direct_scores(method, model, one, special[b, :n] == 1)
        assert float((result.scores[b, :n] - exact).abs().max()) <= 1e-9 * float(exact.abs().max())
        assert not result.scores[b, n:].any()
        assert int(result.target[b]) == direct(model, one)[0]
    if result.error is not None:
        assert (result.error <= DIGITS_GONE).all() or name == "qwen3-moe"


@pytest.mark.parametrize("method", GRADIENTS)
def test_images(method):
    model = build("vit")
    batch = random_batch(model, batch=2, n=0)
    scores = GradientAttribution(model, method)(**batch, target=1).scores
    assert scores.shape == (2, 9)
    pixels = batch["pixel_values"][1:]
    output = model(pixels, output_hidden_states=True)
    h = output.hidden_states[0]
    (grad,) = torch.autograd.grad(output.logits[0, 1], h)
    if method == "occlusion":
        changed = pixels.clone()
        changed[:, :, 4:8, 8:12] = 0  # the second row's third patch of 4 x 4 pixels
        exact = (output.logits - model(changed).logits)[0, 1].detach()
        assert float(scores[1, 5]) == pytest.approx(float(exact), rel=1e-9)
    elif method == "integrated-gradients":
        # The special token's part is missing from the sum: its input doesn't change.
        change = output.logits[0, 1] - model(torch.zeros_like(pixels)).logits[0, 1]
        assert float(scores[1].sum() - change.detach()) <= DIGITS_GONE * float(scores[1].abs().sum())
    else:
        product = grad if method == "saliency" else grad * h
        exact = product.sum(-1) if method == "gradient-x-input" else product.norm(dim=-1)
        torch.testing.assert_close(scores[1], exact.detach()[0, 1:], rtol=1e-9, atol=1e-12)


def test_occluding_padding_keeps_positions():
    """RoBERTa counts positions from its ids and skips the padding id, which replaces tokens here."""
    model = build("roberta")
    ids = random_batch(model, batch=1, n=6)["input_ids"]
    result = GradientAttribution(model, "occlusion")(input_ids=ids)
    changed, padding = ids.clone(), model.config.pad_token_id
    changed[0, 2] = padding
    positions = torch.arange(6)[None] + padding + 1
    with torch.no_grad():
        logits = model(input_ids=changed, position_ids=positions).logits
    fall = result.logit[0] - logits[0, result.target[0]]
    assert float(result.scores[0, 2]) == pytest.approx(float(fall), rel=1e-9)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_model_is_left_as_it_was(mode, frozen):
    model = build("bert-classifier", torch.float32).requires_grad_(not frozen)
    batch = random_batch(model, batch=2, n=6, pads=[0, 2])

    def state():
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        return hooks, [(p.requires_grad, p.grad, p._version) for p in model.parameters()]

    before = state()
    expected = GradientAttribution(model)(**batch).scores
    for method in GRADIENTS:
        with mode():
            result = GradientAttribution(model, method)(**{k: v.clone() for k, v in batch.items()})
        assert not result.scores.requires_grad and not result.output.logits.requires_grad
        assert method != "gradient-x-input" or torch.equal(result.scores, expected)
        assert state() == before
    handle = model.classifier.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        GradientAttribution(model)(**batch)
    handle.remove()
    assert state() == before


def test_the_callers_embeddings_are_left_as_they_were():
    model = build("llama")
    values = torch.randn(2, 5, 48, dtype=torch.float64)
    before = values.clone()
    GradientAttribution(model)(inputs_embeds=values)
    assert torch.equal(values, before) and not values.requires_grad


@pytest.mark.parametrize("method", GRADIENTS)
def test_float64_of_a_narrower_model(method):
    model = build("bert-classifier", torch.float32)
    batch = random_batch(model, batch=2, n=7)
    wide = GradientAttribution(model, method, torch.float64)(**batch).scores
    exact = GradientAttribution(model.double(), method)(**batch).scores
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, exact, rtol=1e-9, atol=1e-12)


def test_float64_that_modules_don_t_take_is_refused():
    model = build("gpt2", torch.float32)
    with pytest.raises(ValueError, match="can't run in float64 .* cast the model"):
        GradientAttribution(model, dtype=torch.float64)(**random_batch(model, batch=1, n=4))


def test_integrated_gradients_tell_how_far_they_miss():
    model = build("qwen3-moe")  # tokens change their experts on the way
    batch = random_batch(model, batch=2, n=10)
    with pytest.warns(PrecisionWarning, match="with 128 steps, .* miss the difference of the logits"):
        result = GradientAttribution(model, "integrated-gradients")(**batch)
    base = torch.full_like(batch["input_ids"], model.config.pad_token_id)
    with torch.no_grad():
        logits = model(input_ids=base).logits[:, -1].gather(1, result.target[:, None])[:, 0]
    gap = (result.scores.sum(1) - (result.logit - logits)).abs() / result.scores.abs().sum(1)
    torch.testing.assert_close(result.error, gap, rtol=1e-6, atol=1e-12)


class Headed(nn.Module):
    """A user's module with its own head; `how` tells what it does with gradients."""

    def __init__(self, how):
        super().__init__()
        self.encoder, self.head, self.how = build("bert"), randomize(nn.Linear(48, 3)).double(), how
        self.eval()

    def forward(self, input_ids, attention_mask=None):
        with torch.set_grad_enabled(self.how != "encoder without gradients"):
            top = self.encoder(input_ids, attention_mask).last_hidden_state
        if self.how == "twice":
            top = top + self.encoder(input_ids.flip(1)).last_hidden_state
        with torch.set_grad_enabled(self.how != "head without gradients"):
            return self.head(top[:, 0])


def test_a_user_s_module():
    batch = {"input_ids": torch.randint(5, 97, (2, 6))}
    expected = GradientAttribution(Headed("plain"))(**batch)
    found = GradientAttribution(Headed("encoder without gradients"))(**batch)
    assert torch.equal(expected.scores, found.scores) and expected.scores.any()
    with pytest.raises(ValueError, match="ran more than once in one forward pass"):
        GradientAttribution(Headed("twice"))(**batch)
    with pytest.raises(ValueError, match="can't be followed back to the first layer's input"):
        GradientAttribution(Headed("head without gradients"))(**batch)


def test_refusals():
    model = classifier()
    batch = random_batch(model, batch=2, n=6)
    with pytest.raises(ValueError, match="method must be one of gradient-x-input"):
        GradientAttribution(model, "lime")
    with pytest.raises(ValueError, match="no head to explain"):
        GradientAttribution(build("bert"))(**batch)
    with pytest.raises(ValueError, match="training mode"):
        GradientAttribution(build("bert-classifier").train())(**batch)
    with pytest.raises(ValueError, match=r"target must lie in \[0, 2\)"):
        GradientAttribution(model)(**batch, target=2)
    with pytest.raises(TypeError, match="takes no targets; did you mean target"):
        GradientAttribution(model)(**batch, targets=0)
    occlude = GradientAttribution(model, "occlusion")
    with pytest.raises(ValueError, match="replacement must be a token id"):
        occlude(**batch, replacement=97)
    with pytest.raises(ValueError, match=r"special_tokens_mask must be \(B, n\)"):
        occlude(**batch, special_tokens_mask=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="needs input_ids"):
        occlude(inputs_embeds=torch.randn(1, 4, 48, dtype=torch.float64))
    with pytest.raises(ValueError, match="no padding id; name the id"):
        occlude_without = build("bert-classifier")
        occlude_without.config.pad_token_id = None
        GradientAttribution(occlude_without, "occlusion")(**batch)
    with pytest.raises(ValueError, match="leave logits_to_keep out"):
        decoder = build("llama")
        GradientAttribution(decoder)(**random_batch(decoder, batch=1, n=5), logits_to_keep=1)


@pytest.mark.parametrize("method", GRADIENTS)
def test_explain_replaces_by_the_mask_token_and_spares_special_tokens(method):
    model, texts = classifier(), ["the good film is deep, filming.", "a film"]
    found = pyglobenc.explain(model, tokenizer(), texts, method, progress=False)
    for a in found:
        special = torch.tensor([a.special]).int()
        batch = {"input_ids": torch.tensor([a.token_ids])}
        exact = GradientAttribution(model, method)(
            **batch, replacement=tokenizer().mask_token_id, special_tokens_mask=special
        )
        np.testing.assert_allclose(a.scores, exact.scores[0].numpy(), rtol=1e-9, atol=1e-12)
        assert a.target_kind == "class" and a.target_name == a.label == ["BAD", "GOOD"][a.target]
        if method in ("occlusion", "integrated-gradients"):
            assert not a.scores[a.special].any()


def test_explain_names_the_next_token_of_a_language_model():
    model = build("gpt2")
    found = pyglobenc.explain(model, tokenizer(), ["the good film", "a"], "gradient-x-input", progress=False)
    for a in found:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([a.token_ids])).logits[0, -1]
        assert a.target == int(logits.argmax())
        assert a.target_name == (tokenizer().convert_ids_to_tokens(a.target) or str(a.target))
    other = pyglobenc.explain(model, tokenizer(), "a", "gradient-x-input", target=60)
    assert other.target == 60 and not np.array_equal(other.scores, found[1].scores)
    with pytest.raises(ValueError, match=r"target must be a class in \[0, 97\)"):
        pyglobenc.explain(model, tokenizer(), "a", "gradient-x-input", target=97)


@pytest.mark.parametrize("method", ["gradient-x-input", "attnlrp"])
def test_elements_are_the_products_that_a_tokens_score_adds_up(method):
    model = build("llama")
    batch = random_batch(model, 2, 9, [0, 3])
    attribute = GradientAttribution(model, method)
    for given in (
        dict(target=7),
        dict(target=torch.tensor([[7, 8], [7, 8]]), position=torch.tensor([[3, 4]] * 2)),
    ):
        scores = attribute(**batch, **given).scores
        found = attribute(**batch, **given, elements=True).scores
        assert found.shape == (*scores.shape, model.config.hidden_size)
        assert (found.sum(-1) - scores).abs().max() <= 1e-12 * scores.abs().max()
        assert not found.movedim(-2, 1)[batch["attention_mask"] == 0].any()
    if method == "gradient-x-input":
        _, _, h, grad = direct(model, {name: t[:1] for name, t in batch.items()}, target=7)
        found = attribute(**batch, target=7, elements=True).scores[0]
        assert (found - h * grad).abs().max() <= 1e-10 * (h * grad).abs().max()


def test_elements_belong_to_products_of_texts():
    with pytest.raises(ValueError, match="elements belong to texts, .*got saliency$"):
        GradientAttribution(classifier(), "saliency")(input_ids=torch.tensor([[2, 9, 3]]), elements=True)
    with pytest.raises(ValueError, match="got attnlrp of images"):
        GradientAttribution(build("vit"), "attnlrp")(
            pixel_values=torch.zeros(1, 3, 12, 12, dtype=torch.float64), elements=True
        )


def test_equals_captum():
    captum = pytest.importorskip("captum.attr", reason="captum isn't installed")
    model = build("bert-classifier")
    batch = random_batch(model, batch=2, n=8, pads=[0, 3])
    layer, mask = model.bert.embeddings, batch["attention_mask"]

    def logits(ids):
        return model(input_ids=ids, attention_mask=mask.repeat(len(ids) // len(mask), 1)).logits

    ids, target = batch["input_ids"], torch.tensor([0, 1])
    real = mask[..., None]
    by_input = captum.LayerGradientXActivation(logits, layer, multiply_by_inputs=True)
    theirs = by_input.attribute(ids, target=target)
    ours = GradientAttribution(model)(**batch, target=target).scores
    torch.testing.assert_close(ours, (theirs * real).sum(-1).detach(), rtol=1e-9, atol=1e-12)
    integrated = captum.LayerIntegratedGradients(logits, layer)
    theirs = integrated.attribute(
        ids,
        torch.where(mask == 1, TOKEN, ids),
        target=target,
        n_steps=STEPS[0],
        method="gausslegendre",
    )
    ours = GradientAttribution(model, "integrated-gradients")(**batch, target=target, replacement=TOKEN)
    # captum rounds its nodes and weights to float32
    exact = (theirs * real).sum(-1).detach()
    assert float((ours.scores - exact).abs().max()) <= torch.finfo(torch.float32).eps * exact.abs().max()
    occluded = captum.FeatureAblation(logits)
    theirs = occluded.attribute(ids, baselines=TOKEN, target=target)
    ours = GradientAttribution(model, "occlusion")(**batch, target=target, replacement=TOKEN).scores
    torch.testing.assert_close(ours, theirs.to(ours) * mask, rtol=1e-9, atol=1e-12)
