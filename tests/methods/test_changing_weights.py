"""Weights are those of this call, however they were changed since the last one. Those that aren't numbers are
refused where they count.
"""

import copy
import importlib.util
from collections.abc import Callable
from itertools import product

import pytest
import torch
from models import ARCHITECTURES, EACH, IMAGES, PRE_NORM, build, random_batch
from sweeps import sweep
from torch import nn
from transformers.pytorch_utils import Conv1D

from pyglobenc import GlobEnc, Rollout, TransformerAttribution
from pyglobenc.hf import find_layers

EVERY = [*ARCHITECTURES, *PRE_NORM, *IMAGES]
# One half of EACH changes by default; the other half, and BERT, are given what is no number.
CHANGED = ["distilbert", "gpt2", "gemma3", "modernbert", "vit", "beit", "mpnet"]
EXPLAINED = ["bert-classifier", "roberta", "electra", "distilbert", "vit"]


def attribute(method: Callable, batch: dict) -> list[torch.Tensor]:
    """What a method returns that rests on the weights."""
    if isinstance(method, TransformerAttribution):
        result = method(**batch, target=1, reliability="estimated", layers=True)
        return [result.scores, result.relevance, result.error]
    result = method(**batch, maps=["head_N", "N"] if isinstance(method, GlobEnc) else [])
    return [result.scores, result.log_scale, *result.maps.values()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def own_parameters(module: nn.Module):
    """Each parameter inside a module with the module that holds it, and its name there."""
    return [
        (holder, name, p) for holder in module.modules() for name, p in holder.named_parameters(recurse=False)
    ]


def noise_like(t: torch.Tensor) -> torch.Tensor:
    return t.detach() * (1 + 0.3 * torch.rand_like(t))


def in_place(block):
    for _, _, p in own_parameters(block):
        p.data.copy_(noise_like(p))


def assigned(block):
    for _, _, p in own_parameters(block):
        p.data = noise_like(p)


def averaged(block):
    with torch.no_grad():
        for _, _, p in own_parameters(block):
            p.lerp_(noise_like(p), 0.7)


def through_numpy(block):
    for _, _, p in own_parameters(block):
        view = p.detach().numpy()
        view[...] = noise_like(p).numpy()


def new_parameters(block):
    for holder, name, p in own_parameters(block):
        setattr(holder, name, nn.Parameter(noise_like(p)))


def loaded(block):
    block.load_state_dict(
        {name: noise_like(t) if t.is_floating_point() else t for name, t in block.state_dict().items()}
    )


def loaded_by_assignment(block):
    state = {name: noise_like(t) if t.is_floating_point() else t for name, t in block.state_dict().items()}
    block.load_state_dict(state, assign=True)


def randomised(block):
    for holder, name, p in own_parameters(block):
        if name == "weight" and p.dim() > 1:
            holder.weight.data.normal_(std=0.1)


def new_modules(block):
    for holder in list(block.modules()):
        for name, child in list(holder.named_children()):
            if isinstance(child, nn.Linear | Conv1D):
                setattr(holder, name, other := copy.deepcopy(child))
                other.weight.data.normal_(std=0.1)


CHANGES = [
    in_place,
    assigned,
    averaged,
    through_numpy,
    new_parameters,
    loaded,
    loaded_by_assignment,
    randomised,
    new_modules,
]


def check_changes(model, makers, batch):
    """Every kind of change, of one layer after the other: a method gives what a fresh one gives, and not what
    it gave before.
    """
    blocks = list({layer.block: None for layer in find_layers(model)})
    for make in makers:
        method = make(model)
        last = attribute(method, batch)
        for index, change in enumerate(CHANGES):
            change(blocks[-1 - index % len(blocks)])
            now = attribute(method, batch)
            assert equal(now, attribute(make(model), batch)), (
                f"{change.__name__}: not the result of the weights as they are"
            )
            assert not equal(now, last), f"{change.__name__} changed nothing"
            last = now


@pytest.mark.parametrize("name", sweep(EVERY, [*CHANGED, "llama"]))
def test_rollouts_see_every_change(name):
    model = build(name, torch.float32)
    norms = (
        (lambda m: Rollout(m, "n-fixedres"), lambda m: Rollout(m, "w-res"))
        if name in ("bert", "llama", "vit")
        else ()
    )
    check_changes(model, (GlobEnc, *norms), random_batch(model, 1, 7))


@pytest.mark.parametrize("name", sweep(EXPLAINED, ["bert-classifier", "vit"]))
@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
def test_transformer_attribution_sees_every_change(name):
    model = build(name, torch.float32)
    check_changes(model, (TransformerAttribution,), random_batch(model, 1, 7))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_constants_are_of_this_call_too(backend):
    """Where the Gram matrices come from K: a GPU's kernels, and a long input without the residual."""
    model = build("bert", torch.float32, max_position_embeddings=200, num_hidden_layers=1)
    batch = random_batch(model, 1, 150 if backend == "reference" else 3)
    method = GlobEnc(model, backend=backend)
    last = method(**batch, stage="N").scores
    for layer in find_layers(model):
        layer.output.weight.data = noise_like(layer.output.weight)
        now = method(**batch, stage="N").scores
        assert torch.equal(
            now, GlobEnc(model, backend=backend)(**batch, stage="N").scores
        ) and not torch.equal(now, last)
        last = now


def test_adapters_merged_and_changed():
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, target_modules=["query", "value", "dense"]
    )
    model = peft.get_peft_model(build("bert-classifier", torch.float32), config).eval()
    globenc, batch = GlobEnc(model), random_batch(build("bert-classifier"), 1, 7)

    def double():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.mul_(2)

    last = attribute(globenc, batch)
    with model.disable_adapter():
        assert not equal(attribute(globenc, batch), last)
    for change in (double, model.merge_adapter, model.unmerge_adapter):
        change()
        now = attribute(globenc, batch)
        assert equal(now, attribute(GlobEnc(model), batch)) and not equal(now, last)


def outer_parameters(model):
    """Parameters of the first and the last layer, and of everything outside the layers."""
    blocks = list({layer.block: None for layer in find_layers(model)})
    middle = {id(p) for block in blocks[1:-1] for p in block.parameters()}
    return [(name, p) for name, p in model.named_parameters() if id(p) not in middle]


def check_not_finite(model, makers, batch):
    """NaN or infinity in any parameter is refused, or has no part in a result that is the same without it."""
    refused = 0
    for make in makers:
        method = make(model)
        clean = attribute(method, batch)
        for index, (name, p) in enumerate(outer_parameters(model)):
            before = p.data.clone()
            # a query whose scores are all -inf sees no key, in torch's attention and so in the model's own
            # forward pass
            scores = any(part in name for part in ("key", "query", "q_", "k_", "c_attn", "Wqkv"))
            p.data.flatten()[p.numel() // 2] = float("nan") if scores or index % 2 else float("inf")
            try:
                now = attribute(method, batch)
            except ValueError as error:
                refused += 1
                assert f"parameter {name} holds NaN or infinity" in str(error)
            else:
                assert equal(now, clean), f"{name} moved the result"
            p.data.copy_(before)
    assert refused > len(outer_parameters(model)) / 4


@pytest.mark.parametrize("name", sweep(EVERY, [*(name for name in EACH if name not in CHANGED), "bert"]))
def test_rollouts_refuse_what_is_no_number(name):
    model = build(name, torch.float32)
    others = (
        [lambda m, kind=kind: Rollout(m, kind) for kind in ("n-fixedres", "w-res", "attention-flow")]
        if name == "bert"
        else []
    )
    check_not_finite(model, (GlobEnc, *others), random_batch(model, 1, 7))


@pytest.mark.parametrize(
    "backend, name",
    sweep(
        product(("reference", "auto"), EXPLAINED),
        [("reference", "distilbert"), ("auto", "vit")],
    ),
)
@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
def test_transformer_attribution_refuses_what_is_no_number(backend, name):
    model = build(name, torch.float32)
    check_not_finite(model, (lambda m: TransformerAttribution(m, backend),), random_batch(model, 1, 7))
