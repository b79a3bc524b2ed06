"""How far the error that transformer attribution reports can be trusted on images.

    python benchmarks/precision_images.py MODEL_FOLDER IMAGE_FOLDER

MODEL_FOLDER and IMAGE_FOLDER are those of train_digits_vit.py. The true error of the float32 scores is their
relative L2 distance from those in float64. Each row compares it with the error that `reliability` reports:
their rank correlation, the shares of images for which the two lie within a factor of 3 and 10, and how many
images whose true error is above and below 1 % are reported to be above it. `cost` is the CPU time relative to
that without a reported error. The rows are written to results/image_precision.csv.
"""

import csv
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoImageProcessor, AutoModelForImageClassification

from pyglobenc import TransformerAttribution
from pyglobenc.backends.measurements import device_name
from pyglobenc.inputs.images import open_image
from pyglobenc.methods.precision.reliability import DIGITS_GONE, PrecisionWarning

OUT = Path(__file__).parent / "results" / "image_precision.csv"
IMAGES, BATCH = 200, 25
VARIANTS = ("transformer_attribution", "rollout", "last_layer", "lrp", "lrp_last_layer")


def measure(attribute, exact, pixels, variant, how):
    """Return the true and the reported errors of images, two arrays (N,), and the CPU seconds."""
    true, reported, seconds = [], [], 0.0
    for batch in pixels.split(BATCH):
        wide = exact(pixel_values=batch, variant=variant, reliability="off")
        start = time.process_time()
        found = attribute(pixel_values=batch, variant=variant, reliability=how, target=wide.target)
        seconds += time.process_time() - start
        distance = (found.scores.double() - wide.scores).flatten(1).norm(dim=1)
        true += (distance / wide.scores.flatten(1).norm(dim=1)).tolist()
        reported += [float("nan")] * len(batch) if found.error is None else found.error.tolist()
    return np.array(true), np.array(reported), seconds


def main(model_folder, image_folder):
    """Measure every variant and print and write a row for each way to find the error."""
    warnings.simplefilter("ignore", PrecisionWarning)
    model = AutoModelForImageClassification.from_pretrained(model_folder).eval()
    processor = AutoImageProcessor.from_pretrained(model_folder)
    paths = sorted((Path(image_folder) / "images").glob("*.png"))[:IMAGES]
    pixels = processor(images=[open_image(path) for path in paths], return_tensors="pt")["pixel_values"]
    attribute, exact = TransformerAttribution(model), TransformerAttribution(model, dtype=torch.float64)
    with OUT.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(
            ("variant", "error", "images", "rank_correlation", "within_3", "within_10", "above_1_percent")
            + ("above_flagged", "below_flagged", "true_median", "true_worst", "cost", "device")
        )
        for variant in VARIANTS:
            plain = measure(attribute, exact, pixels, variant, "off")[2]
            for how in ("estimated", "measured"):
                true, said, seconds = measure(attribute, exact, pixels, variant, how)
                known = ~np.isnan(said)
                apart = np.abs(np.log10(said[known] / true[known]))
                above, flagged = true > DIGITS_GONE, said > DIGITS_GONE
                rank = spearmanr(true[known], said[known]).statistic
                shares = [(apart <= np.log10(factor)).mean() for factor in (3, 10)]
                counts = (above.sum(), (above & flagged).sum(), (~above & flagged).sum())
                row = [variant, how, len(true), *(f"{number:.2f}" for number in (rank, *shares)), *counts]
                row += [f"{np.median(true):.1e}", f"{true.max():.1e}", f"{seconds / plain:.2f}"]
                row.append(device_name("cpu"))
                table.writerow(row)
                print(*row, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
