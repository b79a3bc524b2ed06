"""Fine-tunes MiniLM as a sentiment classifier, for the tables of evidence on text.

    python benchmarks/train_sst2.py TRAIN.tsv DEV.tsv OUT

Each line of the data is a sentence, a tab, and 0 or 1. The folder OUT then holds a model that `--model OUT`
loads, with its tokenizer. Two epochs on the 6,920 sentences of SST-2 take a few minutes on two processors.
"""

import argparse
from collections.abc import Iterator

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, BertForSequenceClassification, PreTrainedModel

from pyglobenc.models import LABELS
from pyglobenc.models.checksums import check_minilm
from pyglobenc.models.pretrained import model_folder
from pyglobenc.models.train_sst2_head import MAX_LENGTH, read

BATCH, LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS, LARGEST_GRADIENT = 32, 1e-4, 0.01, 50, 1.0
# Texts of similar length share a batch. They are sorted within groups of this many batches, so that the order
# of training stays random.
GROUP = 32


def shuffled_batches(texts: list[str]) -> Iterator[list[int]]:
    """Yield the rows of each batch of one epoch, in random order."""
    order = torch.randperm(len(texts)).tolist()
    size = GROUP * BATCH
    groups = [
        sorted(order[i : i + size], key=lambda row: len(texts[row])) for i in range(0, len(order), size)
    ]
    batches = [group[i : i + BATCH] for group in groups for i in range(0, len(group), BATCH)]
    for number in torch.randperm(len(batches)).tolist():
        yield batches[number]


@torch.no_grad()
def accuracy(model: PreTrainedModel, inputs: dict, labels: torch.Tensor) -> float:
    """Return the share of texts whose predicted class is the label."""
    model.eval()
    rows = range(0, len(labels), 4 * BATCH)
    found = [
        model(**{name: value[i : i + 4 * BATCH] for name, value in inputs.items()}).logits.argmax(-1)
        for i in rows
    ]
    return float((torch.cat(found) == labels).float().mean())


def main(train: str, dev: str, out: str, epochs: int, seed: int) -> None:
    """Fine-tune MiniLM on the file `train`, print its accuracy on the file `dev`, and save it in `out`."""
    torch.manual_seed(seed)
    folder = model_folder("minilm")
    check_minilm(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    labels = dict(id2label=LABELS, label2id={label: index for index, label in LABELS.items()})
    model = BertForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **labels)

    def encode(texts: list[str]) -> dict:
        return tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")

    (texts, classes), (dev_texts, dev_classes) = read(train), read(dev)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(texts) // BATCH)
    schedule = LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARMUP_STEPS) * (1 - step / steps))
    for epoch in range(epochs):
        model.train()
        for rows in shuffled_batches(texts):
            loss = model(**encode([texts[row] for row in rows]), labels=classes[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
        found = accuracy(model, encode(dev_texts), dev_classes)
        print(f"epoch {epoch + 1}: accuracy on {len(dev_texts)} sentences {found:.3f}", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune MiniLM as a sentiment classifier.")
    parser.add_argument("train", help="file of sentences and labels to train on")
    parser.add_argument("dev", help="file of sentences and labels for the accuracy")
    parser.add_argument("out", help="folder for the model and its tokenizer")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the training file (default: 2)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the order, dropout and head (default: 0)"
    )
    main(**vars(parser.parse_args()))
