"""Public ops. Each takes and returns tensors, checks its arguments, and runs on the backend asked for."""

from pyglobenc.ops.add_relevance import add_relevance
from pyglobenc.ops.attention import attention
from pyglobenc.ops.clone_relevance import clone_relevance
from pyglobenc.ops.head_gram import gram_weights, head_gram
from pyglobenc.ops.head_norms import head_norms
from pyglobenc.ops.linear_relevance import linear_relevance
from pyglobenc.ops.mapped_square import mapped_square
from pyglobenc.ops.mixing_ratio import mixing_ratio
from pyglobenc.ops.norm_terms import norm_terms
from pyglobenc.ops.pair_norms import pair_norms
from pyglobenc.ops.proximity import proximity
from pyglobenc.ops.relevance_attention import relevance_attention
from pyglobenc.ops.relevance_maps import relevance_maps
from pyglobenc.ops.relevance_product import relevance_product
from pyglobenc.ops.relevance_rollout_step import relevance_rollout_step
from pyglobenc.ops.rollout_step import rollout_step

# The op is also known under this name.
token_norms = pair_norms

__all__ = [
    "add_relevance",
    "attention",
    "clone_relevance",
    "gram_weights",
    "head_gram",
    "head_norms",
    "linear_relevance",
    "mapped_square",
    "mixing_ratio",
    "norm_terms",
    "proximity",
    "relevance_attention",
    "relevance_maps",
    "relevance_product",
    "relevance_rollout_step",
    "rollout_step",
    "pair_norms",
    "token_norms",
]
