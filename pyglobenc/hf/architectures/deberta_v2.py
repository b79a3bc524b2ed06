"""DeBERTa-v2 and v3 (post-norm), whose attention modules compute disentangled attention themselves.

Source: He et al. 2021, "DeBERTa: Decoding-enhanced BERT with Disentangled Attention", equation 4.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyglobenc.backends.shared.score_mods import DisentangledBias
from pyglobenc.common.deferred import may_look
from pyglobenc.hf.trace.layers import LayerModules, OwnScores

MODEL_TYPES = ("deberta-v2",)


def layers(base: nn.Module) -> list[LayerModules]:
    """Return the modules of every layer, first to last.

    Args:
        base: the model without its head. Its layers map hidden states (B, n, d) to (B, n, d).

    Raises:
        ValueError: the encoder has a convolution, which mixes tokens outside attention.
    """
    if base.encoder.conv is not None:
        raise ValueError(
            "capture: this DeBERTa-v2 has a convolution beside its first layer (conv_kernel_size), which "
            "mixes tokens outside attention, so the norms of the attention's decomposed vectors don't say "
            "how much each token contributes"
        )
    return [
        LayerModules(
            block=layer,
            attention=layer.attention.self,
            query=layer.attention.self.query_proj,
            key=layer.attention.self.key_proj,
            value=layer.attention.self.value_proj,
            output=layer.attention.output.dense,
            attention_norm=layer.attention.output.LayerNorm,
            intermediate=layer.intermediate.dense,
            mlp_output=layer.output.dense,
            output_norm=layer.output.LayerNorm,
            own_scores=own_scores,
        )
        for layer in base.encoder.layer
    ]


def own_scores(module: nn.Module, arguments: dict[str, Any]) -> OwnScores:
    """Return what the module does to the scores q . k, read from the arguments of its forward pass.

    Args:
        module: a DisentangledSelfAttention.
        arguments: by name; attention_mask (B, 1, n, n), nonzero where a query sees a key; relative_pos
            (1, n, n), integers; rel_embeddings (P, d), the embeddings of the relative positions.

    Raises:
        ValueError: the module is given query states of its own.
    """
    if arguments.get("query_states") is not None:
        raise ValueError(
            "capture: DeBERTa-v2 with query states of its own (the enhanced mask decoder) is not supported"
        )
    terms = [name for name in ("c2p", "p2c") if name in module.pos_att_type]
    # The module computes this root in float32, whatever its dtype is.
    scaling = 1 / float(np.sqrt(np.float32(module.attention_head_size * (1 + len(terms)))))
    real = torch.diagonal(arguments["attention_mask"][:, 0], dim1=1, dim2=2).bool()
    bias = _bias(module, arguments, terms, scaling) if module.relative_attention and terms else None
    return OwnScores(scaling, bias, None if may_look() and real.all() else real)


def _bias(module: nn.Module, arguments: dict[str, Any], terms: list[str], scaling: float) -> DisentangledBias:
    span = module.pos_ebd_size
    embeddings = arguments["rel_embeddings"][: 2 * span]
    keys = module.key_proj if module.share_att_key else getattr(module, "pos_key_proj", None)
    queries = module.query_proj if module.share_att_key else getattr(module, "pos_query_proj", None)
    relative = arguments["relative_pos"][0]
    # These are the buckets of i - j for every distance j - i from 1 - n to n - 1.
    buckets = torch.cat([relative[:, 0].flip(0), relative[0, 1:]]).long()
    position_keys = _by_head(keys(embeddings), module) if "c2p" in terms else None
    position_queries = _by_head(queries(embeddings), module) if "p2c" in terms else None
    return DisentangledBias(position_keys, position_queries, (buckets + span).clamp(0, 2 * span - 1), scaling)


def _by_head(t: Tensor, module: nn.Module) -> Tensor:
    return t.detach().unflatten(1, (module.num_attention_heads, -1)).transpose(0, 1)
