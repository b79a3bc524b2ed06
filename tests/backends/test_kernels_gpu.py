"""What only a GPU shows: whole models, half precision at full size, tf32, memory, graph capture, cu_seqlens
past 2^31 bytes.
"""

import pytest
import torch
from models import build
from numerics import assert_as_good_as_torch, until_enough
from pair_cases import Case, doubled, pair_args, product
from test_kernels_pairs import factor

from pyglobenc import GlobEnc, TransformerAttribution, graphed
from pyglobenc.backends.cuda import _extension
from pyglobenc.ops import pair_norms

pytestmark = pytest.mark.gpu


def on_gpu(args: dict) -> dict:
    return {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in args.items()}


def check(r, args, backend):
    exact = product(r.double(), doubled(args), "reference")
    out, torch_out = (product(r, args, name, top=float(exact.amax())) for name in (backend, "reference"))
    assert_as_good_as_torch(out, exact, torch_out, factor(backend))


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    if request.param == "cuda" and _extension.kernels is None:
        pytest.skip(_extension.missing)
    return request.param


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_globenc_of_a_model(backend):
    model = build("bert").float().cuda()
    ids = torch.randint(5, 97, (3, 33), device="cuda")
    mask = torch.arange(33, device="cuda") < torch.tensor([[33], [20], [7]], device="cuda")
    out, expected = (
        GlobEnc(model, backend=b)(input_ids=ids, attention_mask=mask.long(), maps=("N_Enc",))
        for b in (backend, "reference")
    )
    # 3 layers of float32 on either side: a few thousand roundings of 2^-24 at most
    torch.testing.assert_close(out.scores, expected.scores, rtol=2.0**-12, atol=2.0**-16)
    torch.testing.assert_close(out.log_scale, expected.log_scale, rtol=2.0**-12, atol=2.0**-12)
    torch.testing.assert_close(out.maps["N_Enc"], expected.maps["N_Enc"], rtol=2.0**-12, atol=2.0**-12)


def test_transformer_attribution_of_a_model(backend):
    model = build("bert-classifier").float().cuda()
    ids = torch.randint(5, 97, (2, 19), device="cuda")
    out, expected = (
        TransformerAttribution(model, backend=b)(input_ids=ids, start_layer=2) for b in (backend, "reference")
    )
    # the last layer alone: what comes below divides by scores near 0, and float32 results differ at will
    torch.testing.assert_close(out.scores, expected.scores, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_bert_base_at_full_size(dtype, backend):
    args = on_gpu(pair_args(Case(B=2, H=12, Hkv=12, n=1000, dh=64, d=768, mask="right", dtype=dtype)))
    r = torch.rand(2, 3, 1000, device="cuda")
    check(r, args, backend)


def test_tf32_where_the_caller_allows_it(tf32, backend):
    args = on_gpu(pair_args(Case(B=4, H=12, Hkv=12, n=500, dh=64, d=768)))
    r = torch.rand(4, 1, 500, device="cuda")
    check(r, args, backend)


def long_layer(n: int) -> dict:
    heads, dh = 12, 64
    q, k = (
        torch.randn(1, n, heads, dh, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(2)
    )
    lse = torch.full((1, heads, n), 12.0, device="cuda")
    f = torch.randn(1, n, heads, 16, device="cuda")
    residual_sq, rstd = torch.rand(2, 1, n, device="cuda")
    own = dict(
        gram=f @ f.mT, cross=torch.randn(1, n, heads, device="cuda"), residual_sq=residual_sq, rstd=rstd
    )
    return dict(q=q, k=k, lse=lse, **own, key_mask=None, scaling=dh**-0.5, window=(-1, -1))


def test_memory_is_linear(backend):
    args, r = long_layer(16_384), torch.rand(1, 1, 16_384, device="cuda")
    product(r, args, backend)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    product(r, args, backend)
    # a copy of the keys would be 25 MB, one row of pairs for every multiprocessor 9 MB, the map 1 GB
    assert torch.cuda.max_memory_allocated() - before < 16 * 2**20


def test_longest_sequence(backend):
    n = 131_072
    args, rows = long_layer(n), torch.tensor([[0, 70_001, n - 1]], device="cuda")
    r = torch.zeros(1, 1, n, device="cuda").index_fill_(2, rows[0], 1)
    expected = pair_norms(**doubled(args), rows=rows, backend="reference").sum(1, keepdim=True)
    torch_out = pair_norms(**args, rows=rows, backend="reference").sum(1, keepdim=True)
    assert_as_good_as_torch(product(r, args, backend, top=float(expected.amax())), expected, torch_out)


def test_graph_capture(backend):
    args, r = long_layer(512), torch.rand(1, 1, 512, device="cuda")
    expected = product(r, args, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product(r, args, backend)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_attribution_as_a_graph(name, dtype):
    globenc = GlobEnc(build(name).to(dtype).cuda())
    mask = torch.arange(24, device="cuda") < torch.tensor([[24], [15]], device="cuda")
    inputs = [
        dict(
            input_ids=torch.randint(5, 97, (2, 24), device="cuda"), attention_mask=mask.long(), targets=[0, 3]
        )
        for _ in range(3)
    ]
    fast = graphed(globenc, **inputs[0])
    for batch in inputs:
        expected, found = globenc(**batch), fast(**batch)
        assert torch.equal(found.scores, expected.scores) and torch.equal(found.log_scale, expected.log_scale)
    with pytest.raises(ValueError, match="a target is a padding token"):
        fast(**inputs[0] | dict(targets=[0, 20]))


def test_transformer_attribution_as_a_graph():
    attribute = TransformerAttribution(build("bert-classifier").float().cuda())
    ids = torch.randint(5, 97, (3, 2, 19), device="cuda")
    options = dict(start_layer=2, reliability="off")
    fast = graphed(attribute, input_ids=ids[0], target=[0, 0], **options)
    for batch, target in zip(ids, (0, 1, [1, 0]), strict=True):
        expected = attribute(input_ids=batch, target=target, **options)
        # the last layer alone, as above
        torch.testing.assert_close(
            fast(input_ids=batch, target=target).scores, expected.scores, rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_sequences(name, dtype):
    exact_globenc, globenc = GlobEnc(build(name).cuda()), GlobEnc(build(name).to(dtype).cuda())
    for compare in until_enough():
        ids = [torch.randint(5, 97, (n,)).tolist() for n in (7, 40, 12, 12, 1)]
        alone = [globenc(input_ids=torch.tensor([row], device="cuda")) for row in ids]
        results = globenc.packed(input_ids=ids), exact_globenc.packed(input_ids=ids), alone
        compare(*(torch.cat([one.scores.flatten() for one in each]) for each in results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_relevance(dtype, backend):
    model, rounded = build("bert-classifier").cuda(), build("bert-classifier").to(dtype).cuda()
    # the last layer alone, as above
    options = dict(start_layer=2, target=1, reliability="off")
    exact, attribute = TransformerAttribution(model), TransformerAttribution(rounded, backend=backend)
    for compare in until_enough(4.0):
        ids = [torch.randint(5, 97, (n,)).tolist() for n in (7, 40, 12, 12, *[1] * 40)]
        alone = [attribute(input_ids=torch.tensor([row], device="cuda"), **options) for row in ids]
        results = attribute.packed(input_ids=ids, **options), exact.packed(input_ids=ids, **options), alone
        for part in (lambda one: one.scores[0], lambda one: one.output.logits[0]):
            compare(*(torch.cat([part(one) for one in each]) for each in results))


def test_runs_repeat_bit_for_bit(backend):
    args, r = long_layer(2048), torch.rand(1, 24, 2048, device="cuda")
    assert torch.equal(product(r, args, backend), product(r, args, backend))


def test_runs_on_the_current_stream(backend):
    args, r = long_layer(512), torch.rand(1, 1, 512, device="cuda")
    expected, late, stream = product(r, args, backend), torch.zeros_like(r), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # a launch elsewhere would be over long before
        torch.cuda._sleep(100_000_000)
        late.copy_(r)
        out = product(late, args, backend)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device(backend):
    args, r = long_layer(512), torch.rand(1, 1, 512, device="cuda:0")
    there = {name: t.to("cuda:1") if isinstance(t, torch.Tensor) else t for name, t in args.items()}
    out = product(r.to("cuda:1"), there, backend)
    assert out.device == torch.device("cuda:1") and torch.equal(out.cpu(), product(r, args, backend).cpu())
