"""Folders of small random models with their tokenizer or image processor, as users have them."""

from pathlib import Path

import torch
from tiny import classifier, tokenizer
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

SETTINGS = dict(
    image_size=24,
    patch_size=6,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=80,
)


def text_folder(path: Path) -> str:
    """Return the folder of a text classifier in float32."""
    classifier().float().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def image_folder(path: Path, *labels: str) -> str:
    """Return the folder of an image classifier with these labels."""
    torch.manual_seed(0)
    config = ViTConfig(**SETTINGS, id2label=dict(enumerate(labels or ("cat", "dog", "owl"))))
    ViTForImageClassification(config).save_pretrained(path)
    ViTImageProcessor(size={"height": 24, "width": 24}).save_pretrained(path)
    return str(path)
