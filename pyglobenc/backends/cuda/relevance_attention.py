"""Launchers of csrc/cuda/relevance_attention.cu: the pass over rows and the pass over columns."""

from torch import Tensor

from pyglobenc.backends.cuda import _extension
from pyglobenc.backends.cuda._relevance import relevance_reasons
from pyglobenc.backends.reference.attention import sides
from pyglobenc.backends.shared.relevance_passes import Passes

OUTPUTS = ("r_q", "r_k", "r_v", "step", "map", "sums")


class CudaPasses(Passes):
    """Both passes in CUDA C++."""

    @property
    def most_rows(self) -> int:
        return _extension.kernels.MOST_ROWS

    def launch_rows(self, r_q: Tensor | None, sums: Tensor) -> None:
        self.launch("relevance_rows", r_q=r_q, sums=sums)

    def launch_columns(self, w: Tensor | None, r_k: Tensor | None, r_v: Tensor | None, step: Tensor | None) -> None:
        self.launch("relevance_columns", w=w, r_k=r_k, r_v=r_v, step=step)

    def launch(self, kernel: str, rows: Tensor | None = None, w: Tensor | None = None, **outputs: Tensor | None) -> None:
        """Run a kernel on the queries `rows` (B, m), None: all, and the rollout's rows w (B, T, n); outputs by their names in OUTPUTS."""
        by_head = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (self.q, self.k, self.v, self.s, self.grad_o))
        offsets, _, longest = self.examples
        tensors = (*by_head, self.lse, self.key_mask, rows, w, offsets)
        out = tuple(outputs.get(name) for name in OUTPUTS)
        options = (self.scaling, self.stabilizer, *sides(self.window, self.q.shape[2]), self.additive_mask, longest)
        with _extension.launching(self.q.device) as stream:
            getattr(_extension.kernels, kernel)(tensors, out, *options, stream)


def not_supported(
    q, k, v, lse, grad_o, s, r, key_mask, scaling, window, additive_mask, normalize, stabilizer, offsets=None
) -> list[str]:
    """Why the kernel can't run on these arguments; empty when it can."""
    return relevance_reasons(q, k=k, v=v, lse=lse, grad_o=grad_o, s=s, r=r, key_mask=key_mask)


def relevance_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad_o: Tensor | None,
    s: Tensor,
    r: Tensor | None,
    key_mask: Tensor | None,
    scaling: float,
    window: tuple[int, int],
    additive_mask: bool,
    normalize: bool,
    stabilizer: float,
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See `pyglobenc.ops.relevance_attention`: -> R_q, R_k, R_v (B, H, n, dh), row_sums (B, n), r_out (B, T, n) or None."""
    passes = CudaPasses(q, k, v, lse, grad_o, s, key_mask, scaling, window, additive_mask, stabilizer, offsets)
    return passes.relevance(r, normalize)
