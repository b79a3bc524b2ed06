"""Every method with the kernels of each GPU backend, by the error rule; without a GPU with the CPU's."""

import pytest
import torch
from models import build, random_batch
from numerics import until_enough, with_scale

from pyglobenc.backends.cuda import _extension
from pyglobenc.backends.dispatch import load
from pyglobenc.methods.gradients.attribution import GRADIENTS
from pyglobenc.methods.registry import METHODS, MODELS

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BACKENDS = ("triton", "cuda") if ON_GPU else ("cpu",)
NAMES = ("bert-classifier", "llama")
CASES = [
    pytest.param(name, method, id=f"{name.partition('-')[0]}-{method}")
    for name in NAMES
    for method, entry in METHODS.items()
    if build(name).config.model_type in MODELS[entry.models]
]
# Its divisions by scores near 0 amplify rounding without bound, so two draws of errors don't compare.
ILL_CONDITIONED = ("lrp",)
# These run torch's own operations on every backend.
WITHOUT_KERNELS = (*GRADIENTS, "attention-flow", "w-res")
WITH_KERNELS = [case for case in CASES if case.values[1] not in (*ILL_CONDITIONED, *WITHOUT_KERNELS)]
if not ON_GPU:
    # The CPU's kernels are the same for both models.
    WITH_KERNELS = [
        case
        if case.values[0] == "bert-classifier"
        else pytest.param(*case.values, id=case.id, marks=pytest.mark.slow)
        for case in WITH_KERNELS
    ]


def calls(name, method, *backends):
    """Return a function for each (backend, dtype), from a batch on the CPU to scores and their scale."""
    entry = METHODS[method]
    # the last layer alone: what comes below divides by scores near 0
    start = dict(start_layer=2) if entry.has_start_layer else {}

    def call(backend, dtype, device):
        model = build(name, torch.float32).to(device, dtype)
        run = entry.run("test", model, backend, None, **start)

        def scores(batch):
            extra = dict(replacement=0, special_tokens_mask=torch.zeros_like(batch["input_ids"]))
            batch = batch | (extra if entry.replaces_tokens else {})
            batch = {key: t.to(device) if isinstance(t, torch.Tensor) else t for key, t in batch.items()}
            targets = torch.zeros(len(batch["input_ids"]), dtype=torch.long, device=device)
            return run(batch, targets if entry.target == "class" else None)

        return scores

    return [call(*which) for which in backends]


def batch_of(name):
    return random_batch(build(name), batch=60, n=17, pads=[0, 3, 9, 1] * 15)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name, method", WITH_KERNELS)
def test_is_as_good_as_torch(name, method, backend):
    if backend == "cuda":
        assert _extension.kernels is not None, _extension.missing
    elif load("pair_norms", backend)[0] is None:
        pytest.skip(load("pair_norms", backend)[1])
    ours, exact, plain = calls(
        name,
        method,
        (backend, torch.float32, DEVICE),
        ("reference", torch.float64, DEVICE),
        ("reference", torch.float32, DEVICE),
    )
    # A tensor core cuts sums off, where float32 rounds them: twice torch's own error.
    for compare in until_enough(4.0 if ON_GPU else 2.0):
        batch = batch_of(name)
        true = exact(batch)
        results = (ours(batch), true, plain(batch))
        compare(*(with_scale(one.scores, one.log_scale, true.log_scale) for one in results))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name, method", CASES)
def test_the_reference_gives_the_same_on_a_gpu(name, method):
    here, there = calls(
        name, method, ("reference", torch.float64, "cpu"), ("reference", torch.float64, "cuda")
    )
    batch = batch_of(name)
    expected, found = here(batch), there(batch)
    scores = with_scale(found.scores.cpu(), found.log_scale.cpu(), expected.log_scale)
    assert (scores - expected.scores).abs().max() <= 1e-6 * expected.scores.abs().max()
