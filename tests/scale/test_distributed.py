"""Row mode over ranks: gloo processes against one process."""

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

from pyglobenc import GlobEnc
from pyglobenc.ops.attention import attention
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
]
WORLDS = (2, 4)
RESULTS = ("scores", "log_scale", "layer_scores", "layer_log_scale")


def targets_of(dtype):
    """Every token in float32, so that there are enough numbers for the error rule; a few in float64."""
    return list(range(N)) if dtype == torch.float32 else [0, 36, 17]


def call(case):
    """Model and arguments, the same in every process."""
    name, dtype, stage = case
    torch.manual_seed(SEED)
    model = build(name, dtype, **{"n_positions" if name == "gpt2" else "max_position_embeddings": 64})
    ids = random_batch(model, 1, N)["input_ids"]
    # RoBERTa's positions pass over the padding id inside a text
    ids[0, [4, 20]] = model.config.pad_token_id
    return model, dict(input_ids=ids, targets=targets_of(dtype), stage=stage, layers=True)


class Counted:
    """Bytes that one rank receives, by collective, as a ring sends them."""

    def __init__(self, monkeypatch, world):
        self.calls, self.bytes, others = [], 0.0, (world - 1) / world
        gather, reduce = dist.all_gather_into_tensor, dist.all_reduce

        def counted_gather(out, mine, group=None):
            self.bytes += out.numel() * out.element_size() * others
            return gather(out, mine, group=group)

        def counted_reduce(t, group=None):
            self.calls.append(tuple(t.shape))
            self.bytes += 2 * t.numel() * t.element_size() * others
            return reduce(t, group=group)

        monkeypatch.setattr(dist, "all_gather_into_tensor", counted_gather)
        monkeypatch.setattr(dist, "all_reduce", counted_reduce)


def bytes_received(
    *, n: int, keys: int, heads: int, layers: int, targets: int, world: int, size: int = 4
) -> dict[str, float]:
    """Bytes that one rank receives in a call, by collective; ring algorithms are assumed.

    Args:
        n, heads, layers, targets, world: tokens, query heads, layers, target rows, ranks.
        keys: width of a token's keys, all key-value heads together.
        size: bytes of an activation.

    The Gram matrices and the rows of the rollout are float32 whatever the activations are.
    """
    others = (world - 1) / world
    return {
        "gather k, v (forward)": others * layers * 2 * n * keys * size,
        "gather k (rollout)": others * layers * n * keys * size,
        "gather G (rollout)": others * layers * n * heads**2 * 4,
        "all-reduce r": 2 * others * layers * targets * n * 4,
    }


def worker(rank, folder):
    """One of four processes, of which the first two are a group of their own too."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=max(WORLDS))
    for world in WORLDS:
        group = dist.new_group(range(world))
        if rank >= world:
            continue
        for number, case in enumerate(CASES):
            model, arguments = call(case)
            with (
                pytest.MonkeyPatch.context() as patch,
                Float64Throughout() if case[1] == torch.float64 else nullcontext(),
            ):
                counted = Counted(patch, world)
                result = ShardedGlobEnc(model, group=group)(**arguments)
            found = {name: getattr(result, name) for name in RESULTS}
            torch.save(
                found | {"reduced": counted.calls, "bytes": counted.bytes},
                f"{folder}/{number}-{rank}-{world}.pt",
            )
            assert model.config._attn_implementation == "sdpa"
        with pytest.raises(ValueError, match="at least"):
            ShardedGlobEnc(model, group=group)(input_ids=arguments["input_ids"][:, : world - 1])
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def every_output(tmp_path_factory):
    """Results by number of ranks: of every case those of every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    # The ranks are forked from one process that has imported everything, since imports take most of the time.
    multiprocessing.set_forkserver_preload(["models", "numerics", "published", "pyglobenc.scale.distributed"])
    mp.start_processes(worker, (str(folder),), nprocs=max(WORLDS), start_method="forkserver")
    cases = range(len(CASES))
    return {
        world: [
            [torch.load(folder / f"{number}-{rank}-{world}.pt") for rank in range(world)] for number in cases
        ]
        for world in WORLDS
    }


@pytest.fixture(params=WORLDS)
def outputs(request, every_output):
    return every_output[request.param]


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{name}-{dtype}-{stage}" for name, dtype, stage in CASES]
)
def test_ranks_agree_with_one_process(outputs, number):
    model, arguments = call(CASES[number])
    alone = GlobEnc(model)(**arguments)
    with Float64Throughout():
        exact = GlobEnc(model.double())(**arguments)
    for rank in outputs[number]:
        assert all(torch.equal(rank[name], outputs[number][0][name]) for name in RESULTS), (
            "every rank has the same result"
        )
    ours = outputs[number][0]
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


def test_communication_is_as_counted(outputs):
    world, received, targets = len(outputs[0]), outputs[1][0], len(targets_of(CASES[1][1]))
    # one all-reduce a layer; the rows that enter at each layer, which layers=True asks for, take one more in
    # all but the last
    shapes = received["reduced"]
    assert shapes[0] == (1, targets, N) and len(shapes) == 2 * DEPTH - 1
    assert all(shape[0] == 1 and shape[2] == N for shape in shapes)
    even = -(-N // world) * world
    counted = bytes_received(n=even, keys=D, heads=HEADS, layers=DEPTH, targets=targets, world=world)
    rows = sum(shape[1] for shape in shapes)
    expected = sum(counted.values()) + counted["all-reduce r"] * (rows * N / (DEPTH * targets * even) - 1)
    assert received["bytes"] == pytest.approx(expected)


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
