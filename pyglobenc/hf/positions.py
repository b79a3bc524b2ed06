"""Finds the positions that a model gives the tokens of a sequence when the sequence is its only input."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from pyglobenc.hf.limits import padding_id
from pyglobenc.hf.trace.threads import in_this_thread


@torch.no_grad()
def own_positions(who: str, model: PreTrainedModel, sequences: Sequence[Tensor]) -> list[Tensor]:
    """Return the positions of the tokens of each sequence.

    If the embeddings contain a position table, they run once on all sequences, padded on the right to (S, n).
    The positions that they look up are recorded. RoBERTa, for example, does not count padding ids inside a
    text. Without such a table the model's forward pass counts tokens from 0.

    Args:
        who: name of the method, for errors.
        model: a known architecture whose base model takes position_ids.
        sequences: S tensors of token ids (n_s,), int64 or int32, on any device.

    Returns:
        S tensors (n_s,) int64, on the CPU.

    Raises:
        ValueError: the embeddings have a position table but don't look positions up in it.
    """
    embeddings = getattr(model.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if not isinstance(table, nn.Module):
        return [torch.arange(len(ids), device="cpu") for ids in sequences]
    asked: list[Tensor] = []
    handle = table.register_forward_pre_hook(in_this_thread(lambda module, args: asked.append(args[0])))
    try:
        # Padding on the right does not change the positions before it.
        padded = pad_sequence(list(sequences), batch_first=True, padding_value=padding_id(model) or 0)
        embeddings(input_ids=padded.to(model.device))
    finally:
        handle.remove()
    if len(asked) != 1 or asked[0].shape not in (padded.shape, (1, padded.shape[1])):
        name = type(embeddings).__name__
        raise ValueError(
            f"{who}: {name} doesn't look positions up in its table, so the positions of packed sequences are "
            "unknown"
        )
    return [
        own[: len(ids)].cpu().long()
        for own, ids in zip(asked[0].expand(padded.shape), sequences, strict=True)
    ]
