"""Changes an op's arguments at random, and compares a backend with the reference on them."""

import random
from collections.abc import Callable
from importlib import import_module

import torch
from numerics import SEED
from pair_cases import spread
from torch.utils._pytree import tree_map_only

from pyglobenc.bench import example_inputs
from pyglobenc.bench.costs import flatten
from pyglobenc.bench.op_table import OP_TABLE


def ops_of(backend: str) -> list[str]:
    """Return the names of the ops that a backend has."""
    return [op for op in OP_TABLE if backend in import_module(f"pyglobenc.ops.{op}").BACKENDS]


def small_tensors(monkeypatch, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Return arguments by name, of a layer small enough for thousands of calls."""
    for name, size in (("H", 2), ("N", 13), ("DH", 8)):
        monkeypatch.setattr(example_inputs, name, size)
    example_inputs.tensors.cache_clear()
    try:
        return example_inputs.tensors(device)
    finally:
        example_inputs.tensors.cache_clear()


def other_layout(t, rng):
    """The same numbers with other strides."""
    if rng.random() < 0.5:
        return spread(t)
    order = rng.sample(range(t.dim()), t.dim())
    return t.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())


def not_finite(t, rng):
    """A copy in which one number is NaN or infinite."""
    out = t.clone(memory_format=torch.contiguous_format)
    if out.numel():
        out.view(-1)[rng.randrange(out.numel())] = rng.choice([torch.nan, torch.inf, -torch.inf])
    return out


def shortened(t, rng):
    axis = rng.randrange(t.dim())
    return t.narrow(axis, 0, rng.randrange(t.shape[axis])) if t.shape[axis] else t


def scaled(t, rng):
    return t * 10.0 ** rng.randrange(-45, 39)


def other_dtype(t, rng):
    dtypes = [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]
    return t.to(rng.choice(dtypes))


def more_axes(t, rng):
    return t.unsqueeze(rng.randrange(t.dim() + 1))


def fewer_axes(t, rng):
    return t.select(rng.randrange(t.dim()), 0) if min(t.shape) else t


def other_device(t, rng):
    return t.to("meta")


def no_tensor(t, rng):
    return rng.choice([None, 3, "text", [1.0, 2.0]])


CHANGES = [
    other_layout,
    not_finite,
    shortened,
    scaled,
    other_dtype,
    more_axes,
    fewer_axes,
    other_device,
    no_tensor,
]


def changed(args: list, rng: random.Random, changes: list[Callable]) -> list:
    """The arguments with one tensor changed, which may be an element of a list."""
    args = [list(arg) if isinstance(arg, list) else arg for arg in args]
    at = rng.randrange(len(args))
    holder, at = (args[at], rng.randrange(len(args[at]))) if isinstance(args[at], list) else (args, at)
    holder[at] = rng.choice(changes)(holder[at], rng)
    return args


def outcome(op, args, backend):
    """The results of an op, or its error, which must be one that tells a caller what to change."""
    try:
        return list(flatten(op(*args, backend=backend)))
    except (ValueError, TypeError) as error:
        assert str(error), "the error has no message"
        return error


def keeps_nan(op, given: list, backend: str) -> None:
    """Check a backend's outcome against the reference's: an error, or results of its shape and dtype.

    Where the reference in float64 gives NaN, the backend's result must not be finite. What overflows float32
    depends on the order of the sums.
    """
    expected, found = outcome(op, given, "reference"), outcome(op, given, backend)
    if isinstance(expected, Exception):
        assert isinstance(found, Exception), f"the reference refuses this: {expected}"
        return
    if isinstance(found, Exception):
        return
    exact = op(*tree_map_only(torch.Tensor, lambda t: t.double(), given), backend="reference")
    for one, wanted, best in zip(found, expected, flatten(exact), strict=True):
        assert one.shape == wanted.shape and one.dtype == wanted.dtype
        if one.device.type != "meta":
            assert not (one.isfinite() & best.isnan()).any(), "NaN was lost"


def op_and_generator(name: str) -> tuple[Callable, random.Random]:
    """Return an op by name, and a generator for its changes."""
    return getattr(import_module(f"pyglobenc.ops.{name}"), name), random.Random(f"{name} {SEED}")


def check_nan(name: str, backend: str, tensors: dict, count: int) -> None:
    """Check that an op keeps what isn't finite in its arguments."""
    op, rng = op_and_generator(name)
    args = OP_TABLE[name].arguments(tensors)
    for _ in range(count):
        keeps_nan(op, changed(args, rng, [not_finite]), backend)


def check(name: str, backend: str, tensors: dict, count: int) -> None:
    """Check an op on other layouts of its arguments, and on arguments that were changed."""
    op, rng = op_and_generator(name)
    args = OP_TABLE[name].arguments(tensors)
    plain = outcome(op, args, backend)
    assert not isinstance(plain, Exception), plain
    for _ in range(count):
        found = outcome(op, changed(args, rng, [other_layout]), backend)
        assert not isinstance(found, Exception), found
        for one, wanted in zip(found, plain, strict=True):
            # only the host's matrix products may sum in another order for another layout
            torch.testing.assert_close(one, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
        keeps_nan(op, changed(args, rng, CHANGES), backend)
