"""Attribution as a CUDA graph: nothing in it waits for the device, which a CPU can show, and replays give
what the method gives.
"""

import pytest
import torch
from kernel_resources import arguments, meta, record
from models import build
from torch.utils._python_dispatch import TorchDispatchMode

import pyglobenc.hf.trace.attention
import pyglobenc.scale.graphs
from pyglobenc import GlobEnc, TransformerAttribution, graphed
from pyglobenc.common.deferred import checks_put_off, look, require
from pyglobenc.methods.rollout.baselines import ROLLOUTS, Rollout
from pyglobenc.ops import linear_relevance

WAITS = (
    "aten::_local_scalar_dense aten::is_nonzero aten::nonzero aten::masked_select aten::equal aten::_unique2"
).split()


class NothingIsRead(TorchDispatchMode):
    """Raises at an op that on a GPU would wait for a value."""

    reading = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # a boolean index asks for the number of its true entries
        masks = (
            [t for t in args[1] if t is not None and t.dtype == torch.bool]
            if func._schema.name == "aten::index"
            else []
        )
        assert self.reading or (func._schema.name not in WAITS and not masks), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def nothing_is_read(monkeypatch):
    """Mode of the recorded region; what dispatch doesn't show, the ways to the host without an op, raises
    too.
    """
    mode, window = NothingIsRead(), pyglobenc.hf.trace.attention._window

    def on_the_cpu(visible, batch, n):
        # looks at index tensors that it makes on the CPU itself
        mode.reading = True
        try:
            return window(visible, batch, n)
        finally:
            mode.reading = False

    def refused(own):
        def call(self, *args, **kwargs):
            assert not torch._C._len_torch_dispatch_stack(), "goes to the host"
            return own(self, *args, **kwargs)

        return call

    monkeypatch.setattr(pyglobenc.hf.trace.attention, "_window", on_the_cpu)
    # what transformers goes by while a stream is captured
    capturing = "transformers.utils.import_utils.is_cuda_stream_capturing"
    monkeypatch.setattr(capturing, lambda: torch._C._len_torch_dispatch_stack() > 0)
    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refused(getattr(torch.Tensor, name)))
    return mode


def batch(n=9, pads=3):
    """Two examples, the second padded."""
    mask = torch.ones(2, n, dtype=torch.long)
    mask[1, n - pads :] = 0
    return dict(
        input_ids=torch.randint(5, 97, (2, n)), attention_mask=mask, targets=torch.tensor([[0, 2], [1, 0]])
    )


def check_nothing_is_read(mode, method, **options):
    given = batch() | options
    expected = method(**given)
    with checks_put_off() as checks, mode:
        found = method(**given)
    look(checks)
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.log_scale, expected.log_scale)


@pytest.mark.parametrize(
    "name",
    ["bert", "roberta", "albert", "modernbert", "gpt2", "mistral", "gemma2", "gemma3", "mpnet", "deberta-v3"],
)
def test_nothing_is_read(name, nothing_is_read):
    check_nothing_is_read(nothing_is_read, GlobEnc(build(name).float()))


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_nothing_is_read_without_a_mask(name, nothing_is_read, monkeypatch):
    globenc, given = GlobEnc(build(name).float()), batch(pads=0)
    del given["attention_mask"]
    expected = globenc(**given)

    def refuse(position_ids):
        raise AssertionError("makes a mask on the device that the host would have to read")

    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", refuse)
    with checks_put_off(), nothing_is_read:
        found = globenc(**given)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [name for name in ROLLOUTS if name != "attention-flow"])
def test_nothing_is_read_in_the_family(method, nothing_is_read):
    check_nothing_is_read(nothing_is_read, Rollout(build("bert").float(), method), layers=True)


@pytest.mark.parametrize("variant", ["transformer_attribution", "last_layer", "lrp", "attn_gradcam"])
def test_nothing_is_read_by_transformer_attribution(variant, nothing_is_read):
    attribute = TransformerAttribution(build("bert-classifier"))
    given = batch() | dict(target=torch.tensor([0, 1]), contrast=torch.tensor([1, 0]), variant=variant)
    del given["targets"]
    expected = attribute(**given)
    with checks_put_off() as checks, nothing_is_read:
        found = attribute(**given)
    look(checks)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-6, atol=1e-9)


OPS = (
    "rollout_step pair_norms head_gram mapped_square add_relevance clone_relevance linear_relevance "
    "relevance_attention"
).split()


@pytest.mark.parametrize("op", OPS)
def test_launchers_read_nothing(op):
    case = dict(op=op, heads=4, kv_heads=4, head_dim=16, dtype="float32", rows=1, full=True, packed=True)
    # meta tensors have no values to read
    assert record(op, arguments(case, n=32))


def test_linear_relevance_without_kernels_reads_nothing():
    r, x, weight = meta(2, 5, 4), meta(2, 5, 3), meta(4, 3)
    with checks_put_off():
        assert linear_relevance(r, x, weight).shape == x.shape
    r, x, weight = torch.randn(2, 5, 4).double(), torch.randn(2, 5, 3).double(), torch.randn(4, 3)
    with checks_put_off():
        clamped = linear_relevance(r, x, weight)
    torch.testing.assert_close(clamped, linear_relevance(r, x, weight), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "read", [bool, int, lambda t: t.tolist(), lambda t: t.cpu(), lambda t: t[t > 0], torch.nonzero]
)
def test_reads_are_seen(read, nothing_is_read):
    with pytest.raises(AssertionError), nothing_is_read:
        read(torch.ones(1))


def test_checks_wait_for_the_replay():
    t = torch.ones(())
    with checks_put_off() as checks:
        require(t == 1, lambda: ValueError("not 1"))
        require(t < 2, lambda: ValueError(f"{int(t)} is too large"))
    look(checks)
    with pytest.raises(ValueError, match="not 1"):
        require(t == 0, lambda: ValueError("not 1"))
    checks[1].holds.fill_(False)
    with pytest.raises(ValueError, match="1 is too large"):
        look(checks)


@pytest.fixture
def recorded_on_the_cpu(monkeypatch):
    """In the place of a graph: a call that writes its results over those of the first."""

    def record(run, device):
        with checks_put_off() as checks:
            result = run()

        def replay():
            with checks_put_off() as again:
                new = run()
            for name, t in vars(new).items():
                if isinstance(t, torch.Tensor):
                    getattr(result, name).copy_(t)
            for old, check in zip(checks, again, strict=True):
                old.holds.copy_(check.holds)

        return replay, result, checks

    monkeypatch.setattr(pyglobenc.scale.graphs, "_record", record)


def test_replays_are_what_the_method_gives(recorded_on_the_cpu):
    globenc = GlobEnc(build("bert").float())
    fast = graphed(globenc, **batch(pads=1), stage="N_ResLN")
    inputs = [batch(), batch(pads=0), batch(pads=7) | dict(targets=[[1, 0], [1, 1]])]
    results = [fast(**given) for given in inputs]
    for given, found in zip(inputs, results, strict=True):
        expected = globenc(**given, stage="N_ResLN")
        # a mask without padding is computed as one with
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.log_scale, expected.log_scale, rtol=1e-5, atol=1e-5)


def test_replays_of_transformer_attribution(recorded_on_the_cpu):
    attribute = TransformerAttribution(build("bert-classifier"))
    inputs = [
        batch(pads=pads) | dict(target=target)
        for pads, target in ((2, [0, 1]), (0, 1), (5, torch.tensor([1, 0])))
    ]
    for given in inputs:
        del given["targets"]
    fast = graphed(attribute, **inputs[0], start_layer=1)
    results = [fast(**given) for given in inputs]
    for given, found in zip(inputs, results, strict=True):
        expected = attribute(**given, start_layer=1)
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-6, atol=1e-9)
        assert torch.equal(found.target, expected.target)
    with pytest.raises(ValueError, match="graphed: target must lie in .0, 2., got 0 to 2"):
        fast(**inputs[0] | dict(target=[0, 2]))


def test_what_a_replay_refuses(recorded_on_the_cpu):
    model = build("bert").float()
    fast, given = graphed(GlobEnc(model), **batch()), batch()
    for wrong, message in (
        (batch(n=10), r"input_ids was recorded as \(2, 9\) torch.int64, got \(2, 10\)"),
        (given | dict(targets=[[9, 0], [0, 0]]), r"targets must lie in \[0, 9\), got 0 to 9"),
        (given | dict(targets=[[8, 0], [8, 0]]), "a target is a padding token"),
        (given | dict(attention_mask=torch.zeros(2, 9, dtype=torch.long)), "an example has no real token"),
        (given | dict(layers=True), "recorded with input_ids, attention_mask, targets, got"),
        (
            dict(input_ids=given["input_ids"]),
            "recorded with input_ids, attention_mask, targets, got input_ids",
        ),
        (dict(), "recorded with input_ids, attention_mask, targets, got"),
    ):
        with pytest.raises(ValueError, match=message):
            fast(**wrong)
    fast(**given)
    model.encoder.layer[0].attention.self.query.weight.data *= 1e4
    with pytest.raises(ValueError, match="too large for float32; ask for dtype=torch.float64"):
        fast(**given)


def test_what_cannot_be_recorded():
    globenc = GlobEnc(build("bert").float())
    with pytest.raises(ValueError, match="a CUDA graph needs the model on a CUDA GPU, got cpu"):
        graphed(globenc, **batch())
    with pytest.raises(ValueError, match="records scores, no maps"):
        graphed(globenc, **batch(), maps=("N",))
    for method in (globenc.model, Rollout(globenc.model, "attention-flow")):
        with pytest.raises(
            TypeError, match="GlobEnc, a Rollout other than attention-flow, or TransformerAttribution"
        ):
            graphed(method, **batch())


def test_weights_are_read_where_they_lay(recorded_on_the_cpu):
    model = build("bert").float()
    globenc = GlobEnc(model)
    fast, given, dense = (
        graphed(globenc, **batch(pads=1)),
        batch(),
        model.encoder.layer[1].attention.output.dense,
    )
    before = fast(**given).scores
    dense.weight.data.mul_(3)
    torch.testing.assert_close(fast(**given).scores, globenc(**given).scores, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(fast(**given).scores, before, rtol=1e-3)
    for change in (
        lambda: setattr(dense.weight, "data", dense.weight.data * 2),
        lambda: setattr(dense, "weight", torch.nn.Parameter(dense.weight.data.clone())),
        lambda: setattr(model.encoder.layer[1].attention.output, "dense", torch.nn.Linear(48, 48)),
    ):
        fast = graphed(globenc, **batch(pads=1))
        kept = dense.weight.data
        change()
        with pytest.raises(ValueError, match="moved, replaced or adapted since the graph was recorded"):
            fast(**given)
        del kept
