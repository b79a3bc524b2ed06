"""Row mode over ranks: gloo processes against one process."""

import itertools
import multiprocessing
import os
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import build, random_batch
from numerics import SEED, assert_as_good_as_torch, with_scale
from published import Float64Throughout
from sweeps import sweep

from pyglobenc import GlobEnc
from pyglobenc.ops.attention import attention
from pyglobenc.scale import distributed
from pyglobenc.scale.distributed import ShardedGlobEnc, attend
from pyglobenc.scale.sequence_shards import Shares

N, D, HEADS, DEPTH = 37, 48, 4, 3
CASES = [
    ("bert", torch.float64, "N_Enc"),
    ("bert", torch.float32, "N_Enc"),
    ("roberta", torch.float64, "N_ResLN"),
    ("electra", torch.float64, "N"),
    # None: the deepest stage that a pre-norm model has
    ("gpt2", torch.float64, None),
    ("llama", torch.float32, None),
    ("mistral", torch.float64, "N"),
    ("gemma3", torch.float64, None),
    ("modernbert", torch.float64, None),
    # Windows that see only the token itself; one token more than a chunk of 2 ranks and of 4; exactly a chunk
    # of 2 ranks; three chunks of 4 ranks; the whole text but for a token.
    *(("mistral", torch.float64, None, dict(sliding_window=size)) for size in (1, 10, 15, 36)),
    ("mistral", torch.float32, None, dict(sliding_window=9)),
    ("gemma3", torch.float64, None, dict(sliding_window=20)),
    *(("modernbert", torch.float64, None, dict(local_attention=size)) for size in (10, 18, 40)),
]
WORLDS = (2, 4)
# Every stage, dtype and architecture; windows of one token, of 15 and 9 tokens, and of both sides. The tests
# below this sweep read cases 0 and 1.
PLACES = list(itertools.product(WORLDS, range(len(CASES))))
EACH = [(2, 0), (4, 0), (2, 1), (4, 1), (4, 2), (2, 3), (4, 4), (2, 5), (2, 7), (4, 8), (4, 9), (2, 11)]
EACH += [(4, 13), (2, 15)]
IDS = ["-".join(map(str, (world, *CASES[number]))) for world, number in PLACES]
RESULTS = ("scores", "log_scale", "layer_scores", "layer_log_scale")


def targets_of(dtype):
    """Every token in float32, so that there are enough numbers for the error rule; a few in float64."""
    return list(range(N)) if dtype == torch.float32 else [0, 36, 17]


def call(case):
    """Model and arguments, the same in every process."""
    name, dtype, stage, *changes = case
    torch.manual_seed(SEED)
    longer = {"n_positions" if name == "gpt2" else "max_position_embeddings": 64}
    model = build(name, dtype, **longer, **dict(*changes))
    ids = random_batch(model, 1, N)["input_ids"]
    # RoBERTa's positions pass over the padding id inside a text
    ids[0, [4, 20]] = model.config.pad_token_id
    return model, dict(input_ids=ids, targets=targets_of(dtype), stage=stage, layers=True)


class Counted:
    """What one rank receives, and how many gathers are on their way while it computes products.

    `received` and `reduced` hold the shape of each slice that arrives and of each tensor that is summed up.
    """

    def __init__(self, patch):
        self.received, self.reduced, self.meanwhile, self.bytes, on_the_way = [], [], [], 0, set()
        exchange, reduce = dist.batch_isend_irecv, dist.all_reduce

        class Waited:
            def __init__(self, transfer, number):
                self.transfer, self.number = transfer, number

            def wait(self):
                on_the_way.discard(self.number)
                self.transfer.wait()

        def counted_exchange(transfers):
            slices = [one.tensor for one in transfers if one.op == dist.irecv]
            self.received += [tuple(t.shape) for t in slices]
            self.bytes += sum(t.numel() * t.element_size() for t in slices)
            number = object()
            on_the_way.add(number)
            return [Waited(transfer, number) for transfer in exchange(transfers)]

        def counted_reduce(t, group=None):
            self.reduced.append(tuple(t.shape))
            return reduce(t, group=group)

        def observed(product):
            def run(*args, **kwargs):
                self.meanwhile.append((product.__name__, len(on_the_way)))
                return product(*args, **kwargs)

            return run

        patch.setattr(dist, "batch_isend_irecv", counted_exchange)
        patch.setattr(dist, "all_reduce", counted_reduce)
        for product in (distributed.attend, distributed.pair_norms):
            patch.setattr(distributed, product.__name__, observed(product))


def received_by(model, rank, world):
    """Return how many bytes a rank must receive in a call, counted one pair of tokens at a time."""
    size, heads = model.dtype.itemsize, model.config.num_attention_heads
    keys = D // heads * getattr(model.config, "num_key_value_heads", heads)
    own = [i for chunk in Shares(N, rank, world).own for i in range(chunk.start, chunk.stop)]
    total = 0
    for left, right in windows(model):
        seen = {j for i in own for j in range(N) if (i - j <= left if j < i else j - i <= right)}
        # keys and values in the forward pass, keys and G in the rollout; G is float32 at least
        total += len(seen - set(own)) * (3 * keys * size + heads**2 * max(size, 4))
    return total


def windows(model):
    """Return the window (left, right) of each layer by the model's config, N for an unlimited side."""
    config, count = model.config, model.config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
    size = getattr(config, "sliding_window", None) or N + 1
    causal = config.model_type in ("gpt2", "llama", "mistral", "gemma3_text")
    # ModernBERT's config counts the tokens on one side in sliding_window
    reach = size if config.model_type == "modernbert" else size - 1
    limits = [reach if kind == "sliding_attention" else N for kind in kinds]
    return [(limit, 0 if causal else limit) for limit in limits]


def worker(rank, folder, places):
    """One of four processes, of which the first two are a group of their own too."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=max(WORLDS))
    for world in WORLDS:
        group = dist.new_group(range(world))
        if rank >= world:
            continue
        for number in (number for size, number in places if size == world):
            case = CASES[number]
            model, arguments = call(case)
            with (
                pytest.MonkeyPatch.context() as patch,
                Float64Throughout() if case[1] == torch.float64 else nullcontext(),
            ):
                counted = Counted(patch)
                result = ShardedGlobEnc(model, group=group)(**arguments)
            found = {name: getattr(result, name) for name in RESULTS}
            torch.save(
                found | vars(counted),
                f"{folder}/{number}-{rank}-{world}.pt",
            )
            assert model.config._attn_implementation == "sdpa"
        with pytest.raises(ValueError, match="at least"):
            ShardedGlobEnc(model, group=group)(input_ids=arguments["input_ids"][:, : world - 1])
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def every_output(request, tmp_path_factory):
    """Results of every rank by number of ranks and of the case, for the cases of the tests that run."""
    wanted = {
        (item.callspec.params["world"], item.callspec.params["number"])
        for item in request.session.items
        if item.path == request.path and item.name.startswith(("test_ranks_agree", "test_each_rank_receives"))
    }
    places = sorted(wanted | {place for place in EACH if place[1] < 2})
    folder = tmp_path_factory.mktemp("ranks")
    # The ranks are forked from one process that has imported everything, since imports take most of the time.
    multiprocessing.set_forkserver_preload(["models", "numerics", "published", "pyglobenc.scale.distributed"])
    mp.start_processes(worker, (str(folder), places), nprocs=max(WORLDS), start_method="forkserver")
    return {
        (world, number): [torch.load(folder / f"{number}-{rank}-{world}.pt") for rank in range(world)]
        for world, number in places
    }


@pytest.fixture(params=WORLDS)
def outputs(request, every_output):
    """Results of the first two cases, of every rank."""
    return [every_output[request.param, number] for number in (0, 1)]


@pytest.mark.parametrize("world, number", sweep(PLACES, EACH), ids=IDS)
def test_ranks_agree_with_one_process(every_output, world, number):
    outputs = every_output[world, number]
    model, arguments = call(CASES[number])
    alone = GlobEnc(model)(**arguments)
    with Float64Throughout():
        exact = GlobEnc(model.double())(**arguments)
    for rank in outputs:
        assert all(torch.equal(rank[name], outputs[0][name]) for name in RESULTS), (
            "every rank has the same result"
        )
    ours = outputs[0]
    if ours["scores"].dtype == torch.float32:
        for scores, scale in (("scores", "log_scale"), ("layer_scores", "layer_log_scale")):
            exact_scale = getattr(exact, scale)
            torch_out = with_scale(getattr(alone, scores), getattr(alone, scale), exact_scale)
            assert_as_good_as_torch(
                with_scale(ours[scores], ours[scale], exact_scale), getattr(exact, scores), torch_out
            )
        return
    for name in RESULTS:
        best = getattr(exact, name)
        # sums of N non-negative terms in another order, one in each layer
        assert (ours[name] - best).abs().max() <= DEPTH * N * torch.finfo(
            torch.float64
        ).eps * best.abs().max()


@pytest.mark.parametrize("world, number", sweep(PLACES, EACH), ids=IDS)
def test_each_rank_receives_the_tokens_that_its_queries_see(every_output, world, number):
    model = call(CASES[number])[0]
    for rank, found in enumerate(every_output[world, number]):
        assert found["bytes"] == received_by(model, rank, world)


def test_the_ranks_sum_up_one_row_of_each_layer(outputs):
    targets, shapes = len(targets_of(CASES[1][1])), outputs[1][0]["reduced"]
    # one all-reduce a layer; the rows that enter at each layer, which layers=True asks for, take one more in
    # all but the last
    assert shapes[0] == (1, targets, N) and len(shapes) == 2 * DEPTH - 1
    assert all(shape[0] == 1 and shape[2] == N for shape in shapes)


def test_gathers_run_while_products_are_computed(outputs):
    """Only the last heads of a layer, and the lowest layer of the rollout, have nothing to wait for."""
    for rank in outputs[0]:
        attended = [count for name, count in rank["meanwhile"] if name == "attend"]
        # keys and values of the next heads; each chunk of queries takes one call
        assert attended == ([2] * 2 * (HEADS - 1) + [0] * 2) * DEPTH
        norms = [count for name, count in rank["meanwhile"] if name == "pair_norms"]
        # keys and Gram matrices of the next layer
        assert set(norms) == {0, 2} and norms == sorted(norms, reverse=True)
        assert norms.count(0) in (2, 3), "two chunks, and the targets' rows where the rank holds one"


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (0, 0), (3, 0), (3, 3), (9, 2), (2, 9), (40, 0)])
@pytest.mark.parametrize("n, world", [(5, 4), (8, 4), (37, 2), (37, 3), (50, 1)])
def test_tokens_that_a_rank_wants_of_another(n, world, window):
    left, right = (n if side < 0 else side for side in window)
    shares = Shares(n, 0, world)
    tokens = [
        [i for chunk in shares.chunks(rank) for i in range(chunk.start, chunk.stop)] for rank in range(world)
    ]
    for owner in range(world):
        for reader in range(world):
            seen = [j for j in tokens[owner] if any(i - left <= j <= i + right for i in tokens[reader])]
            pieces = shares.wanted(owner, reader, window)
            assert [j for piece in pieces for j in range(piece.start, piece.stop)] == seen


@pytest.mark.parametrize("n, world", [(5, 4), (8, 4), (4, 4), (1, 1), (37, 2), (1000, 4)])
def test_shares_cover_every_token_once_and_weigh_the_same(n, world):
    shares = [
        [i for chunk in Shares(n, 0, world).chunks(rank) for i in range(chunk.start, chunk.stop)]
        for rank in range(world)
    ]
    assert sorted(i for share in shares for i in share) == list(range(n))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    if n == 1000:
        # keys that a causal model's queries see
        pairs = [sum(i + 1 for i in share) for share in shares]
        assert max(pairs) <= 1.01 * min(pairs)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0), (3, 3), (70, 0), (0, 0)])
@pytest.mark.parametrize("rows", [slice(0, 9), slice(20, 33), slice(36, 37)])
def test_attention_of_a_chunk_is_that_of_its_queries(rows, window):
    q, k, v = (torch.randn(1, 2, N, 8, dtype=torch.float64) for _ in range(3))
    o, lse = attention(q, k, v, window=window, scaling=0.3)
    found = attend(q[:, :, rows], k, v, rows, window, 0.3)
    torch.testing.assert_close(found, (o[:, :, rows], lse[:, :, rows]), rtol=1e-12, atol=1e-12)


def test_refusals(tmp_path):
    with pytest.raises(RuntimeError, match="isn't initialised"):
        ShardedGlobEnc(build("bert"))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="architecture must be one of bert"):
            ShardedGlobEnc(build("distilbert"))
        model, arguments = call(CASES[0])
        for changes, message in (
            (dict(stage="x"), "stage must be"),
            (dict(targets=[]), "targets must"),
            (dict(targets=[N]), "targets must"),
            (dict(targets="most"), "targets must be token positions or 'mean'"),
            (dict(input_ids=arguments["input_ids"].expand(2, -1)), r"must be \(1, n\)"),
            (dict(input_ids=torch.ones(1, 65, dtype=torch.long)), "65 tokens and the model takes 64"),
            (dict(input_ids=arguments["input_ids"] + 97), r"input_ids must lie in \[0, 97\)"),
            (dict(token_type_ids=torch.full((1, N), 7)), r"token_type_ids must lie in \[0, 2\)"),
        ):
            with pytest.raises(ValueError, match=message):
                ShardedGlobEnc(model)(**(arguments | changes))
        with pytest.raises(TypeError, match=r"ShardedGlobEnc: takes no target; did you mean targets\?"):
            ShardedGlobEnc(model)(**arguments, target=0)
        llama, arguments = call(CASES[5])
        with pytest.raises(TypeError, match="takes no token_type_ids: LlamaForCausalLM has no token types"):
            ShardedGlobEnc(llama)(**arguments, token_type_ids=torch.ones_like(arguments["input_ids"]))
    finally:
        dist.destroy_process_group()
    assert not os.environ.get("RANK")


@pytest.mark.parametrize("number", [0, 4])
def test_the_mean_of_all_rows(tmp_path, number):
    model, arguments = call(CASES[number])
    arguments |= {"targets": "mean"}
    exact = GlobEnc(model)(**arguments)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = ShardedGlobEnc(model)(**arguments)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(found.scores, exact.scores)
    torch.testing.assert_close(found.log_scale, exact.log_scale)


def test_autocast(tmp_path):
    """Rotated queries and keys are float32 under autocast, and values are not."""
    model, arguments = call(("llama", torch.float32, None))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = ShardedGlobEnc(model)(**arguments), GlobEnc(model)(**arguments)
    finally:
        dist.destroy_process_group()
    assert_as_good_as_torch(found.scores, GlobEnc(model)(**arguments).scores.double(), expected.scores)
