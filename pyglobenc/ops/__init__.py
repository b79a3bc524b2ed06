"""Public ops: each takes and returns tensors, checks its arguments and runs on the backend asked for."""

from pyglobenc.ops.attention import attention
from pyglobenc.ops.head_gram import gram_kernels, head_gram
from pyglobenc.ops.head_norms import head_norms
from pyglobenc.ops.mixing_ratio import mixing_ratio
from pyglobenc.ops.rollout_step import rollout_step
from pyglobenc.ops.token_norms import token_norms

__all__ = ["attention", "gram_kernels", "head_gram", "head_norms", "mixing_ratio", "rollout_step", "token_norms"]
