"""Launchers of csrc/cuda/relevance_attention.cu: the pass over rows and the pass over columns."""

from torch import Tensor

from pyglobenc.backends.cuda import _extension
from pyglobenc.backends.cuda._relevance import relevance_reasons as why_not
from pyglobenc.backends.inputs import RelevanceInputs
from pyglobenc.backends.shared.masks import sides
from pyglobenc.backends.shared.relevance_passes import Passes

__all__ = ["CudaPasses", "run", "why_not"]

OUTPUTS = ("r_q", "r_k", "r_v", "step", "map", "sums")


class CudaPasses(Passes):
    """The pass over rows and the pass over columns, computed by the CUDA kernels."""

    @property
    def most_rows(self) -> int:
        return _extension.kernels.MAX_STEP_ROWS

    def launch_rows(self, r_q: Tensor | None, sums: Tensor) -> None:
        self.launch("relevance_rows", r_q=r_q, sums=sums)

    def launch_columns(
        self, w: Tensor | None, r_k: Tensor | None, r_v: Tensor | None, step: Tensor | None
    ) -> None:
        self.launch("relevance_columns", w=w, r_k=r_k, r_v=r_v, step=step)

    def launch(
        self, kernel: str, rows: Tensor | None = None, w: Tensor | None = None, **outputs: Tensor | None
    ) -> None:
        """Run a kernel.

        Args:
            kernel: name of the kernel.
            rows: the queries, (B, m) int64; None: all.
            w: rows of the rollout, (B, T, n), or None.
            outputs: the tensors that the kernel fills, by their names in OUTPUTS.
        """
        given = self.inputs
        by_head = (given.q, given.k, given.v, given.s, given.grad_o)
        by_head = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in by_head)
        cu_seqlens, _, longest = self.examples
        tensors = (*by_head, given.lse, given.key_mask, rows, w, cu_seqlens)
        out = tuple(outputs.get(name) for name in OUTPUTS)
        options = (
            given.scaling,
            given.stabilizer,
            *sides(given.window, given.q.shape[2]),
            given.additive_mask,
            longest,
        )
        with _extension.launching(given.device) as stream:
            getattr(_extension.kernels, kernel)(tensors, out, *options, stream)


def run(inputs: RelevanceInputs, r: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """See `pyglobenc.ops.relevance_attention`.

    Returns R_q, R_k, R_v (B, H, n, dh), row_sums (B, n), and r_out (B, T, n) or None.
    """
    return CudaPasses(inputs).relevance(r)
