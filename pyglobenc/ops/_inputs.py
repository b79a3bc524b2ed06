"""Makes and checks the arguments that several ops share.

Each error names the op, what it expects and what it got.
"""

from typing import Any

import torch
from torch import Tensor

from pyglobenc.backends.inputs import Inputs, PairInputs, RelevanceInputs
from pyglobenc.common.deferred import check_range
from pyglobenc.ops._checks import (
    check_cu_seqlens,
    check_floats,
    check_heads,
    check_mask,
    check_shape,
    check_square,
    check_window,
)


def pair_inputs(op: str, **arguments: Any) -> PairInputs:
    """Check the arguments of an op over pairs.

    Args:
        op: name of the op, for the messages.
        arguments: fields of `PairInputs`, such as q (B, H, n, dh). scaling may be None for dh ** -0.5.

    Returns:
        The checked arguments.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit.
    """
    inputs, sizes = _made(PairInputs, arguments), {}
    check_shape(op, "q", inputs.q, "B H n dh", sizes)
    check_shape(op, "k", inputs.k, "B Hkv n dh", sizes)
    check_heads(op, sizes["H"], sizes["Hkv"])
    check_shape(op, "lse", inputs.lse, "B H n", sizes)
    check_shape(op, "gram", inputs.gram, "B n H H", sizes)
    check_shape(op, "cross", inputs.cross, "B n H", sizes, optional=True)
    for name in ("residual_sq", "rstd"):
        check_shape(op, name, getattr(inputs, name), "B n", sizes, optional=True)
    _check_seen(op, inputs, sizes)
    check_floats(op, q=inputs.q, k=inputs.k)
    check_floats(op, gram=inputs.gram, cross=inputs.cross, residual_sq=inputs.residual_sq, rstd=inputs.rstd)
    check_floats(op, lse=inputs.lse)
    if (inputs.cross is None) != (inputs.residual_sq is None):
        raise ValueError(f"{op}: cross and residual_sq must be given together")
    return inputs


def relevance_inputs(op: str, **arguments: Any) -> RelevanceInputs:
    """Check the arguments of a relevance op of attention.

    Args:
        op: name of the op, for the messages.
        arguments: fields of `RelevanceInputs`, such as q (B, H, n, dh). scaling may be None for dh ** -0.5,
            and lse (B, H, n) may have any float dtype.

    Returns:
        The checked arguments, with lse in the dtype of q.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't fit.
    """
    inputs, sizes = _made(RelevanceInputs, arguments), {}
    for name in ("q", "k", "v", "grad_o", "s"):
        check_shape(op, name, getattr(inputs, name), "B H n dh", sizes, optional=name == "grad_o")
    check_shape(op, "lse", inputs.lse, "B H n", sizes)
    _check_seen(op, inputs, sizes)
    return _one_dtype(op, inputs)


def product_inputs(op: str, **arguments: Any) -> RelevanceInputs:
    """Check the arguments of `relevance_product`, whose m keys may be more or fewer than the n queries.

    Args, Returns, Raises: as for `relevance_inputs`, with k and v (B, H, m, dh) and key_mask (B, m).
    """
    inputs, sizes = _made(RelevanceInputs, arguments), {}
    for name, symbols in (("q", "B H n dh"), ("k", "B H m dh"), ("v", "B H m dh"), ("s", "B H n dh")):
        check_shape(op, name, getattr(inputs, name), symbols, sizes)
    check_shape(op, "lse", inputs.lse, "B H n", sizes)
    check_mask(op, inputs.key_mask, {"B": sizes["B"], "n": sizes["m"]})
    check_window(op, inputs.window)
    check_square(op, inputs.window, sizes["n"], sizes["m"])
    return _one_dtype(op, inputs)


def _one_dtype(op: str, inputs: RelevanceInputs) -> RelevanceInputs:
    """Check the dtypes of relevance inputs, and return them with lse in the dtype of q."""
    q, lse = inputs.q, inputs.lse
    check_floats(op, q=q, k=inputs.k, v=inputs.v, grad_o=inputs.grad_o, s=inputs.s)
    check_floats(op, lse=lse)
    if q.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: q must be float32 or float64, got {q.dtype}")
    return inputs if lse.dtype == q.dtype else inputs.replace(lse=lse.to(q.dtype))


def by_query_head(op: str, q: Tensor, t: Tensor) -> Tensor:
    """Return keys or values t (B, Hkv, m, dh) with one entry for each head of q (B, H, n, dh)."""
    sizes: dict[str, int] = {}
    check_shape(op, "q", q, "B H n dh", sizes)
    check_shape(op, "k and v", t, "B Hkv m dh", sizes)
    check_heads(op, sizes["H"], sizes["Hkv"])
    return t if sizes["H"] == sizes["Hkv"] else t.repeat_interleave(sizes["H"] // sizes["Hkv"], 1)


def check_rows(op: str, rows: Tensor | None, q: Tensor) -> None:
    """Check the chosen queries: rows (B, T) int64 in [0, n), or None, for q (B, H, n, dh)."""
    if rows is None:
        return
    check_shape(op, "rows", rows, "B T", {"B": q.shape[0]})
    if rows.dtype != torch.int64:
        raise TypeError(f"{op}: rows must be int64, got {rows.dtype}")
    check_range(op, "rows", rows, q.shape[2])


def check_rollout(op: str, r: Tensor, like: Tensor, inputs: Inputs) -> dict[str, int]:
    """Check rows of a rollout r (B, T, n), of the dtype of `like`.

    Returns the sizes B, T and n, and S of packed sequences.
    """
    sizes = {"B": inputs.q.shape[0], "n": inputs.q.shape[2]}
    check_shape(op, "r", r, "B T n", sizes)
    if inputs.cu_seqlens is not None:
        sizes["S"] = len(inputs.cu_seqlens) - 1
    check_floats(op, r=r, like=like)
    return sizes


def _made(kind: type[Inputs], arguments: dict[str, Any]) -> Inputs:
    if arguments["scaling"] is None:
        q = arguments["q"]
        # `check_shape` refuses any other q.
        known = isinstance(q, Tensor) and q.dim() and q.shape[-1]
        arguments["scaling"] = q.shape[-1] ** -0.5 if known else 1.0
    arguments["scaling"] = float(arguments["scaling"])
    return kind(**arguments)


def _check_seen(op: str, inputs: Inputs, sizes: dict[str, int]) -> None:
    check_mask(op, inputs.key_mask, sizes)
    check_window(op, inputs.window)
    check_cu_seqlens(op, inputs.cu_seqlens, inputs.key_mask, sizes)
