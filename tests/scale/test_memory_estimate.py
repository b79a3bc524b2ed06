"""The memory estimate against what torch's allocator sees."""

import tracemalloc
from itertools import product

import pytest
import torch
import transformers
from allocations import measure_allocations
from models import randomize
from sweeps import slow, sweep

from pyglobenc import DecompX, GlobEnc, InformationFlow, Rollout, TransformerAttribution
from pyglobenc.inputs.batching import fitting_batch
from pyglobenc.methods.memory import ESTIMATED, estimate_memory
from pyglobenc.methods.registry import METHODS, MODELS

WITHIN = 0.2
BERT = dict(
    vocab_size=100,
    max_position_embeddings=2048,
    num_hidden_layers=3,
    num_attention_heads=4,
    hidden_size=64,
    intermediate_size=256,
)
WIDE = BERT | dict(num_attention_heads=12, hidden_size=192, intermediate_size=768, num_hidden_layers=2)
DEEP = BERT | dict(num_hidden_layers=8)
DISTILBERT = dict(vocab_size=100, max_position_embeddings=2048, n_layers=3, n_heads=4, dim=64, hidden_dim=256)


DECODER = BERT | dict(num_key_value_heads=2, intermediate_size=176, pad_token_id=0)
IMAGE = dict(BERT, image_size=48, patch_size=4)
SPECIAL = dict(pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
KINDS = {
    "bert": ("Bert", "ForSequenceClassification", BERT),
    "llama": ("Llama", "ForCausalLM", DECODER),
    "vit": ("ViT", "ForImageClassification", IMAGE),
}
# Fused projections, gated and composite activations, norms of queries and keys, layer scales, a vocabulary.
OTHERS = {
    "modernbert": ("ModernBert", "ForSequenceClassification", BERT | SPECIAL | dict(intermediate_size=96)),
    "gemma3": ("Gemma3", "ForCausalLM", DECODER | dict(head_dim=32, intermediate_size=384)),
    "gpt2": ("GPT2", "LMHeadModel", dict(vocab_size=100, n_positions=512, n_layer=3, n_head=4, n_embd=64)),
    "qwen2": ("Qwen2", "ForCausalLM", DECODER | dict(vocab_size=3000)),
    "dinov2": ("Dinov2", "ForImageClassification", IMAGE),
}


def make(settings, kind="Bert", dtype=torch.float32, head="Model"):
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    model = getattr(transformers, f"{kind}{head}")(config(**settings))
    return randomize(model, std=0.02).to(dtype).eval()


def measured(call, model, batch, n, pads=0, **arguments):
    """Peak of the second call, weights included: what a long job settles at."""
    inputs = {
        "input_ids": torch.randint(5, 90, (batch, n)),
        "attention_mask": torch.ones(batch, n, dtype=torch.long),
    }
    inputs["attention_mask"][0, n - pads :] = 0
    call(**inputs, **arguments)
    after = measure_allocations(lambda: call(**inputs, **arguments))
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return weights, after.peak


def check(estimate, weights, peak):
    true = weights + peak
    assert abs(estimate.peak / true - 1) < WITHIN, f"estimated {estimate}, measured {true / 2**20:.1f} MiB"
    # the weights, which are known, mustn't hide an error in the rest
    ours, theirs = estimate.peak - estimate.weights, true - weights
    assert abs(ours / theirs - 1) < WITHIN, (
        f"without weights {ours / 2**20:.2f} MiB, measured {theirs / 2**20:.2f} MiB"
    )


@pytest.mark.parametrize(
    "settings, batch, n, backend",
    [
        (BERT, 1, 512, "auto"),
        (BERT, 1, 512, "reference"),
        (BERT, 8, 64, "auto"),
        (DEEP, 1, 300, "auto"),
        (WIDE, 2, 256, "auto"),
        (WIDE, 2, 256, "reference"),
        (WIDE | dict(intermediate_size=384), 1, 1024, "reference"),
    ],
)
def test_globenc(settings, batch, n, backend):
    model = make(settings)
    check(
        estimate_memory(model, batch=batch, n=n), *measured(GlobEnc(model, backend=backend), model, batch, n)
    )


@pytest.mark.parametrize(
    "method",
    ["raw-attention", "w", "attention-rollout", "w-res", "n-fixedres", "n", "n-res", "n-resln"],
)
def test_family(method):
    model = make(BERT)
    check(
        estimate_memory(model, batch=2, n=200, method=method),
        *measured(Rollout(model, method), model, 2, 200),
    )


@pytest.mark.parametrize(
    "settings, batch, n", [(BERT, 2, 200), (WIDE, 1, 512), (DEEP, 1, 300), (BERT, 8, 64)]
)
def test_alti(settings, batch, n):
    model = make(settings)
    found = measured(Rollout(model, "alti"), model, batch, n)
    check(estimate_memory(model, batch=batch, n=n, method="alti"), *found)


@pytest.mark.parametrize("settings, batch, n", [(BERT, 2, 200), (WIDE, 1, 512)])
def test_information_flow(settings, batch, n):
    model = make(settings)
    found = measured(InformationFlow(model), model, batch, n)
    check(estimate_memory(model, batch=batch, n=n, method="information-flow"), *found)


@pytest.mark.parametrize("name, expected", [("float64", torch.float64), ("double states", torch.float32)])
def test_precision(name, expected):
    model, dtype = make(BERT, dtype=expected), torch.float64 if name == "double states" else None
    check(
        estimate_memory(model, batch=2, n=200, dtype=dtype),
        *measured(GlobEnc(model, dtype=dtype), model, 2, 200),
    )


def test_half_precision_weights():
    model = make(BERT, dtype=torch.bfloat16)
    check(estimate_memory(model, batch=2, n=200), *measured(GlobEnc(model), model, 2, 200))


def test_other_architecture_padding_targets_and_layers():
    model = make(DISTILBERT, "DistilBert")
    found = measured(GlobEnc(model), model, 2, 200, pads=30, targets=list(range(50)), layers=True)
    check(estimate_memory(model, batch=2, n=200, targets=50, layers=True), *found)


@pytest.mark.parametrize(
    "settings, batch, n, dtype",
    [
        (BERT, 1, 512, torch.float32),
        slow(BERT, 1, 1024, torch.float32),
        (BERT, 8, 64, torch.float32),
        slow(DEEP, 1, 300, torch.float32),
        (WIDE, 2, 256, torch.float32),
        slow(BERT, 2, 200, torch.float64),
        (BERT, 2, 200, torch.bfloat16),
        # too large for a second run
        slow(BERT | dict(hidden_size=768, intermediate_size=3072), 1, 256, torch.float32),
    ],
)
def test_transformer_attribution(settings, batch, n, dtype):
    model = make(settings, "Bert", dtype, "ForSequenceClassification")
    found = measured(TransformerAttribution(model), model, batch, n)
    check(estimate_memory(model, batch=batch, n=n, method="transformer-attribution"), *found)


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
@pytest.mark.parametrize(
    "method", ["transformer-attribution-last", "lrp", "partial-lrp", "attention-gradcam"]
)
@pytest.mark.parametrize(
    "settings, batch, n, dtype",
    [
        slow(BERT, 1, 512, torch.float32),
        slow(WIDE, 2, 256, torch.float32),
        (BERT, 2, 200, torch.bfloat16),
    ],
)
def test_other_methods_of_a_class(method, settings, batch, n, dtype):
    model = make(settings, "Bert", dtype, "ForSequenceClassification")
    run, target = METHODS[method].build(model, "auto", None), torch.zeros(batch, dtype=torch.long)
    found = measured(lambda **inputs: run(inputs, target), model, batch, n)
    check(estimate_memory(model, batch=batch, n=n, method=method), *found)


@pytest.mark.parametrize(
    "method",
    ["gradient-x-input", slow("gradient-x-input-norm"), "saliency", slow("integrated-gradients")]
    + [slow("occlusion"), "gradient-rollout", "attcat", "attnlrp", slow("cp-lrp"), "gim", slow("libragrad")],
)
@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
def test_gradients_in_bfloat16(method):
    model = make(WIDE, "Bert", torch.bfloat16, "ForSequenceClassification")
    run, target = METHODS[method].build(model, "auto", None), torch.zeros(1, dtype=torch.long)
    found = measured(lambda **inputs: run(inputs, target), model, 1, 128)
    check(estimate_memory(model, batch=1, n=128, method=method), *found)


@pytest.mark.parametrize(
    "settings, batch, n, dtype",
    [slow(BERT, 2, 200, torch.float32), (WIDE, 2, 100, torch.float32), slow(BERT, 2, 200, torch.bfloat16)],
)
@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
def test_decompx(settings, batch, n, dtype):
    model = make(settings, "Bert", dtype, "ForSequenceClassification")
    found = measured(DecompX(model), model, batch, n)
    check(estimate_memory(model, batch=batch, n=n, method="decompx"), *found)


def of_shape(kind, batch, n):
    """Return a model of KINDS or OTHERS, a batch without padding, and its number of tokens."""
    name, head, settings = (KINDS | OTHERS)[kind]
    if "image_size" not in settings:
        return make(settings, name, head=head), {"input_ids": torch.randint(5, 90, (batch, n))}, n
    side = 4 * int(n**0.5)
    model = make(settings | dict(image_size=side), name, head=head)
    return model, {"pixel_values": torch.randn(batch, 3, side, side)}, (side // 4) ** 2 + 1


def check_call(model, inputs, n, method):
    batch = len(next(iter(inputs.values())))
    run, target = METHODS[method].build(model, "auto", None), torch.zeros(batch, dtype=torch.long)
    run(dict(inputs), target)
    after = measure_allocations(lambda: run(dict(inputs), target))
    estimate = estimate_memory(model, batch=batch, n=n, method=method)
    check(estimate, estimate.weights, after.peak)


def takes(kind, method):
    """Return whether a method takes a kind of model."""
    return kind in MODELS[METHODS[method].models]


# numpy computes the flow: see test_flow
TAKEN = [(kind, name) for name in METHODS for kind in KINDS if takes(kind, name) and name != "attention-flow"]
# one kind for each method: the kinds in turn, or the next one that the method takes
IN_TURN = {
    name: next(kind for kind in [*KINDS, *KINDS][at % 3 :] if (kind, name) in TAKEN)
    for at, name in enumerate(dict.fromkeys(name for _, name in TAKEN))
}


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
@pytest.mark.parametrize(
    "kind, method, batch, n",
    sweep(
        [(*case, *size) for case in TAKEN for size in ((2, 100), (1, 196))],
        [(kind, method, 2, 100) for method, kind in IN_TURN.items()],
    ),
)
def test_every_method(kind, method, batch, n):
    check_call(*of_shape(kind, batch, n), method)


@pytest.mark.parametrize(
    "kind, method",
    sweep(
        product(OTHERS, ("globenc", "gradient-rollout", "saliency", "attnlrp", "cp-lrp", "gim")),
        [
            *product(OTHERS, ("globenc",)),
            *zip(OTHERS, ("gradient-rollout", "saliency", "attnlrp", "cp-lrp", "gim"), strict=True),
        ],
    ),
)
def test_other_architectures(kind, method):
    check_call(*of_shape(kind, 2, 144), method)


@pytest.mark.parametrize("method", ["gradient-x-input", "gradient-rollout", "attcat", "attnlrp"])
def test_generated_tokens(method):
    """All tokens of an answer are explained on one graph."""
    model, inputs, n = of_shape("llama", 1, 144)
    run, at = METHODS[method].build(model, "auto", None), torch.arange(n - 9, n)[None]
    run(dict(inputs), torch.zeros_like(at), position=at)
    after = measure_allocations(lambda: run(dict(inputs), torch.zeros_like(at), position=at))
    estimate = estimate_memory(model, batch=1, n=n, method=method)
    check(estimate, estimate.weights, after.peak)


@pytest.mark.parametrize(
    "kind, head, settings, why",
    [
        ("T5", "ForConditionalGeneration", dict(vocab_size=100, d_model=64, num_heads=4), "has two streams"),
        ("MPNet", "Model", BERT, "computes attention itself"),
        ("DebertaV2", "Model", BERT, "computes attention itself"),
    ],
)
def test_models_without_an_estimate_are_refused(kind, head, settings, why):
    model = make(settings, kind, head=head)
    with pytest.raises(ValueError, match=f"no estimate is known for {kind}{head}, which {why}"):
        estimate_memory(model, batch=1, n=8, method="gradient-rollout")
    assert fitting_batch(model, 8, 64, "gradient-rollout", available=10**12) == 1


def test_flow():
    """numpy's memory is Python's to count: both peaks, which come at different moments, bound that of their
    sum.
    """
    model, n = make(BERT | dict(num_hidden_layers=2)), 96
    _, ours = measured(Rollout(model, "attention-flow"), model, 1, n)
    tracemalloc.start()
    try:
        Rollout(model, "attention-flow")(input_ids=torch.randint(5, 90, (1, n)))
        numpys = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    estimate = estimate_memory(model, batch=1, n=n, method="attention-flow")
    estimated = estimate.peak - estimate.weights
    assert max(ours, numpys) / (1 + WITHIN) < estimated < (ours + numpys) * (1 + WITHIN)


def test_maps():
    model = make(BERT)
    found = measured(GlobEnc(model), model, 1, 400, maps=["N_Enc", "head_N"])
    check(estimate_memory(model, batch=1, n=400, maps=1 + BERT["num_attention_heads"]), *found)


def test_needs_no_weights():
    """A model too large to load is estimated from its config."""
    with torch.device("meta"):
        model = transformers.BertModel(transformers.BertConfig(**BERT))
    assert estimate_memory(model, batch=2, n=200) == estimate_memory(make(BERT), batch=2, n=200)


def test_names_are_those_of_the_registry_and_others_refused():
    assert set(ESTIMATED) == set(METHODS)
    with pytest.raises(ValueError, match="method must be one of raw-attention"):
        estimate_memory(make(BERT), batch=1, n=8, method="gradient")
