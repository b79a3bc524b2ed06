"""Every op on an input of BERT-base's shape, for `pyglobenc doctor` and `pyglobenc bench`."""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules

import torch
from torch import Tensor

import pyglobenc.ops
from pyglobenc.backends.dispatch import load
from pyglobenc.bench.costs import flatten
from pyglobenc.common.files import one_line
from pyglobenc.ops import attention, gram_kernels, head_gram

H, N, DH = 12, 64, 64  # heads, tokens, head width
ON_GPU = ("triton", "cuda")


def op_names() -> list[str]:
    """Names of the ops that have backends."""
    names = [module.name for module in iter_modules(pyglobenc.ops.__path__) if not module.name.startswith("_")]
    return [name for name in names if hasattr(import_module(f"pyglobenc.ops.{name}"), "BACKENDS")]


def try_op(op: str, backend: str) -> tuple[str, str | None]:
    """What a table says of an op on a backend, and the reason if it doesn't run there."""
    module = import_module(f"pyglobenc.ops.{op}")
    if backend not in module.BACKENDS:
        return "-", None
    missing = load(op, backend)[1]
    if missing:
        return "no", missing
    if op not in EXAMPLES:
        return "untried", None
    device = "cuda" if backend in ON_GPU and torch.cuda.is_available() else "cpu"
    args, function = EXAMPLES[op](tensors(device)), getattr(module, op)
    try:
        out = list(flatten(function(*args, backend=backend)))
    except Exception as error:
        # of any kind, as Triton's are; the dispatcher names op and backend, which the table does already
        return "no", one_line(error).split("can't run: ")[-1].removeprefix(f"{backend}: ")
    if backend == "reference":
        return "yes", None
    exact = list(flatten(function(*args, backend="reference")))
    worst = max(float((a - b).abs().amax() / b.abs().amax()) for a, b in zip(out, exact, strict=True))
    return f"{worst:.0e}", None


@lru_cache(maxsize=2)
def tensors(device: str, n: int | None = None, batch: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Arguments of the ops by name, as an encoder layer of a model in `dtype` has them, d = H * DH wide.

    Args:
        device: "cpu" or "cuda".
        n: tokens; None: N.
        batch: B, examples.
        dtype: of activations and weights, q (B, H, n, DH); what GlobEnc makes of them, from kernel to r, and lse are float32.
    """
    n = N if n is None else n
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    out = {name: random(batch, H, n, DH) for name in ("q", "k", "v", "grad_o", "s")}
    out |= {name: random(batch, n, H * DH) for name in ("x", "y", "relevance")} | {"weight": random(H, DH, H * DH)}
    out["o"], out["lse"] = attention(out["q"], out["k"], out["v"])
    out["kernel"], out["cross_kernel"] = gram_kernels(out["weight"].float(), [])
    out["gram"], out["cross"] = head_gram(out["v"], out["kernel"], out["x"], out["cross_kernel"], backend="reference")
    out["r"], out["log_scale"] = random(batch, 1, n).abs().float(), torch.zeros(batch, 1, device=device)
    out["gamma"] = random(H * DH).float()
    return out


def _take(*names: str) -> Callable[[dict[str, Tensor]], list[Tensor]]:
    return lambda tensors: [tensors[name] for name in names]


# an op's positional arguments
EXAMPLES: dict[str, Callable[[dict[str, Tensor]], list]] = {
    "head_gram": _take("v", "kernel", "x", "cross_kernel"),
    "norm_terms": lambda tensors: [tensors["v"], tensors["weight"].float(), tensors["x"], [tensors["gamma"]] * 2],
    "head_norms": _take("v", "weight"),
    "token_norms": _take("q", "k", "lse", "gram"),
    "rollout_step": _take("r", "log_scale", "q", "k", "lse", "gram"),
    "mapped_square": lambda tensors: [tensors["x"], [tensors["gamma"]] * 2],
    "mixing_ratio": _take("q", "k", "v", "o", "lse", "weight"),
    "relevance_attention": _take("q", "k", "v", "lse", "grad_o", "s"),
    "relevance_maps": _take("q", "k", "v", "lse", "grad_o", "s"),
    "relevance_rollout_step": _take("r", "q", "k", "v", "lse", "grad_o", "s"),
    "add_relevance": _take("relevance", "x", "y"),
    "clone_relevance": lambda tensors: [[tensors["relevance"], tensors["y"]], tensors["x"]],
    "linear_relevance": lambda tensors: [tensors["relevance"], tensors["x"], tensors["weight"].flatten(0, 1)],
}
