"""The function `explain_similarity` explains the cosine similarity of two texts' embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyglobenc.common.arguments import known_arguments
from pyglobenc.explain.texts import explain
from pyglobenc.inputs.pipelines import takes_pipelines
from pyglobenc.results import Attributions

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHO, NAME = "explain_similarity", "cosine similarity"


class SimilarityAttributions(Attributions):
    """The attributions of two texts to the similarity of their embeddings: a list of two `Attribution`s.

    Attributes:
        similarity: the cosine similarity, in [-1, 1].
    """

    similarity: float


@takes_pipelines
@known_arguments
def explain_similarity(
    model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    text_a: str,
    text_b: str,
    method: str = "gradient-x-input",
    *,
    pooling: str | None = None,
    start_layer: int = 0,
    merge_words: bool = False,
    long: str = "error",
    max_length: int | None = None,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> SimilarityAttributions:
    """Compute how much each token of two texts contributes to the cosine similarity of their embeddings.

    Each text is explained with the other text's embedding fixed. So the scores of integrated gradients of a
    text add up to the similarity less the similarity with the text's baseline in its place.

    Args:
        model: a SentenceTransformer, whose own modules make the embeddings; or a transformers model of a
            known architecture with a pooling, in evaluation mode.
        tokenizer: the model's tokenizer; None for a SentenceTransformer's own.
        text_a, text_b: the two texts. A prompt that the model needs must be part of them.
        method: a name in `pyglobenc.methods.registry.METHODS` that explains a class, such as a gradient
            method. It explains the similarity as it explains a class's logit.
        pooling: how a transformers model's last hidden states become an embedding: "mean" of the tokens that
            aren't padding, special tokens included; "cls", the first token; or "lasttoken". A
            SentenceTransformer has its own, so None.
        long: "error" or "truncate", what happens to a text that is too long; as for `explain`.
        max_length: as for `explain`. None: the limit of model and tokenizer, or the SentenceTransformer's.
        start_layer, merge_words, backend, dtype: as for `explain`.

    Returns:
        SimilarityAttributions, a list of the two texts' attributions with scores (n,). Their target is called
        "cosine similarity".

    Raises:
        TypeError, ValueError: as `explain`; or the pooling is missing or unknown, the method explains a
            position, or the model puts a prompt of its own before texts.
    """
    # Importing transformers takes seconds.
    from pyglobenc.inputs.embeddings import SimilarityTo, embedder, embedding, similarity
    from pyglobenc.methods.registry import find_method

    if find_method(method, WHO).target != "class":
        raise ValueError(
            f"{WHO}: {method} explains a position whatever the other text is; choose a method that explains "
            "a class, such as gradient-x-input"
        )
    if long == "windows":
        raise ValueError(f"{WHO}: an embedding belongs to a whole text, so long must be error or truncate")
    embed, own_tokenizer, limit = embedder(WHO, model, pooling)
    tokenizer = own_tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise TypeError(f"{WHO}: a transformers model needs its tokenizer, got None")
    options: dict[str, Any] = dict(long=long, max_length=limit if max_length is None else max_length)
    vectors = [embedding(embed, tokenizer, text, **options) for text in (text_a, text_b)]
    options |= dict(start_layer=start_layer, merge_words=merge_words, backend=backend, dtype=dtype)
    found = SimilarityAttributions()
    found.similarity = similarity(*vectors)
    for text, other in ((text_a, vectors[1]), (text_b, vectors[0])):
        a = explain(SimilarityTo(embed, other), tokenizer, text, method, **options)
        a.target_name, a.predictions = NAME, [(NAME, found.similarity)]
        a.label = a.probability = None
        a.settings["pooling"] = "the model's own" if pooling is None else pooling
        found.append(a)
    return found
