"""The error rule that every backend of every op is held to."""

import torch
from torch import Tensor


def assert_as_good_as_torch(out: Tensor, exact: Tensor, torch_out: Tensor, factor: float = 2.0) -> None:
    """The error of `out` is at most `factor` times that of plain torch, plus half an ulp, for the maximum and for the RMS.

    Args:
        out: result under test.
        exact: reference in float64 on the same, already rounded inputs.
        torch_out: reference in float32 on the same inputs, cast to the dtype of out.
        factor: above 2 only with a derivation beside the call.
    """
    assert out.shape == exact.shape, f"shape {tuple(out.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    assert torch.isfinite(out).all(), f"{(~torch.isfinite(out)).sum()} of {out.numel()} entries are not finite"
    half_ulp = 0.5 * torch.finfo(out.dtype).eps * exact.abs().max()
    error, allowed = (out.double() - exact).abs(), (torch_out.double() - exact).abs()
    for name, of in (("max", torch.amax), ("rms", lambda t: t.square().mean().sqrt())):
        assert of(error) <= factor * of(allowed) + half_ulp, (
            f"{name} error {of(error):.3e}, torch's own {of(allowed):.3e}, half an ulp {half_ulp:.3e}, factor {factor}"
        )
