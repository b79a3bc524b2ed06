"""Trains the sentiment head of MiniLM: logistic regression on the pooled token of the frozen encoder.

    python -m pyglobenc.models.train_sst2_head TRAIN.tsv DEV.tsv OUT.safetensors

Each line of the data is a sentence, a tab, and 0 or 1. The accuracy is printed and kept in the file's
metadata.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, BertModel

from pyglobenc.models.pretrained import model_folder

BATCH, MAX_LENGTH, PENALTY = 64, 64, 1e-5


def read(path: str) -> tuple[list[str], Tensor]:
    """Return the sentences of a file and their labels, (rows,) int64."""
    rows = [line.rsplit("\t", 1) for line in Path(path).read_text("utf-8").splitlines() if line]
    return [text for text, _ in rows], torch.tensor([int(label) for _, label in rows])


@torch.no_grad()
def features(texts: list[str]) -> Tensor:
    """Return the pooled tokens that a BertForSequenceClassification's classifier would read, (rows, d)."""
    folder = model_folder("minilm")
    model = BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    out = torch.empty(len(texts), model.config.hidden_size)
    # Texts of similar length share a batch, which needs less padding.
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        batch = tokenizer(
            [texts[row] for row in rows],
            padding=True,
            truncation=True,
            max_length=MAX_LENGTH,
            return_tensors="pt",
        )
        out[rows] = model(**batch).pooler_output
    return out


def fit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a penalised logistic regression to x (rows, d), y (rows,); return weights (2, d) and bias (2,)."""
    weight, bias = torch.zeros(2, x.shape[1], requires_grad=True), torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=500, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(x @ weight.T + bias, y) + PENALTY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def main(train: str, dev: str, out: str) -> None:
    """Train the head on the file `train`, print its accuracy on the file `dev`, and write it to `out`."""
    texts, labels = read(train)
    weight, bias = fit(features(texts), labels)
    texts, labels = read(dev)
    accuracy = float(((features(texts) @ weight.T + bias).argmax(-1) == labels).float().mean())
    print(f"accuracy on {len(labels)} sentences: {accuracy:.3f}")
    save_file(
        {"weight": weight, "bias": bias},
        out,
        metadata={"accuracy": f"{accuracy:.4f}", "sentences": str(len(labels))},
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
