"""Row mode for one long sequence, shared by the ranks of torch.distributed.

Each rank holds a share of the tokens and runs the stock model on them. An attention layer gathers the keys
and values that the rank's queries see, so the forward pass is split as evenly as the rollout. In the rollout
a rank computes the rows of the norms for its own queries, from the gathered keys and Gram matrices. One
all-reduce of a (T, n) array for each layer adds up the ranks' parts of r @ norms. A rank keeps only its own
tokens' share of each layer.

Gathers run while the products before them are computed: in the forward pass those of the heads before, and in
the rollout those of the layer before. So two groups of heads, or two layers, are gathered at one time.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from pyglobenc.backends.shared.masks import hidden_keys, visible_keys
from pyglobenc.backends.shared.rows import rescale_rows
from pyglobenc.common.arguments import known_arguments
from pyglobenc.common.autocast import callers_autocast, cast_by_autocast, outside_autocast
from pyglobenc.hf import LayerTrace, capture, find_layers
from pyglobenc.hf.limits import max_tokens
from pyglobenc.hf.positions import own_positions
from pyglobenc.hf.trace.attention import RECORDERS, window_of
from pyglobenc.hf.unwrap import stock_model
from pyglobenc.methods.arguments import model_inputs, output_settings
from pyglobenc.methods.inputs import check_batch, check_model
from pyglobenc.methods.rollout.layer_matrix import NormMatrix
from pyglobenc.methods.rollout.rows import RolloutResult, roll_out_rows, rollout_result
from pyglobenc.methods.rollout.stages import STAGES, StageOps, check_stage, deepest_stage
from pyglobenc.ops import pair_norms
from pyglobenc.ops.attention import BAND, fused_bias, fused_call
from pyglobenc.scale.sequence_shards import Shares, one_ahead

NAME = "pyglobenc_sharded"
# These architectures take positions as an argument.
ARCHITECTURES = ("bert", "electra", "roberta", "xlm-roberta", "camembert", "modernbert")
ARCHITECTURES += ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text")
# How many queries have their norms in memory at one time. Their (BLOCK, n) array is no larger than the hidden
# states of all tokens.
BLOCK = 256
# The keys and values of a layer are gathered in at most so many groups of heads.
HEAD_GROUPS = 4

# Maps each attention module that is in use to the distribution of the tokens over the ranks.
_SHARES: dict[nn.Module, Shares] = {}


def sharded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from the rank's own queries to the keys and values of all ranks.

    This is the attention function that transformers' attention interface calls.

    Args:
        module: the attention module.
        query: the rank's own queries, (1, H, m, dh).
        key, value: the rank's own keys and values, (1, Hkv, m, dh).
        attention_mask: not used, since a sequence without padding needs no mask.
        scaling: factor of the scores. None means dh**-0.5.
        kwargs: other arguments of the interface.

    Returns:
        The attention output (1, m, H, dh), and None in place of the attention probabilities.

    Raises:
        ValueError: the module changes its scores in a way that isn't supported over ranks.
    """
    changes = [name for name in ("position_bias", "s_aux", "softcap") if kwargs.get(name) is not None]
    if changes:
        raise ValueError(
            f"ShardedGlobEnc: {type(module).__name__} uses {changes[0]}, which is not supported over ranks"
        )
    shares, window = _SHARES[module], window_of(module, kwargs)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    query, key, value = cast_by_autocast(query, key, value)
    size = -(-key.shape[1] // HEAD_GROUPS)
    shared = query.shape[1] // key.shape[1]  # queries for each key
    groups = (
        (q, shares.gather(k, 2, window), shares.gather(v, 2, window))
        for q, k, v in zip(
            query.split(size * shared, 1), key.split(size, 1), value.split(size, 1), strict=True
        )
    )
    parts = [_attend_own(q, k.wait(), v.wait(), shares.own, window, scaling) for q, k, v in one_ahead(groups)]
    o, lse = (torch.cat(found, 1) for found in zip(*parts, strict=True))
    RECORDERS[module](q=query, k=key, v=value, o=o, lse=lse, scaling=scaling, window=window)
    return o.transpose(1, 2).contiguous(), None


def _attend_own(
    q: Tensor, k: Tensor, v: Tensor, chunks: Sequence[slice], window: tuple[int, int], scaling: float
) -> tuple[Tensor, Tensor]:
    """Return `attend` of the rank's own queries (1, H, m, dh) to keys and values (1, Hkv, n, dh)."""
    shared = q.shape[1] // k.shape[1]
    if shared > 1:
        k, v = (t.repeat_interleave(shared, dim=1) for t in (k, v))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    parts = [
        attend(own, k, v, chunk, window, scaling)
        for own, chunk in zip(q.split(sizes, dim=2), chunks, strict=True)
        if own.shape[2]
    ]
    o, lse = (torch.cat(found, 2) for found in zip(*parts, strict=True))
    return o, lse


def attend(
    q: Tensor, k: Tensor, v: Tensor, rows: slice, window: tuple[int, int], scaling: float
) -> tuple[Tensor, Tensor]:
    """Return the attention of some of n queries, without a mask as long as the keys.

    The function calls torch's own kernels.

    Args:
        q: the queries `rows`, (1, H, m, dh).
        k, v: all keys and values, (1, H, n, dh).
        rows: which queries these are, at least one.
        window, scaling: as for `pyglobenc.ops.attention`.

    Returns:
        o (1, H, m, dh) and lse (1, H, m).
    """
    if window == (-1, -1):
        return fused_call(q, k, v, None, False, scaling)
    if window == (-1, 0):
        own = fused_call(q, k[:, :, rows], v[:, :, rows], None, True, scaling)
        if rows.start == 0:
            return own
        # Every query sees all keys before the rows.
        return _merge(own, fused_call(q, k[:, :, : rows.start], v[:, :, : rows.start], None, False, scaling))
    block, parts = min(max(sum(window), BAND[0]), BAND[1]), []
    for start in range(rows.start, rows.stop, block):
        part = slice(start, min(rows.stop, start + block))
        cols = visible_keys(part, k.shape[2], window)
        bias = fused_bias(hidden_keys(part, cols, window, None, q.device), q.dtype)
        mine = q[:, :, start - rows.start : part.stop - rows.start]
        parts.append(fused_call(mine, k[:, :, cols], v[:, :, cols], bias, False, scaling))
    return torch.cat([o for o, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Join the attention over two sets of keys, each o (1, H, m, dh) and lse (1, H, m)."""
    lse = torch.logaddexp(one[1], other[1])
    o = sum(o * (part - lse).exp()[..., None] for o, part in (one, other))
    return o.to(one[0].dtype), lse


def _no_mask(**kwargs: Any) -> None:
    """Return no mask, since one sequence without padding needs none."""


AttentionInterface.register(NAME, sharded_attention)
AttentionMaskInterface.register(NAME, _no_mask)


@dataclass
class ShardedMatrix:
    """The norms of one layer, (1, n, n), as a matrix that `roll_out_rows` takes.

    The rank computes the rows of its own queries. The fields of `local` hold its own tokens. The other ranks'
    keys and Gram matrices begin to come when the object is made.
    """

    local: NormMatrix
    shares: Shares

    def __post_init__(self):
        own = self.local.inputs
        self._given = own.of_tokens()
        self._gathers = {
            name: self.shares.gather(self._given[name], own.AXES[name], own.window) for name in ("k", "gram")
        }
        self._settings = dict(scaling=own.scaling, window=own.window, backend=self.local.backend)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        """Return the inputs of `pair_norms` of all n tokens, when the ranks have sent theirs."""
        return {
            name: self._gathers[name].wait()
            if name in self._gathers
            else self.shares.place(t, self.local.inputs.AXES[name])
            for name, t in self._given.items()
        }

    def rows(self, targets: Tensor) -> Tensor:
        """Return the rows `targets` (1, T) of the matrix, (1, T, n), on every rank."""
        mine = sum(
            ((targets[0] >= chunk.start) & (targets[0] < chunk.stop)).long() for chunk in self.shares.own
        ).bool()
        # A rank without targets waits too, because its own tokens are on their way to others.
        tensors, out = self._tensors, self.local.inputs.gram.new_zeros(1, targets.shape[1], self.shares.n)
        if mine.any():
            out[:, mine] = pair_norms(**tensors, **self._settings, rows=targets[:, mine])
        dist.all_reduce(out, group=self.shares.group)
        return out

    def step(self, r: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply r (1, T, n) with the matrix, on every rank, and scale each row to maximum 1.

        Returns:
            The rows (1, T, n) and the new log_scale (1, T).
        """
        r, log_scale = r.to(self.local.inputs.gram), log_scale.to(self.local.inputs.gram)
        out, axes = torch.zeros_like(r), self.local.inputs.AXES
        for chunk in self.shares.own:
            for start in range(chunk.start, chunk.stop, BLOCK):
                rows = slice(start, min(chunk.stop, start + BLOCK))
                cols = visible_keys(rows, self.shares.n, self.local.inputs.window)
                seen = {
                    name: t.narrow(axes[name], cols.start, cols.stop - cols.start)
                    for name, t in self._tensors.items()
                }
                index = torch.arange(rows.start - cols.start, rows.stop - cols.start, device=r.device)[None]
                out[:, :, cols] += r[:, :, rows] @ pair_norms(**seen, **self._settings, rows=index)
        dist.all_reduce(out, group=self.shares.group)
        return rescale_rows(out, log_scale)


class ShardedGlobEnc:
    """`GlobEnc` in row mode for one sequence that the ranks of a process group share.

    Args:
        model: a model of an architecture in ARCHITECTURES, the same on every rank, in evaluation mode. It is
            left unchanged.
        backend: as for `GlobEnc`.
        group: process group of torch.distributed. None means the default group.

    Raises:
        RuntimeError: torch.distributed isn't initialised.
        TypeError, ValueError: the architecture is another one, or as `GlobEnc`.
    """

    @known_arguments
    def __init__(self, model: PreTrainedModel, backend: str = "auto", group: Any = None):
        if not dist.is_initialized():
            raise RuntimeError(
                "ShardedGlobEnc: torch.distributed isn't initialised; call init_process_group first"
            )
        check_model("ShardedGlobEnc", model, backend, None)
        model = stock_model(model)
        if model.config.model_type not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(
                f"ShardedGlobEnc: architecture must be one of {known}, got {model.config.model_type!r}"
            )
        self.model, self.group = model, group
        self.ops = StageOps(backend)

    @known_arguments
    @outside_autocast
    @torch.no_grad()
    def __call__(
        self,
        *,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        targets: Sequence[int] | str | None = None,
        stage: str | None = None,
        layers: bool = False,
    ) -> RolloutResult:
        """Attribute target tokens of one sequence to all its tokens.

        Every rank must make the call with the same arguments. The arithmetic is in the dtype of the model,
        but at least in float32.

        Args:
            input_ids: (1, n), the whole sequence without padding. n is at least the number of ranks.
            token_type_ids: (1, n), or None.
            targets: T token positions; or "mean" for the mean of all tokens' rows, T = 1. None means the
                first token, [CLS], or the last one of a causal model. The head isn't run, so the default
                doesn't follow it, as that of `GlobEnc` does.
            stage, layers: as for `GlobEnc`.

        Returns:
            RolloutResult with scores (1, T, n), the same on every rank, without the output of the model.

        Raises:
            TypeError, ValueError: An argument or the stage is unknown; ids, shapes or targets don't fit; the
                input is longer than the model takes; or the result isn't finite.
        """
        shares = self._shares(input_ids, targets, stage)
        batch = (
            {"input_ids": input_ids}
            if token_type_ids is None
            else {"input_ids": input_ids, "token_type_ids": token_type_ids}
        )
        batch = model_inputs("ShardedGlobEnc", self.model, batch, ShardedGlobEnc.__call__)
        check_batch("ShardedGlobEnc", self.model, batch)
        batch["position_ids"] = self._positions(input_ids)
        captured = self._run({name: shares.take(t, 1) for name, t in batch.items()}, shares)
        stage = stage or deepest_stage(captured[-1])
        check_stage("ShardedGlobEnc", captured[-1], stage)
        if targets is None:
            targets = [shares.n - 1 if captured[-1].window[1] == 0 else 0]
        if targets == "mean":
            rows = torch.full((1, 1, shares.n), 1 / shares.n, dtype=torch.float64, device=input_ids.device)
        else:
            rows = torch.as_tensor(targets, device=input_ids.device)[None]
        matrices = (ShardedMatrix(self.ops.norm_matrix(layer, stage), shares) for layer in reversed(captured))
        rolled = roll_out_rows(one_ahead(matrices), rows, layers)
        return rollout_result("ShardedGlobEnc", self.model, *rolled, layers, captured)

    def _shares(self, input_ids: Tensor, targets: Sequence[int] | str | None, stage: str | None) -> Shares:
        rank, world = dist.get_rank(self.group), dist.get_world_size(self.group)
        if stage not in (None, *STAGES):
            raise ValueError(f"ShardedGlobEnc: stage must be one of {', '.join(STAGES)}, got {stage!r}")
        if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < world:
            raise ValueError(
                f"ShardedGlobEnc: input_ids must be (1, n) with n at least the number of ranks {world}, got "
                f"{tuple(input_ids.shape)}"
            )
        n, limit = input_ids.shape[1], max_tokens(self.model)
        if limit is not None and n > limit:
            raise ValueError(f"ShardedGlobEnc: the input has {n} tokens and the model takes {limit}")
        if isinstance(targets, str):
            if targets != "mean":
                raise ValueError(
                    f"ShardedGlobEnc: targets must be token positions or 'mean', got {targets!r}"
                )
        elif targets is not None and (not targets or min(targets) < 0 or max(targets) >= n):
            raise ValueError(
                f"ShardedGlobEnc: targets must lie in [0, {n}), at least one of them, got {list(targets)}"
            )
        return Shares(n, rank, world, self.group)

    def _positions(self, input_ids: Tensor) -> Tensor:
        return own_positions("ShardedGlobEnc", self.model, list(input_ids))[0][None].to(input_ids.device)

    def _run(self, own: Mapping[str, Tensor], shares: Shares) -> list[LayerTrace]:
        # A module is in one capture at a time, so the shares stored for it belong to this call.
        with (
            capture(self.model, attention=NAME) as trace,
            _sharded(find_layers(self.model), shares),
            callers_autocast(),
        ):
            # The head isn't run. Logits aren't used here, and those of a vocabulary take more memory than all
            # hidden states.
            self.model.base_model(**own, **output_settings(self.model.base_model))
            return trace.layers


@contextmanager
def _sharded(layers: Sequence[Any], shares: Shares) -> Iterator[None]:
    """Context, inside `capture`, in which the attention of these layers gathers over the ranks."""
    modules = [layer.attention for layer in layers]
    _SHARES.update(dict.fromkeys(modules, shares))
    try:
        yield
    finally:
        for module in modules:
            _SHARES.pop(module, None)
