"""Compiles the Triton kernels for GPUs that aren't present, and reads registers, spills and shared memory.

Run as a script, it prints JSON. Launchers are called on meta tensors while a recorder stands in for their
kernels, so exactly what they would launch is compiled. This doesn't work in a process that interprets Triton.
"""

import contextlib
import importlib
import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from pyglobenc.backends.inputs import PairInputs, RelevanceInputs
from pyglobenc.kernels import _device

POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.bool: "*i1", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg")
AMD, AMD_COUNTS = "gfx942", dict(registers="vgpr_count", spilled="vgpr_spill_count")


class Recorder:
    """Takes a kernel's place, and keeps the arguments that it was launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def _launcher(op: str):
    """Return the function that launches an op's kernels."""
    module = importlib.import_module(f"pyglobenc.kernels.{op}")
    return getattr(module, "run", None) or getattr(module, op)


def record(op: str, args: tuple) -> list[tuple]:
    """Return (kernel, args, kwargs) of each launch of an op on meta tensors."""
    function = _launcher(op)
    modules = [vars(module) for name, module in sys.modules.items() if name.startswith("pyglobenc.kernels")]
    saved = [(names, *item) for names in modules for item in names.items() if item[0].endswith("_kernel")]
    recorders = {id(kernel): Recorder(kernel) for _, _, kernel in saved}
    for names, name, kernel in saved:
        names[name] = recorders[id(kernel)]
    try:
        function(*args)
    finally:
        for names, name, kernel in saved:
            names[name] = kernel
    return [(r.kernel, *launch) for r in recorders.values() for launch in r.launches]


def specialised(value, closely: bool = True) -> tuple[str, bool]:
    """Return Triton's type of an argument, and whether the argument is known to be a multiple of 16.

    Only the value of an integer tells the latter.
    """
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], True
    if isinstance(value, float):
        return "fp32", False
    if value is None or (closely and value == 1):
        return "constexpr", False
    return "i32" if value < 2**31 else "i64", closely and value % 16 == 0


def compile_launch(kernel, args: tuple, kwargs: dict, capability: int | str) -> dict:
    """Compile a recorded launch; return registers, spilled and shared bytes, tensor-core instructions."""
    options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
    given = dict(zip(kernel.arg_names, args, strict=False)) | {
        name: value for name, value in kwargs.items() if name not in OPTIONS
    }
    signature, constants, attrs = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        kind, aligned = (
            ("constexpr", False)
            if parameter.is_constexpr
            else specialised(value, not parameter.do_not_specialize)
        )
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        elif aligned:
            attrs[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attrs)
    if capability == AMD:
        options.pop("maxnreg", None)
        compiled = triton.compile(source, target=GPUTarget("hip", AMD, 64), options=options)
        return dict(
            **amd_resources(compiled.asm["amdgcn"]),
            shared=compiled.metadata.shared,
            warps=compiled.metadata.num_warps,
        )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return dict(
        **nvidia_resources(compiled.asm["ptx"], capability),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
    )


def nvidia_resources(ptx: str, capability: int) -> dict:
    """Return the registers, spilled bytes and tensor-core instructions that ptxas makes of PTX."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        arch = re.search(r"\.target (\w+)", ptx).group(1)
        command = [get_ptxas(capability).path, "-v", "--gpu-name", arch, file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return dict(
        registers=int(re.search(r"Used (\d+) registers", report).group(1)),
        spilled=int(re.search(r"(\d+) bytes spill stores", report).group(1)),
        mma=len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma\.", ptx)),
    )


def amd_resources(asm: str) -> dict:
    """Return the vector registers, spilled registers and matrix-core instructions that AMD's assembly has."""
    counts = {name: int(re.search(rf"\.{key}:\s+(\d+)", asm).group(1)) for name, key in AMD_COUNTS.items()}
    return dict(**counts, mma=len(re.findall("mfma", asm)))


@contextlib.contextmanager
def pretend(capability: int | str, precision: str):
    """Within this context launchers see a GPU of this capability, and this float32 precision is set."""
    limits = _device.SMALLEST_LIMIT if capability == AMD else _device.SHARED_LIMITS[capability]
    patched = {
        "shared_limit": lambda device: limits,
        "float32_precision": lambda: precision,
        "processors": lambda device: 132,
    }
    modules = [m for name, m in sys.modules.items() if name.startswith("pyglobenc.kernels")]
    saved = [(m, name, vars(m)[name]) for m in modules for name in patched if name in vars(m)]
    for module, name, _ in saved:
        setattr(module, name, patched[name])
    try:
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def pair_arguments(case: dict, cu_seqlens: torch.Tensor | None, n: int = 1024) -> PairInputs:
    """Return the arguments of the pair ops for a layer of this shape."""
    heads, kv_heads, head_dim, dtype = (
        case["heads"],
        case["kv_heads"],
        case["head_dim"],
        getattr(torch, case["dtype"]),
    )
    every = (meta(2, n, heads), meta(2, n), meta(2, n), meta(2, n, dtype=torch.bool))
    q, k = meta(2, heads, n, head_dim, dtype=dtype), meta(2, kv_heads, n, head_dim, dtype=dtype)
    tensors = (q, k, meta(2, heads, n), meta(2, n, heads, heads), *(every if case["full"] else (None,) * 4))
    return PairInputs(*tensors, head_dim**-0.5, (128, 0) if case["full"] else (-1, -1), cu_seqlens)


def relevance_arguments(case: dict, cu_seqlens: torch.Tensor | None, n: int = 1024) -> RelevanceInputs:
    """Return the arguments of the relevance ops for a layer of this shape; packed sequences have no mask."""
    t = meta(1 if case["packed"] else 2, case["heads"], n, case["head_dim"])
    mask = meta(2, n, dtype=torch.bool) if case["full"] and not case["packed"] else None
    window = (128, 0) if case["full"] else (-1, -1)
    tensors, full = (t, t, t, t[..., 0], t if case["full"] else None, t), case["full"]
    return RelevanceInputs(
        *tensors, mask, case["head_dim"] ** -0.5, window, full, full, 0.0, True, cu_seqlens
    )


def arguments(case: dict, n: int = 1024) -> tuple:
    """Return meta tensors as an op's arguments; "full" sets every optional argument."""
    op, full, r = case["op"], case["full"], meta(2, case["rows"], n)
    cu_seqlens = torch.tensor([0, n], dtype=torch.int32) if full and case["packed"] else None
    x, weight = meta(2, n, 768), meta(3072, 768)
    if op == "exp":
        return (x.device,)
    if op == "clone_relevance":
        return [x, x, x], x
    if op == "mapped_square":
        return x.to(getattr(torch, case["dtype"])), [weight[0]] * 2
    if op == "add_relevance":
        return x, x, x, 0.0, True, cu_seqlens
    if op == "linear_relevance":
        return meta(2, n, 3072), x, weight, weight, meta(2, n, 3072), weight[:, 0]
    if op == "proximity":
        heads, head_dim, dtype = case["heads"], case["head_dim"], getattr(torch, case["dtype"])
        width, rows, n = heads * head_dim, case["rows"], min(n, 256)
        v = meta(2, case["kv_heads"], n, head_dim, dtype=dtype)
        per_head = not case["full"]
        return meta(2, heads, rows, n), v, meta(heads, head_dim, width), meta(2, rows, width), per_head
    if op.startswith("head_"):
        heads, head_dim = case["heads"], case["head_dim"]
        dtype, width = getattr(torch, case["dtype"]), heads * head_dim
        v = meta(2, case["kv_heads"], n, head_dim, dtype=dtype)
        cross = (meta(2, n, width, dtype=dtype), meta(heads, head_dim, width)) if full else (None, None)
        return (
            (v, meta(heads, head_dim, width))
            if op == "head_norms"
            else (v, meta(heads, head_dim, heads, head_dim), *cross)
        )
    if op.startswith("relevance"):
        inputs = relevance_arguments(case, cu_seqlens, n)
        return inputs, None if op == "relevance_maps" else meta(len(inputs.q), case["rows"], n)
    inputs = pair_arguments(case, cu_seqlens, n)
    if op == "rollout_step":
        return inputs, r, meta(2, case["rows"])
    return inputs, meta(2, 1, dtype=torch.int64) if full else None


def measure(case: dict) -> list[dict]:
    """Return the resources of every launch of a case.

    A case is {op, capability, precision, heads, kv_heads, head_dim, dtype, rows, full}.
    """
    importlib.import_module(f"pyglobenc.kernels.{case['op']}")
    with pretend(case["capability"], case["precision"]):
        launches = record(case["op"], arguments(case))
    rows = []
    for kernel, args, kwargs in launches:
        tiles = {name: value for name, value in kwargs.items() if name.startswith("BLOCK_") or name == "HELD"}
        rows.append(
            {
                **case,
                "kernel": kernel.__name__,
                **tiles,
                **compile_launch(kernel, args, kwargs, case["capability"]),
            }
        )
    return rows


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(measure(json.loads(line))), flush=True)
