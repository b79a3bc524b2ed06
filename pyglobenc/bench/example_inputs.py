"""Inputs of BERT-base's shape for every op, for `pyglobenc doctor` and `pyglobenc bench`."""

from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules

import torch
from torch import Tensor

import pyglobenc.ops
from pyglobenc.backends.dispatch import load
from pyglobenc.bench.costs import flatten
from pyglobenc.bench.op_table import OP_TABLE
from pyglobenc.common.files import one_line
from pyglobenc.ops import attention, gram_weights, head_gram

H, N, DH = 12, 64, 64  # heads, tokens, head width
ON_GPU = ("triton", "cuda")


def op_names() -> list[str]:
    """Return the names of the ops that have backends."""
    names = [
        module.name for module in iter_modules(pyglobenc.ops.__path__) if not module.name.startswith("_")
    ]
    return [name for name in names if hasattr(import_module(f"pyglobenc.ops.{name}"), "BACKENDS")]


def try_op(op: str, backend: str) -> tuple[str, str | None]:
    """Return the doctor's table entry for an op on a backend, and the reason if the op does not run there."""
    module = import_module(f"pyglobenc.ops.{op}")
    if backend not in module.BACKENDS:
        return "-", None
    missing = load(op, backend)[1]
    if missing:
        return "no", missing
    device = "cuda" if backend in ON_GPU and torch.cuda.is_available() else "cpu"
    args, function = OP_TABLE[op].arguments(tensors(device)), getattr(module, op)
    try:
        out = list(flatten(function(*args, backend=backend)))
    except Exception as error:
        # Triton raises errors of many kinds. The dispatcher's message begins with op and backend, which the
        # table already shows.
        return "no", one_line(error).split("can't run: ")[-1].removeprefix(f"{backend}: ")
    if backend == "reference":
        return "yes", None
    exact = list(flatten(function(*args, backend="reference")))
    worst = max(float((a - b).abs().amax() / b.abs().amax()) for a, b in zip(out, exact, strict=True))
    return f"{worst:.0e}", None


@lru_cache(maxsize=2)
def tensors(
    device: str, n: int | None = None, batch: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return arguments of the ops by name, as in an encoder layer of width d = H * DH of a model in `dtype`.

    Args:
        device: "cpu" or "cuda".
        n: number of tokens; None: N.
        batch: number of examples B.
        dtype: dtype of activations and weights, such as q (B, H, n, DH). lse and what GlobEnc derives, from
            kernel to r, are float32.
    """
    n = N if n is None else n
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    out = {name: random(batch, H, n, DH) for name in ("q", "k", "v", "grad_o", "s")}
    out |= {name: random(batch, n, H * DH) for name in ("x", "y", "relevance")} | {
        "weight": random(H, DH, H * DH)
    }
    out["o"], out["lse"] = attention(out["q"], out["k"], out["v"])
    out["kernel"], out["cross_kernel"] = gram_weights(out["weight"].float(), [])
    out["gram"], out["cross"] = head_gram(
        out["v"], out["kernel"], out["x"], out["cross_kernel"], backend="reference"
    )
    out["r"], out["log_scale"] = random(batch, 1, n).abs().float(), torch.zeros(batch, 1, device=device)
    out["gamma"] = random(H * DH).float()
    return out
