"""Sentence embeddings as modules around an encoder, so that a similarity is explained as a logit is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pyglobenc.hf.unwrap import called_module, stock_model
from pyglobenc.inputs.batches import longest
from pyglobenc.inputs.windows import encode
from pyglobenc.methods.arguments import accepts
from pyglobenc.methods.inputs import check_evaluation

POOLINGS = ("mean", "cls", "lasttoken")


class Pooled(nn.Module):
    """Embeddings (B, d) of an encoder's last hidden states (B, n, d), by a pooling in POOLINGS."""

    def __init__(self, encoder: nn.Module, pooling: str):
        super().__init__()
        self.encoder, self.pooling, self.training = encoder, pooling, False

    def forward(self, **batch: Any) -> Tensor:
        """Return the embeddings (B, d) of a batch, such as input_ids and attention_mask (B, n)."""
        states = self.encoder(**batch, return_dict=True).last_hidden_state
        real = batch.get("attention_mask")
        real = torch.ones_like(states[..., 0]) if real is None else real.to(states)
        if self.pooling == "mean":
            return (states * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        places = torch.arange(real.shape[1], device=real.device)
        if self.pooling == "cls":
            at = places.expand_as(real).masked_fill(real == 0, real.shape[1]).amin(1)
        else:
            at = places.expand_as(real).masked_fill(real == 0, -1).amax(1)
        return states[torch.arange(len(states), device=at.device), at]


class Sentences(nn.Module):
    """Embeddings (B, d) that a SentenceTransformer makes of a batch of token ids."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.training = model, False

    def forward(self, **batch: Any) -> Tensor:
        """Return the embeddings (B, d) of a batch, such as input_ids and attention_mask (B, n)."""
        found = self.model(dict(batch))["sentence_embedding"]
        # `encode` keeps this many numbers of an embedding.
        return found[..., : getattr(self.model, "truncate_dim", None)]

    def ids(self, text: str) -> list[int]:
        """Return the token ids that the model itself makes of a text."""
        read = getattr(self.model, "preprocess", self.model.tokenize)
        return read([text])["input_ids"].flatten().tolist()


class SimilarityTo(nn.Module):
    """The cosine similarity of a batch's embeddings to a given one, as logits (B, 1).

    Args:
        embed: the module that makes embeddings (B, d).
        other: (d,), the given embedding.
    """

    def __init__(self, embed: nn.Module, other: Tensor):
        super().__init__()
        self.embed, self.other, self.training = embed, other, False

    def forward(self, **batch: Any) -> Tensor:
        """Return the similarities (B, 1) of a batch, such as input_ids and attention_mask (B, n)."""
        found = self.embed(**batch)
        return nn.functional.cosine_similarity(found, self.other.to(found)[None])[:, None]


def similarity(a: Tensor, b: Tensor) -> float:
    """Return the cosine similarity of two embeddings (d,)."""
    return float(nn.functional.cosine_similarity(a, b, dim=0))


def embedder(
    who: str, model: nn.Module, pooling: str | None
) -> tuple[nn.Module, PreTrainedTokenizerBase | None, int | None]:
    """Return the module that makes embeddings, and a SentenceTransformer's tokenizer and largest length.

    Args:
        who: name of the function for errors.
        model: a SentenceTransformer or a transformers model.
        pooling: a name in POOLINGS; None for a SentenceTransformer.

    Raises:
        TypeError, ValueError: the pooling is missing or unknown, the model isn't in evaluation mode, or it
            puts a prompt before its texts.
    """
    # Only SentenceTransformer has both a list of modules and prompts.
    if isinstance(model, nn.Sequential) and hasattr(model, "default_prompt_name"):
        if pooling is not None:
            raise ValueError(f"{who}: {type(model).__name__} has a pooling of its own; leave pooling out")
        if model.default_prompt_name is not None:
            raise ValueError(
                f"{who}: the model puts its prompt {model.default_prompt_name!r} before texts; put it into "
                "the texts and set model.default_prompt_name = None"
            )
        if any(one.training for one in model.modules() if isinstance(one, nn.modules.dropout._DropoutNd)):
            raise ValueError(f"{who}: the model is in training mode; call model.eval() first")
        return Sentences(model), model.tokenizer, model.max_seq_length
    check_evaluation(who, model)
    if called_module(model) is not stock_model(model):
        raise TypeError(f"{who}: model must be a SentenceTransformer or a transformers model")
    if pooling not in POOLINGS:
        raise ValueError(
            f"{who}: pooling must be one of {', '.join(POOLINGS)}, as the model was trained, got {pooling!r}"
        )
    return Pooled(stock_model(model).base_model, pooling), None, None


@torch.no_grad()
def embedding(
    embed: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, long: str, max_length: int | None
) -> Tensor:
    """Return the embedding (d,) of a text; long and max_length as for `explain`.

    Raises:
        ValueError: as `encode`; or a SentenceTransformer makes other tokens of the text.
    """
    stock = stock_model(embed)
    inputs = encode(tokenizer, text, "text", longest(stock, tokenizer, max_length), long).inputs
    if isinstance(embed, Sentences) and embed.ids(text) != inputs["input_ids"]:
        raise ValueError(
            "explain_similarity: the SentenceTransformer makes other tokens of this text than its tokenizer, "
            "such as lower-case ones or a longer beginning; change the text or the length as it does"
        )
    inputs |= {"attention_mask": [1] * len(inputs["input_ids"])}
    kept = {name: value for name, value in inputs.items() if accepts(embed, name)}
    return embed(**{name: torch.tensor([value], device=stock.device) for name, value in kept.items()})[0]
