"""Models that differ from the stock one in any module: the result is that of a direct computation, or an
error names the module.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers
from chefer import direct, relative
from models import ARCHITECTURES, EACH, IMAGES, OWN_SCORES, PRE_NORM, SMALL, build, random_batch
from published import Float64Throughout, published_maps, published_rollout
from sweeps import slow, sweep
from torch import nn

from pyglobenc import GlobEnc, GradientRollout, TransformerAttribution, capture
from pyglobenc.hf import find_layers
from pyglobenc.hf.trace.attention import Mask
from pyglobenc.methods.rollout.baselines import ROLLOUTS, Rollout


def all_of(names):
    names = list(names)
    return sweep(names, [name for name in EACH if name in names])


EVERY = all_of([*ARCHITECTURES, *PRE_NORM, *IMAGES])
POST_NORM = all_of(ARCHITECTURES)
CHUNKING = (
    "bert bert-classifier roberta xlm-roberta camembert electra distilbert albert albert-groups"
).split()


PARTS = ("attention", "block", "output", "output_norm")


class Adapter(nn.Module):
    """A bottleneck beside the identity, as adapters are added after a projection."""

    def __init__(self, d):
        super().__init__()
        self.down, self.up = nn.Linear(d, 4).double(), nn.Linear(4, d).double()

    def forward(self, x):
        return x + self.up(self.down(x).relu()).to(x.dtype)


class Doubled(nn.Linear):
    """Linear, but not with the matrix that its weight is."""

    def forward(self, x):
        return 2 * super().forward(x)


class OwnNorm(nn.Module):
    """A layer norm written down by hand, its parameters under names of their own; wrong: its bias comes
    before the division.
    """

    def __init__(self, norm, wrong=False):
        super().__init__()
        self.scale, self.shift, self.small, self.wrong = norm.weight, norm.bias, norm.eps, wrong

    def forward(self, tokens):
        centred = tokens - tokens.mean(-1, keepdim=True)
        std = (centred.square().mean(-1, keepdim=True) + self.small).sqrt()
        return self.scale * (centred.abs() if self.wrong else centred) / std + self.shift


def replace(model, module, new):
    """Put a module in the place of another, wherever the model has it."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is module:
                setattr(parent, name, new)


def path(model, module):
    return next(name for name, found in model.named_modules() if found is module)


def matrix(module):
    """W of x @ W + b, of a Linear module or a Conv1D."""
    return module.weight.T if isinstance(module, nn.Linear) else module.weight


def plain_linear(module):
    """A Linear module for a Linear module or a Conv1D."""
    weight = matrix(module)
    new = nn.Linear(*weight.shape, bias=module.bias is not None).to(weight.dtype)
    new.weight.data = weight.T.detach().clone()
    if module.bias is not None:
        new.bias.data = module.bias.detach().clone()
    return new


def hook(change):
    return lambda module, args, output: (
        (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)
    )


# each changes a layer's modules; where something is to be refused it returns the module that the error names


def adapter_after_w_o(model, m):
    new = nn.Sequential(plain_linear(m.output), Adapter(matrix(m.output).shape[1]))
    replace(model, m.output, new)
    return new


def hook_on_w_o(model, m):
    m.output.register_forward_hook(hook(lambda t: t * 1.01))
    return m.output


def one_feature_of_one_token(model, m):
    def change(t):
        t = t.clone()
        t[-1, 0, 3] += 1e-3
        return t

    m.output.register_forward_hook(hook(change))
    return m.output


def heads_masked(model, m):
    m.output.register_forward_pre_hook(
        lambda module, args: (args[0] * torch.arange(args[0].shape[-1]).lt(12), *args[1:])
    )
    return m.output


def heads_masked_in_place(model, m):
    def mask(module, args):
        args[0].mul_(torch.arange(args[0].shape[-1]).lt(12))

    m.output.register_forward_pre_hook(mask)
    return m.output


def forward_of_w_o(model, m):
    forward = m.output.forward
    m.output.forward = lambda x: forward(x).tanh()
    return m.output


def attention_twice(model, m):
    forward = m.attention.forward
    m.attention.forward = lambda *args, **kwargs: (forward(*args, **kwargs), forward(*args, **kwargs))[1]
    # of a module that computes its attention itself nothing is called within it
    return m.attention if m.own_scores is None else None


def block_twice(model, m):
    other = next(layer.block for layer in find_layers(model) if layer.block is not m.block)
    other.register_forward_hook(
        lambda module, args, kwargs, output: (m.block(*args, **kwargs), None)[1], with_kwargs=True
    )
    return m.block


def dropout_of_attention(model, m):
    inner = [module for module in m.block.modules() if hasattr(module, "p") or hasattr(module, "drop_prob")]
    new = inner[0] if inner else nn.Dropout()
    if not inner:
        m.block.add_module("late", new)
    new.p = 0.1
    new.train()
    return new


def hook_on_mlp(model, m):
    # another MLP: of it the decomposition reads the statistics of the sum alone
    m.mlp_output.register_forward_hook(hook(lambda t: t * 1.01))
    return None


def hook_on_norm_input(model, m):
    m.output_norm.register_forward_pre_hook(lambda module, args: (args[0] * 1.01,))
    return m.output_norm


def hook_on_block(model, m):
    m.block.register_forward_hook(hook(lambda t: t * 1.01))
    return None if m.pre_norm else m.block


def hook_on_norm(model, m):
    m.attention_norm.register_forward_hook(hook(lambda t: t * 1.01))
    return None if m.pre_norm else m.attention_norm


REFUSED = [
    adapter_after_w_o,
    hook_on_w_o,
    one_feature_of_one_token,
    heads_masked,
    heads_masked_in_place,
    forward_of_w_o,
    attention_twice,
    dropout_of_attention,
    hook_on_mlp,
    hook_on_norm_input,
    hook_on_block,
    hook_on_norm,
]


def rows(attribute, batch):
    with Float64Throughout():
        result = attribute(**batch, targets=[0, 2])
    return result.scores * result.log_scale.exp()[..., None]


def exact_rows(model, batch):
    maps = published_maps(model, batch)
    return published_rollout(maps["N_Enc" if "N_Enc" in maps else "N_Res"])[:, -1, [0, 2]]


def assert_exact(model, reference, batch):
    found, exact = rows(GlobEnc(model), batch), exact_rows(reference, batch)
    assert (found - exact).abs().max() <= 1e-10 * exact.abs().max()


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", EVERY)
def test_changed_layers_are_refused_by_name(name, change):
    model = build(name)
    batch = random_batch(model, batch=2, n=7, pads=[2, 0])
    blamed = change(model, find_layers(model)[1])
    if blamed is None:
        # what a pre-norm layer's MLP returns is no part of the decomposition
        return assert_exact(model, model, batch)
    with pytest.raises(ValueError, match=path(model, blamed).replace(".", r"\.")):
        rows(GlobEnc(model), batch)


@pytest.mark.parametrize(
    "name", all_of(name for name in (ARCHITECTURES | PRE_NORM | IMAGES) if name != "albert")
)
def test_a_block_called_twice_is_refused(name):
    model = build(name)
    batch = random_batch(model, batch=1, n=7)
    blamed = block_twice(model, find_layers(model)[1])
    with pytest.raises(
        ValueError,
        match=path(model, blamed).replace(".", r"\.") + r".* was called 2 times|mask has the window",
    ):
        rows(GlobEnc(model), batch)


class OutOfOrder(nn.ModuleList):
    """Holds its layers in one order and runs them in another."""

    running = False

    def __iter__(self):
        first, *rest = self._modules.values()
        return iter([first, *(reversed(rest) if self.running else rest)])

    def __getitem__(self, index):
        return list(self)[index]


@pytest.mark.parametrize(
    "name", all_of(name for name in (ARCHITECTURES | PRE_NORM | IMAGES) if "albert" not in name)
)
def test_layers_run_in_the_order_of_the_model(name):
    model = build(name)
    blocks = [layer.block for layer in find_layers(model)]
    held = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and list(m) == blocks)
    held.__class__ = OutOfOrder
    batch = random_batch(model, batch=1, n=5)
    GlobEnc(model)(**batch)
    model.register_forward_pre_hook(lambda module, args: setattr(held, "running", True))
    model.register_forward_hook(lambda module, args, output: setattr(held, "running", False))
    with pytest.raises(ValueError, match=r"ran in the place of|is not the output of its|mask has the window"):
        GlobEnc(model)(**batch)


@pytest.mark.parametrize("name", EVERY)
def test_skipped_layers_are_refused(name):
    model = build(name)
    skipped = find_layers(model)[1].block
    out = returned(model, skipped)
    skipped.forward = lambda x, *args, **kwargs: (x, *out[1:]) if isinstance(out, tuple) else x
    with pytest.raises(
        ValueError, match=path(model, skipped).replace(".", r"\.") + r".* was skipped|was called 3 times"
    ):
        GlobEnc(model)(**random_batch(model, batch=1, n=5))


def returned(model, module):
    """What a module returns in a forward pass."""
    found = []
    handle = module.register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model(**random_batch(model, batch=1, n=5))
    handle.remove()
    return found[0]


class Around(nn.Module):
    """A module of the user's around a model: it forgets the mask, or the model."""

    def __init__(self, name, forgets):
        super().__init__()
        self.model, self.forgets = build(name), forgets

    def forward(self, input_ids, attention_mask):
        if self.forgets == "mask":
            return self.model(input_ids=input_ids)
        return self.model.get_input_embeddings()(input_ids)[:, 0]


@pytest.mark.parametrize("method", [GlobEnc, GradientRollout, TransformerAttribution])
@pytest.mark.parametrize("name", ["bert-classifier", "gpt2", "deberta-v3"])
def test_what_a_module_around_a_model_forgets(name, method):
    if method is TransformerAttribution and name != "bert-classifier":
        pytest.skip("no relevance rules")
    batch = random_batch(build(name), batch=2, n=7, pads=[2, 0])
    options = {"targets": [0]} if method is GlobEnc else {"target": 1}
    with pytest.raises(ValueError, match=r"(layer|h)\.0\..*att.* doesn't hide the padding"):
        method(Around(name, "mask").eval())(**batch, **options)
    with pytest.raises(ValueError, match=r"layers \[0, 1, 2\] never called .* was skipped|can't be followed"):
        method(Around(name, "model").eval())(**batch, **options)


@pytest.mark.parametrize("name", all_of([*ARCHITECTURES, *PRE_NORM]))
def test_a_layer_that_sees_padding_is_refused(name):
    model = build(name)

    def unmasked(module, args, kwargs):
        named = {name: None for name in kwargs if name == "attention_mask"}
        return tuple(None if isinstance(a, Mask) else a for a in args), kwargs | named

    m = find_layers(model)[1]
    if m.own_scores is not None:
        pytest.skip("its attention takes no other mask than the model's")
    m.attention.register_forward_pre_hook(unmasked, with_kwargs=True)
    with pytest.raises(ValueError, match="doesn't hide the padding"):
        GlobEnc(model)(**random_batch(model, batch=2, n=7, pads=[2, 0]), targets=[0])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["bert", "mpnet", "deberta-v3", "gpt2", "gemma3", "vit"])
# Inductor compiles C++ for seconds.
@pytest.mark.parametrize("backend", ["eager", slow("inductor")])
def test_compiled_modules(backend, name, part):
    model, plain = build(name), build(name)
    module = getattr(find_layers(model)[1], part)
    replace(model, module, torch.compile(module, backend=backend))
    assert_exact(model, plain, random_batch(model, batch=2, n=7, pads=[0, 2]))


@pytest.mark.parametrize("method", [GradientRollout, TransformerAttribution])
def test_layers_without_a_gradient_are_refused(method):
    model = build("bert-classifier")
    block = find_layers(model)[1].block
    forward = block.forward
    block.forward = lambda x, *args, **kwargs: forward(x.detach(), *args, **kwargs)
    with pytest.raises(ValueError, match=r"no gradient at bert\.encoder\.layer\.0 "):
        method(model)(**random_batch(model, batch=1, n=7), target=1)


@pytest.mark.parametrize("method", [*ROLLOUTS, "packed", "compat", "relevance"])
def test_every_method_refuses(method):
    if method == "compat":
        from pyglobenc.compat.globenc.modeling.modeling_bert import BertForSequenceClassification

        model = BertForSequenceClassification(build("bert-classifier").config).double().eval()
    else:
        model = build("bert-classifier")
    hook_on_w_o(model, find_layers(model)[1])
    calls = {
        "packed": lambda: GlobEnc(model).packed(input_ids=[[5, 6, 7], [8, 9]]),
        "compat": lambda: model(torch.tensor([[5, 6, 7]]), output_norms=True),
        "relevance": lambda: TransformerAttribution(model)(input_ids=torch.tensor([[5, 6, 7]])),
    }
    with pytest.raises(ValueError, match="not the residual sum .*layer.1.attention.output.dense"):
        calls.get(method, lambda: Rollout(model, method)(input_ids=torch.tensor([[5, 6, 7]])))()


@pytest.mark.parametrize("name", CHUNKING)
def test_mlp_in_chunks(name):
    model, plain = build(name, chunk_size_feed_forward=3), build(name)
    batch = random_batch(model, batch=2, n=9, pads=[0, 4])
    assert_exact(model, plain, batch)


@pytest.mark.parametrize("name", ["bert-classifier", "roberta", "electra", "distilbert"])
def test_relevance_of_mlp_in_chunks(name):
    model, plain = build(name, chunk_size_feed_forward=3), build(name)
    batch = random_batch(model, batch=2, n=9, pads=[0, 4])
    found, exact = (TransformerAttribution(m)(**batch, variant="full").scores for m in (model, plain))
    assert relative(found, exact) <= 1e-8


@pytest.mark.parametrize("name", EVERY)
def test_layers_of_another_model(name):
    model, other = build(name, attention="eager"), build(name)
    for m in {layer.block: layer for layer in find_layers(other)}.values():
        for parameter in m.block.parameters():
            parameter.data *= 1.1
    reference = copy.deepcopy(model)
    kept, source, target = (find_layers(one)[1].block for one in (model, other, reference))
    target.load_state_dict(source.state_dict())
    replace(model, kept, source)
    batch = random_batch(model, batch=2, n=7, pads=[0, 2])
    assert_exact(model, reference, batch)
    assert other.config._attn_implementation == build(name).config._attn_implementation


@pytest.mark.parametrize("kind", ["own", "no weight", "no bias", "stranger"])
@pytest.mark.parametrize("name", POST_NORM)
def test_norms_of_other_classes(name, kind):
    model, reference = build(name), build(name)
    for norm, same in (
        (m, r)
        for layer, own in zip(find_layers(model), find_layers(reference), strict=True)
        for m, r in norms(layer, own)
    ):
        if kind in ("own", "stranger"):
            new = OwnNorm(norm, wrong=kind == "stranger" and norm is find_layers(model)[0].output_norm)
            replace(model, norm, new)
        elif kind == "no weight":
            replace(model, norm, nn.LayerNorm(48, eps=norm.eps, elementwise_affine=False))
            same.weight.data.fill_(1), same.bias.data.fill_(0)
        else:
            new = nn.LayerNorm(48, eps=norm.eps, bias=False).double()
            new.weight = norm.weight
            replace(model, norm, new)
            same.bias.data.fill_(0)
    batch = random_batch(model, batch=2, n=7, pads=[0, 2])
    if kind != "stranger":
        return assert_exact(model.eval(), reference, batch)
    with pytest.raises(ValueError, match=r"\(OwnNorm\) doesn't compute a layer norm"):
        rows(GlobEnc(model), batch)


def test_norms_over_several_tokens_are_refused():
    model = build("bert")
    norm = find_layers(model)[1].output_norm
    replace(model, norm, nn.LayerNorm((7, 48), eps=norm.eps).double())
    with pytest.raises(
        ValueError, match=r"layer\.1\.output\.LayerNorm .*(statistics of shape|normalises over)"
    ):
        rows(GlobEnc(model.eval()), random_batch(model, batch=2, n=7))


def norms(layer, own):
    """Norms after a residual sum that a model and its copy still have in common."""
    for part in ("attention_norm", "output_norm"):
        if type(getattr(layer, part)) is nn.LayerNorm:
            yield getattr(layer, part), getattr(own, part)


def test_adapters_around_norms():
    peft = pytest.importorskip("peft")
    model = build("bert-classifier")
    tuned = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["LayerNorm"])).double().eval()
    for name, parameter in tuned.named_parameters():
        if "ln_tuning" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    batch = random_batch(build("bert-classifier"), batch=2, n=7, pads=[0, 2])
    merged = copy.deepcopy(tuned).merge_and_unload()
    assert_exact(tuned, merged, batch)
    assert relative(*(TransformerAttribution(m)(**batch).scores for m in (tuned, merged))) <= 1e-8


@pytest.mark.parametrize("name", EVERY)
def test_linear_modules_of_other_classes(name):
    model, reference = build(name), build(name)
    for m, r in [(find_layers(model)[0], find_layers(reference)[0])]:
        new = Doubled(*matrix(m.output).shape, bias=m.output.bias is not None).double()
        new.load_state_dict(plain_linear(m.output).state_dict())
        replace(model, m.output, new)
        r.output.weight.data *= 2
        if m.output.bias is not None:
            r.output.bias.data *= 2
    assert_exact(model.eval(), reference, random_batch(model, batch=2, n=7, pads=[0, 2]))


class Siamese(nn.Module):
    """Encodes both texts with one encoder and compares them."""

    def __init__(self, twice=True):
        super().__init__()
        self.encoder, self.twice = build("bert"), twice

    def forward(self, one, other):
        u = self.encoder(input_ids=one).last_hidden_state[:, 0]
        return (u * (self.encoder(input_ids=other).last_hidden_state[:, 0] if self.twice else u)).sum(-1)


@pytest.mark.parametrize("twice", [True, False])
def test_encoder_called_twice_in_one_pass(twice):
    model, (one, other) = Siamese(twice).eval(), torch.randint(5, 97, (2, 1, 6))
    refused = (
        pytest.raises(ValueError, match=r"encoder\.encoder\.layer\.0 \(BertLayer\) was called 2 times")
        if twice
        else nullcontext()
    )
    with torch.no_grad(), capture(model) as trace, refused:
        for _ in range(2):
            model(one, other)
        assert len(trace.layers) == 3
    model.encoder.encoder.layer[2].output.dropout.train()
    with (
        pytest.raises(ValueError, match=r"encoder\.encoder\.layer\.2\.output\.dropout .*p=0\.1"),
        capture(model),
    ):
        pass


@pytest.mark.parametrize("where", ["query", "value", "intermediate", "mlp_output", "output"])
@pytest.mark.parametrize("name", ["bert-classifier", "distilbert", "vit"])
def test_relevance_goes_through_the_modules_that_ran(name, where):
    model = build(name)
    batch = random_batch(model, batch=1, n=7)
    module = getattr(find_layers(model)[1], where)
    handle = module.register_forward_hook(hook(lambda t: t * 1.01))
    with pytest.raises(ValueError, match=path(model, module).replace(".", r"\.")):
        TransformerAttribution(model)(**batch)
    handle.remove()
    module.register_forward_pre_hook(lambda module, args: (args[0] * 1.01,))
    if where == "mlp_output":
        # an activation of another kind: the rules pass relevance on through any
        names = {
            "bert-classifier": ["classifier", "bert.pooler.dense"],
            "distilbert": ["classifier", "pre_classifier"],
        }
        head = [model.get_submodule(one) for one in names.get(name, ["classifier"])]
        row = (head[0], head[0].weight[1].detach()[None])
        scores, _ = direct(model, batch, lambda out: out.logits[0, 1], [row, *head[1:]])
        found = TransformerAttribution(model)(**batch, target=1).scores[0]
        assert relative(found, scores[len(scores) - len(found) :]) <= 1e-8
        return
    with pytest.raises(ValueError, match=path(model, module).replace(".", r"\.")):
        TransformerAttribution(model)(**batch)


def around(monkeypatch, module, before=None, after=None):
    """Act before and after each call of a module, where no hook of the module tells."""
    call = nn.Linear.__call__

    def changed(called, *args):
        if called is module and before:
            before()
        out = call(called, *args)
        if called is module and after:
            after(out)
        return out

    monkeypatch.setattr(nn.Linear, "__call__", changed)


def swapped_weight(module, monkeypatch):
    # for the time of the call, as torch.func.functional_call does
    weight, other = module.weight, nn.Parameter(module.weight.detach() * 1.01)
    around(
        monkeypatch,
        module,
        lambda: setattr(module, "weight", other),
        lambda out: setattr(module, "weight", weight),
    )


def written_weight(module, monkeypatch):
    weight = module.weight.detach()
    around(monkeypatch, module, lambda: weight.mul_(1.01), lambda out: weight.div_(1.01))


def written_output(module, monkeypatch):
    # torch doesn't count this write, nor one by another library's kernel
    around(monkeypatch, module, after=lambda out: out.data.mul_(1.01))


def other_product(module, monkeypatch):
    linear = nn.functional.linear

    def changed(x, weight, bias=None):
        return linear(x, weight * 1.01 if weight is module.weight else weight, bias)

    monkeypatch.setattr(nn.functional, "linear", changed)


@pytest.mark.parametrize("change", [swapped_weight, written_weight, written_output, other_product])
@pytest.mark.parametrize("where", ["query", "value", "intermediate", "mlp_output", "output"])
@pytest.mark.parametrize("name", ["bert-classifier", "vit"])
def test_relevance_goes_through_the_weights_of_the_call(name, where, change, monkeypatch):
    model = build(name)
    batch = random_batch(model, batch=1, n=7)
    module = getattr(find_layers(model)[1], where)
    change(module, monkeypatch)
    with pytest.raises(ValueError, match=path(model, module).replace(".", r"\.")):
        TransformerAttribution(model)(**batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "autocast"])
def test_rounding_is_not_refused(dtype):
    """Outlier features and tokens, as trained models have them, in every precision."""
    for name in ("bert", "distilbert", "deberta-v3", "modernbert", "gpt2", "gemma3", "vit", "beit"):
        model = build(name, torch.float32)
        for m in find_layers(model):
            for norm in (m.attention_norm, m.output_norm):
                if getattr(norm, "weight", None) is not None:
                    norm.weight.data[::17] *= 30
            m.output.weight.data[..., 3] *= 50
        model = model if dtype == "autocast" else model.to(dtype)
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"),
            capture(model) as trace,
        ):
            model(**random_batch(model, batch=3, n=17, pads=[0, 4, 9]))
        assert len(trace.layers) >= 3


def test_stock_models_of_any_size_of_weights():
    """What is compared grows and shrinks with the weights."""
    for scale in (1e-3, 1e3):
        model = transformers.BertModel(transformers.BertConfig(**SMALL)).eval()
        for parameter in model.parameters():
            parameter.data *= scale
        with torch.no_grad(), capture(model) as trace:
            model(**random_batch(model, batch=2, n=9))
        assert len(trace.layers) == 3


def test_own_scores_see_what_the_model_saw():
    """What is computed again beside these models is what they computed."""
    for name in OWN_SCORES:
        model = build(name)
        m = find_layers(model)[0]
        m.attention.register_forward_hook(hook(lambda t: t * 1.01))
        with pytest.raises(ValueError, match="not the residual sum"):
            rows(GlobEnc(model), random_batch(model, batch=1, n=7))
