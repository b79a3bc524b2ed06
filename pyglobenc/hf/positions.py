"""The positions that a model gives the tokens of a sequence when it gets it alone."""

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

    A position table inside the embeddings is asked: the embeddings run once on all sequences, padded on the
    right, and what they look up is kept. RoBERTa's, for one, pass over padding ids inside a text. Elsewhere
    the model's forward pass counts tokens from 0.

    Args:
        who: method named in errors.
        model: a known architecture whose base model takes position_ids.
        sequences: S of them, token ids (n_s,), int64 or int32, on any device.

    Returns:
        S tensors (n_s,) int64, on the CPU.

    Raises:
        ValueError: the embeddings have a position table and don't look positions up in it.
    """
    embeddings = getattr(model.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if not isinstance(table, nn.Module):
        return [torch.arange(len(ids), device="cpu") for ids in sequences]
    asked: list[Tensor] = []
    handle = table.register_forward_pre_hook(in_this_thread(lambda module, args: asked.append(args[0])))
    try:
        # what pads changes nothing before it
        padded = pad_sequence(list(sequences), batch_first=True, padding_value=padding_id(model) or 0)
        embeddings(input_ids=padded.to(model.device))
    finally:
        handle.remove()
    if len(asked) != 1 or asked[0].shape not in (padded.shape, (1, padded.shape[1])):
        name = type(embeddings).__name__
        raise ValueError(
            f"{who}: {name} doesn't look positions up in its table, so those of packed sequences aren't known"
        )
    return [
        own[: len(ids)].cpu().long()
        for own, ids in zip(asked[0].expand(padded.shape), sequences, strict=True)
    ]
