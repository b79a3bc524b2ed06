"""Argument checks that the ops share. Each error names the op, what it expects and what it got."""

import torch
from torch import Tensor

from pyglobenc.backends.shared.launch import HALF

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def check_shape(
    op: str, name: str, t: Tensor | None, symbols: str, sizes: dict[str, int], optional: bool = False
) -> None:
    """Check that t is a tensor whose shape fits symbols.

    Args:
        op: name of the op, for the message.
        name: name of the argument, for the message.
        t: the tensor.
        symbols: the expected axes, such as "B H n dh" for (B, H, n, dh).
        sizes: known size of each symbol; new symbols are added.
        optional: whether t may be None, which passes.

    Raises:
        TypeError: t is not a tensor.
        ValueError: the number of axes differs, or a size differs from the known one.
    """
    if t is None and optional:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    expected, came = symbols.split(), t.shape
    if len(came) == len(expected):
        for symbol, size in zip(expected, came, strict=True):
            if sizes.setdefault(symbol, size) != size:
                break
        else:
            return
    shape = ", ".join(expected)
    known = (
        ", ".join(f"{s}={sizes[s]}" for s in dict.fromkeys(expected) if s in sizes)
        if len(came) == len(expected)
        else ""
    )
    raise ValueError(f"{op}: {name} must be ({shape}){f' with {known}' if known else ''}, got {tuple(came)}")


def check_floats(op: str, **tensors: Tensor | None) -> None:
    """Check that the given tensors, of any shape, have one floating-point dtype; TypeError otherwise."""
    met = {t.dtype for t in tensors.values() if t is not None}
    if len(met) < 2 and met <= FLOATS:
        return
    dtypes = {name: t.dtype for name, t in tensors.items() if t is not None}
    for name, dtype in dtypes.items():
        if dtype not in FLOATS:
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {dtype}")
    raise TypeError(
        f"{op}: tensors must have one dtype, got " + ", ".join(f"{n} {d}" for n, d in dtypes.items())
    )


def check_widened(op: str, inputs: dict[str, Tensor | None], weights: dict[str, Tensor | None]) -> None:
    """Check that all tensors have one dtype, or that inputs have half precision and weights float32.

    The tensors may have any shape. The first of the inputs must not be None. Raises TypeError otherwise.
    """
    if next(iter(inputs.values())).dtype in HALF and all(
        t is None or t.dtype == torch.float32 for t in weights.values()
    ):
        check_floats(op, **inputs)
    else:
        check_floats(op, **inputs, **weights)


def check_heads(op: str, heads: int, kv_heads: int) -> None:
    """Check that the number of query heads is a positive multiple of that of key-value heads."""
    if not heads or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{op}: the number of query heads must be a positive multiple of that of key-value heads, "
            f"got {heads} and {kv_heads}"
        )


def check_mask(op: str, key_mask: Tensor | None, sizes: dict[str, int]) -> None:
    """Check that key_mask is a (B, n) bool tensor, True for real tokens."""
    check_shape(op, "key_mask", key_mask, "B n", sizes, optional=True)
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise TypeError(f"{op}: key_mask must be bool, True for real tokens, got {key_mask.dtype}")


def check_window(op: str, window: tuple[int, int]) -> None:
    """Check that a window is (left, right), each -1 for unlimited or at least 0; ValueError otherwise.

    So a query always sees itself.
    """
    if len(window) != 2 or min(window) < -1:
        raise ValueError(
            f"{op}: window must be (left, right), each -1 for unlimited or at least 0, got {tuple(window)}"
        )


def check_square(op: str, window: tuple[int, int], n: int, m: int) -> None:
    """Refuse a limited window between n queries and another number of keys m, which have no distance."""
    if n != m and max(window) >= 0:
        raise ValueError(
            f"{op}: a window needs as many keys as queries, got {m} keys, {n} queries and {tuple(window)}"
        )


def check_cu_seqlens(
    op: str, cu_seqlens: Tensor | None, key_mask: Tensor | None, sizes: dict[str, int]
) -> None:
    """Check the ends of packed sequences, cu_seqlens (S + 1,) int32 on the CPU; None passes.

    They must increase from 0 to n, and the batch must be 1 without a key_mask (B, n). S is added to sizes.
    Raises ValueError otherwise.
    """
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{op}: cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if (
        cu_seqlens.dim() != 1
        or len(cu_seqlens) < 2
        or cu_seqlens.dtype != torch.int32
        or cu_seqlens.device.type != "cpu"
    ):
        came = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype} on {cu_seqlens.device}"
        raise ValueError(f"{op}: cu_seqlens must be (S + 1,) int32 on the CPU with S at least 1, got {came}")
    if sizes["B"] != 1 or key_mask is not None:
        came = f"{sizes['B']}{'' if key_mask is None else ' and one'}"
        raise ValueError(f"{op}: packed sequences are a batch of 1 without key_mask, got {came}")
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != sizes["n"] or int(cu_seqlens.diff().min()) < 1:
        raise ValueError(
            f"{op}: cu_seqlens must increase from 0 to n = {sizes['n']}, got {cu_seqlens.tolist()}"
        )
    sizes["S"] = len(cu_seqlens) - 1
