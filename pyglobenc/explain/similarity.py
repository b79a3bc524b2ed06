"""Explains the similarity of two texts, or of texts and an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyglobenc.common.arguments import known_arguments
from pyglobenc.explain.texts import check_texts, explain
from pyglobenc.inputs.options import Options
from pyglobenc.inputs.pipelines import takes_pipelines
from pyglobenc.inputs.windows import Encoded, encode
from pyglobenc.results import Attribution, Attributions
from pyglobenc.results.images import ComparedAttributions, ImageAttribution

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from pyglobenc.methods.cross.attribution import CrossAttribution

WHO, NAME = "explain_similarity", "cosine similarity"
# The method that compares texts with an image. Titles of its pictures show so many characters of a text.
COMPARING, TITLE = "gradient-rollout", 32


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


def compare_with_image(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    texts: Sequence[str],
    image: Image,
    max_pixels: int,
    **options: Any,
) -> ComparedAttributions:
    """Compute how much each token of a text and each patch of an image contribute to their similarity.

    Args:
        model: CLIP, as for `CrossAttribution`.
        processor: its processor, with a tokenizer and an image processor.
        texts: the texts. Each is compared with the image alone.
        image, max_pixels: a PIL image, and the largest number of its pixels, as for `explain_image`.
        options: merge_words, long, max_length, backend and dtype, as for `explain`; long can't be "windows".

    Returns:
        ComparedAttributions with one attribution for each text: the `scores` (n,) of `CrossAttribution`. Its
        image has a map (rows, columns) for each text: the `source_scores` of the patches.

    Raises:
        TypeError, ValueError: the model doesn't compare texts with images, the processor lacks a part, or as
            for `explain` and `explain_image`.
    """
    # Importing transformers takes seconds.
    from pyglobenc.hf.streams.registry import compares
    from pyglobenc.inputs.batches import check_tokenizer, longest
    from pyglobenc.inputs.images import colours, model_pixels, patch_scores
    from pyglobenc.methods.cross.attribution import CrossAttribution

    if not compares(model):
        raise ValueError(f"explain: {type(model).__name__} doesn't compare a text with an image; CLIP does")
    for part in ("tokenizer", "image_processor"):
        if not hasattr(processor, part):
            raise ValueError(f"explain: the processor of {type(model).__name__} has no {part}")
    chosen = Options(COMPARING, **options)
    if chosen.long == "windows":
        raise ValueError("explain: an image is compared with a whole text; long must be error or truncate")
    tokenizer, vision = processor.tokenizer, model.vision_model
    check_tokenizer(tokenizer)
    limit = longest(model.text_model, tokenizer, chosen.max_length)
    encoded = [
        encode(tokenizer, text, name, limit, chosen.long)
        for text, name in zip(texts, check_texts(texts), strict=True)
    ]
    pixels = model_pixels(vision, processor.image_processor, image, max_pixels)
    method = CrossAttribution(model, chosen.backend, chosen.dtype)
    found = ComparedAttributions()
    found.image = ImageAttribution(colours(pixels), {}, {}, probabilities=None, predicted=None)
    for index, text in enumerate(encoded):
        a, source_scores = _compared(method, text, pixels, chosen)
        found.append(a)
        patches = patch_scores(source_scores, pixels.shape[1:], vision)
        found.image.scores[index] = patches.double().cpu().numpy()
        title = a.text if len(a.text) <= TITLE else f"{a.text[:TITLE]}..."
        found.image.labels[index] = f"{title} ({a.predictions[0][1]:.4g})"
    return found


def _compared(
    method: CrossAttribution, text: Encoded, pixels: Tensor, options: Options
) -> tuple[Attribution, Tensor]:
    """Return a text's attribution and the scores (m,) of the tokens of an image (channels, height, width)."""
    import torch

    from pyglobenc.inputs.batches import versions

    model = method.model
    batch = {name: torch.tensor([column], device=model.device) for name, column in text.inputs.items()}
    result = method(**batch, pixel_values=pixels[None])
    scores, ids = result.scores[0].cpu().numpy(), text.inputs["input_ids"]
    fields = dict(word_ids=text.word_ids, offsets=text.offsets, cut=text.cut, merge_words=options.merge_words)
    fields |= dict(target=0, target_name="similarity", target_kind="class")
    fields |= dict(method=options.method, model=model.name_or_path or type(model).__name__)
    fields |= dict(predictions=[("similarity", float(result.logit))])
    fields |= dict(settings=options.record() | versions(model))
    return Attribution(text.text, text.tokens, ids, text.special, scores, **fields), result.source_scores[0]
