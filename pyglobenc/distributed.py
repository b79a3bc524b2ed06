"""Row mode of one long sequence over the ranks of torch.distributed: every rank holds a share of the tokens.

Each rank runs the stock model on its own tokens; an attention layer gathers the keys and values of all, so that the forward pass is
split as evenly as the rollout. Down the layers a rank takes the rows of the norms of its own queries, against the gathered keys and Gram
matrices, and one all-reduce of a (T, n) array a layer adds the ranks' shares of r @ norms. What a rank keeps of a layer is its own
tokens' share; only one layer's keys and Gram matrices are whole at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from pyglobenc.hf import LayerTrace, capture, find_layers
from pyglobenc.hf.attention import RECORDERS
from pyglobenc.hf.limits import max_tokens
from pyglobenc.methods.inputs import check_model
from pyglobenc.methods.layer_matrix import NormMatrix
from pyglobenc.methods.rollout import RolloutResult, roll_out_rows, rollout_result
from pyglobenc.methods.stages import STAGES, StageOps
from pyglobenc.ops import token_norms
from pyglobenc.reference.rollout_step import rescale_rows

NAME = "pyglobenc_sharded"
# first position of a text; the others count from after the padding index
FIRST_POSITION = {"bert": 0, "electra": 0, "roberta": None, "xlm-roberta": None, "camembert": None}
# queries whose norms exist at a time: a (block, n) array, no larger than the hidden states of all tokens
BLOCK = 256

aten = torch.ops.aten


@dataclass(frozen=True)
class Shares:
    """How n tokens lie on the ranks of a group: in order, shares differing by one token at most."""

    n: int
    rank: int
    world: int
    group: Any = None

    def bounds(self, rank: int) -> tuple[int, int]:
        """First token of a rank's share, and the one after its last."""
        size, more = divmod(self.n, self.world)
        start = rank * size + min(rank, more)
        return start, start + size + (rank < more)

    @property
    def own(self) -> slice:
        return slice(*self.bounds(self.rank))

    def gather(self, t: Tensor, dim: int) -> Tensor:
        """The whole of a tensor whose axis dim is split over the ranks."""
        largest = -(-self.n // self.world)
        t = t.movedim(dim, 0).contiguous()
        # every rank must send as much as the others
        mine = t if t.shape[0] == largest else torch.cat([t, t[-1:]])
        parts = t.new_empty(self.world * largest, *t.shape[1:])
        dist.all_gather_into_tensor(parts, mine, group=self.group)
        sizes = [stop - start for start, stop in map(self.bounds, range(self.world))]
        whole = torch.cat([part[:size] for part, size in zip(parts.split(largest), sizes, strict=True)])
        return whole.movedim(0, dim)

    def place(self, t: Tensor, dim: int) -> Tensor:
        """A tensor of all tokens' size with the rank's own in their places; the others are never read."""
        whole = t.new_zeros(*t.shape[:dim], self.n, *t.shape[dim + 1 :])
        whole.narrow(dim, self.own.start, t.shape[dim]).copy_(t)
        return whole


# attention modules at work -> how the tokens lie on the ranks
_SHARES: dict[nn.Module, Shares] = {}


def sharded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Own queries (1, H, m, dh) against the keys and values of all ranks, for transformers' attention interface."""
    shares = _SHARES[module]
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    k, v = shares.gather(key, 2), shares.gather(value, 2)
    if query.device.type == "cpu":
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, k, v, 0.0, False, scale=scaling)
    else:
        o, lse = aten._scaled_dot_product_efficient_attention(query, k, v, None, True, 0.0, False, scale=scaling)[:2]
    RECORDERS[module](q=query, k=key, v=value, o=o, lse=lse[:, :, : query.shape[2]], scaling=scaling)
    return o.transpose(1, 2).contiguous(), None


def _no_mask(**kwargs: Any) -> None:
    """One sequence without padding needs no mask."""


AttentionInterface.register(NAME, sharded_attention)
AttentionMaskInterface.register(NAME, _no_mask)


@dataclass
class ShardedMatrix:
    """One layer's norms, rows of the rank's own queries; what `roll_out_rows` asks of a matrix. Fields of `local` hold own tokens."""

    local: NormMatrix
    shares: Shares

    def __post_init__(self):
        m, shares = self.local, self.shares
        self._args = dict(k=shares.gather(m.k, 2), gram=shares.gather(m.gram, 1), q=shares.place(m.q, 2), lse=shares.place(m.lse, 2))
        for name in ("cross", "residual_sq", "rstd"):
            value = getattr(m, name)
            self._args[name] = None if value is None else shares.place(value, 1)
        self._args |= dict(scaling=m.scaling, window=m.window, backend=m.backend)

    def rows(self, targets: Tensor) -> Tensor:
        """Rows `targets` (1, T) of the matrix, (1, T, n), on every rank."""
        own = self.shares.own
        mine = (targets[0] >= own.start) & (targets[0] < own.stop)
        out = self.local.gram.new_zeros(1, targets.shape[1], self.shares.n)
        if mine.any():
            out[:, mine] = token_norms(**self._args, rows=targets[:, mine])
        dist.all_reduce(out, group=self.shares.group)
        return out

    def step(self, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """r (1, T, n) times the matrix, each row scaled to maximum 1, and the new log_scale (1, T), on every rank."""
        out, own = torch.zeros_like(r), self.shares.own
        for i in torch.arange(own.start, own.stop, device=r.device).split(BLOCK):
            out += r[:, :, i] @ token_norms(**self._args, rows=i[None])
        dist.all_reduce(out, group=self.shares.group)
        return rescale_rows(out, log_scale)


class ShardedGlobEnc:
    """`GlobEnc` in row mode for one sequence that the ranks of a process group share.

    Args:
        model: BERT, ELECTRA or a RoBERTa, the same on every rank, in evaluation mode; left as it is.
        backend: as for `GlobEnc`.
        group: process group of torch.distributed; None is the default group.

    Raises:
        RuntimeError: torch.distributed isn't initialised.
        TypeError, ValueError: another architecture, or as `GlobEnc`.
    """

    def __init__(self, model: PreTrainedModel, backend: str = "auto", group: Any = None):
        if not dist.is_initialized():
            raise RuntimeError("ShardedGlobEnc: torch.distributed isn't initialised; call init_process_group first")
        check_model("ShardedGlobEnc", model, backend, None)
        if model.config.model_type not in FIRST_POSITION:
            known = ", ".join(FIRST_POSITION)
            raise ValueError(f"ShardedGlobEnc: architecture must be one of {known}, got {model.config.model_type!r}")
        self.model, self.group = model, group
        self.ops = StageOps(backend)

    @torch.no_grad()
    def __call__(
        self,
        *,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        targets: Sequence[int] = (0,),
        stage: str = "N_Enc",
        layers: bool = False,
    ) -> RolloutResult:
        """Attribute target tokens of one sequence to all its tokens; every rank calls it with the same arguments.

        Args:
            input_ids: (1, n), the whole sequence without padding, n at least the number of ranks.
            token_type_ids: (1, n), or None.
            targets: T token positions; 0 is [CLS].
            stage, layers: as for `GlobEnc`.

        Returns:
            RolloutResult, the same on every rank, without the model's output. The arithmetic is the model's, float32 at least.

        Raises:
            ValueError: unknown stage, shapes or targets that don't fit, input longer than the model takes, a result that isn't finite.
        """
        shares = self._shares(input_ids, targets, stage)
        batch = {"input_ids": input_ids, "position_ids": self._positions(input_ids), "token_type_ids": token_type_ids}
        own = {name: t[:, shares.own] for name, t in batch.items() if t is not None}
        captured = self._run(own, shares)
        rows = torch.as_tensor(targets, device=input_ids.device)[None]
        matrices = (ShardedMatrix(self.ops.norm_matrix(layer, stage), shares) for layer in reversed(captured))
        return rollout_result("ShardedGlobEnc", *roll_out_rows(matrices, rows, layers), layers)

    def _shares(self, input_ids: Tensor, targets: Sequence[int], stage: str) -> Shares:
        rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        if stage not in STAGES:
            raise ValueError(f"ShardedGlobEnc: stage must be one of {', '.join(STAGES)}, got {stage!r}")
        if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < world:
            raise ValueError(f"ShardedGlobEnc: input_ids must be (1, n) with n at least {world}, the ranks, got {tuple(input_ids.shape)}")
        n, limit = input_ids.shape[1], max_tokens(self.model)
        if limit is not None and n > limit:
            raise ValueError(f"ShardedGlobEnc: the input has {n} tokens and the model takes {limit}")
        if not targets or min(targets) < 0 or max(targets) >= n:
            raise ValueError(f"ShardedGlobEnc: targets must lie in [0, {n}), at least one of them, got {list(targets)}")
        return Shares(n, rank, world, self.group)

    def _positions(self, input_ids: Tensor) -> Tensor:
        first = FIRST_POSITION[self.model.config.model_type]
        first = self.model.config.pad_token_id + 1 if first is None else first
        return torch.arange(first, first + input_ids.shape[1], device=input_ids.device)[None]

    def _run(self, own: Mapping[str, Tensor], shares: Shares) -> list[LayerTrace]:
        with capture(self.model) as trace, _sharded(self.model, find_layers(self.model), shares):
            self.model(**own)
            return trace.layers


@contextmanager
def _sharded(model: PreTrainedModel, layers: Sequence[Any], shares: Shares) -> Iterator[None]:
    """Inside, and inside `capture`, which restores the model's own, attention gathers over the ranks."""
    modules = [layer.attention for layer in layers]
    for config in {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values():
        config._attn_implementation = NAME
    _SHARES.update(dict.fromkeys(modules, shares))
    try:
        yield
    finally:
        for module in modules:
            _SHARES.pop(module, None)


def bytes_received(*, n: int, d: int, heads: int, layers: int, targets: int, world: int, size: int = 4) -> dict[str, float]:
    """Bytes that one rank receives in a call, by collective; size: bytes of an activation. Ring algorithms are assumed.

    The Gram matrices and the rows of the rollout are float32 whatever the activations are.
    """
    others = (world - 1) / world
    return {
        "gather k, v (forward)": others * layers * 2 * n * d * size,
        "gather k (rollout)": others * layers * n * d * size,
        "gather G (rollout)": others * layers * n * heads**2 * 4,
        "all-reduce r": 2 * others * layers * targets * n * 4,
    }
