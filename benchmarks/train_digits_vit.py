"""Trains a small ViT on composite images whose true segmentation is known, and writes images for tests.

    python benchmarks/train_digits_vit.py MODEL_FOLDER IMAGE_FOLDER

Each image shows one handwritten digit of scikit-learn's `load_digits`, enlarged, at a random place of a
textured background. The class is the digit, and the mask is its ink. MODEL_FOLDER gets the classifier and its
image processor. IMAGE_FOLDER gets test images of digits that weren't trained on: images/NAME.png,
masks/NAME.png (white for the digit) and labels.csv.
"""

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

SIZE, PATCH = 64, 8
# The side of the enlarged digit in pixels, from and to. The strokes are about a quarter of it wide.
SIDE = (32.0, 44.0)
# The grids of random colours that a background is the sum of, and their weights.
TEXTURES = ((3, 0.5), (8, 0.3), (16, 0.2), (64, 0.15))
# This many of the 1,797 digits are never trained on.
HELD_BACK = 497
CONFIG = dict(
    image_size=SIZE,
    patch_size=PATCH,
    hidden_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=192,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    num_labels=10,
    id2label={digit: str(digit) for digit in range(10)},
    label2id={str(digit): digit for digit in range(10)},
)
# The learning rate rises and falls once in each cycle, whose lengths in steps of BATCH images these are.
BATCH, RATE, CYCLES = 64, 1e-3, (1500, 1200)


def split_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the trained and the held-back digits, each as ink (N, 8, 8) in [0, 1] and labels (N,) int64."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    ink = torch.tensor(data.images / 16, dtype=torch.float32)[order]
    labels = torch.tensor(data.target, dtype=torch.int64)[order]
    return (ink[HELD_BACK:], labels[HELD_BACK:]), (ink[:HELD_BACK], labels[:HELD_BACK])


def compose(ink: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Put digits on textured backgrounds.

    Args:
        ink: (B, 8, 8) in [0, 1].
        generator: source of the places, sizes, colours and textures.

    Returns:
        Images (B, 3, SIZE, SIZE) in [0, 1], and masks (B, SIZE, SIZE) bool, True where a digit's ink covers
        at least half of a pixel.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(ink), *shape, generator=generator)

    background = uniform(0.1, 0.5, 3, 1, 1)
    for cells, weight in TEXTURES:
        noise = uniform(-weight, weight, 3, cells, cells)
        background = background + interpolate(noise, (SIZE, SIZE), mode="bilinear")
    side = uniform(*SIDE)
    corner = torch.rand(len(ink), 2, generator=generator) * (SIZE - side)[:, None]
    # Positions in the digit, from -1 to 1, of every pixel's centre.
    x, y = (2 * (torch.arange(SIZE) + 0.5 - corner[:, axis, None]) / side[:, None] - 1 for axis in range(2))
    places = torch.stack([x[:, None].expand(-1, SIZE, -1), y[:, :, None].expand(-1, -1, SIZE)], -1)
    drawn = grid_sample(ink[:, None], places, mode="bicubic", padding_mode="zeros", align_corners=False)
    # The enlarged strokes get sharper edges.
    cover = ((drawn - 0.35) * 4 + 0.5).clamp(0, 1)
    colour = uniform(0.6, 1.0, 3, 1, 1)
    images = background.clamp(0, 1) * (1 - cover) + colour * cover
    return images, cover[:, 0] >= 0.5


def train(seed: int) -> ViTForImageClassification:
    """Return a classifier trained on composite images, each of which is seen once."""
    torch.manual_seed(seed)
    (ink, labels), (held_ink, held_labels) = split_digits()
    pixels, _ = compose(held_ink, torch.Generator().manual_seed(0))
    model = ViTForImageClassification(ViTConfig(**CONFIG)).train()
    started = time.time()
    for cycle, steps in enumerate(CYCLES):
        generator = torch.Generator().manual_seed(seed + 1 + 76 * cycle)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
        for step in range(1, steps + 1):
            rows = torch.randint(len(ink), (BATCH,), generator=generator)
            batch, _ = compose(ink[rows], generator)
            loss = model(pixel_values=normalised(batch), labels=labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 100 == 0 or step == steps:
                right = accuracy(model, pixels, held_labels)
                where = f"cycle {cycle + 1} of {len(CYCLES)}, step {step} of {steps}"
                print(f"{where}, {time.time() - started:.0f} s: {right:.3f} of held-back images", flush=True)
    return model.eval()


def normalised(images: Tensor) -> Tensor:
    """Return images (B, 3, height, width) in [0, 1] as the image processor prepares them."""
    return images * 2 - 1


@torch.no_grad()
def accuracy(model: ViTForImageClassification, pixels: Tensor, labels: Tensor) -> float:
    """Return the share of images (B, 3, height, width) in [0, 1] whose class is predicted right."""
    model.eval()
    found = torch.cat([model(pixel_values=normalised(part)).logits.argmax(-1) for part in pixels.split(64)])
    model.train()
    return float((found == labels).float().mean())


def write_images(folder: Path, count: int) -> None:
    """Write images, masks and labels of `count` held-back digits."""
    _, (ink, labels) = split_digits()
    images, masks = compose(ink[:count], torch.Generator().manual_seed(0))
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    levels = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    for index, (image, mask) in enumerate(zip(levels, masks.numpy(), strict=True)):
        Image.fromarray(image).save(folder / "images" / f"{index:04}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{index:04}.png")
    with open(folder / "labels.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("name", "label"))
        table.writerows((f"{index:04}.png", int(labels[index])) for index in range(len(images)))


def main() -> None:
    """Train the classifier and write it and the test images."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder for the classifier and its image processor")
    parser.add_argument("images", type=Path, help="folder for the test images, masks and labels")
    parser.add_argument("--count", type=int, default=300, help="number of test images (default 300)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write_images(options.images, options.count)
    model = train(options.seed)
    model.save_pretrained(options.model)
    half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}, **half).save_pretrained(options.model)


if __name__ == "__main__":
    main()
