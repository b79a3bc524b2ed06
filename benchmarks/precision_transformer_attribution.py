"""How many digits transformer attribution keeps in float32: results/transformer_attribution_precision.csv.

    python benchmarks/precision_transformer_attribution.py [TEXTS.tsv [MODEL ...]]

Random weights (BERT, small, 6 layers, by weight scale and length) and, with sentences (one a line, a tab, a
label), trained classifiers by name or folder, MiniLM with its sentiment head by default. Each row: the
relative L2 error of the scores in float32 against float64 without [CLS]'s own entry (median and worst), the
median rank correlation of both, and the median of what `reliability` says, for the published guard and for
stabilizers; `changed` is the relative L2 distance that the stabilizer itself makes, in float64.
"""

import csv
import sys
import warnings
from pathlib import Path
from statistics import median

import torch
from scipy.stats import spearmanr
from transformers import BertConfig, BertForSequenceClassification

from pyglobenc import TransformerAttribution
from pyglobenc.methods.precision.reliability import PrecisionWarning

OUT = Path(__file__).parent / "results" / "transformer_attribution_precision.csv"
CASES, TEXTS = 12, 12
STABILIZERS = (0.0, 1e-2, 1e-1)
SMALL = dict(
    vocab_size=200, hidden_size=96, num_hidden_layers=6, num_attention_heads=6, intermediate_size=192
)


def random_cases(std, n):
    for seed in range(CASES):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(BertConfig(**SMALL, initializer_range=std)).eval()
        yield model, {"input_ids": torch.randint(5, 200, (1, n))}


def sentences(path, name):
    from pyglobenc.models.pretrained import load_pretrained

    model, tokenizer = load_pretrained(name, device="cpu")
    lines = [line.rsplit("\t", 1)[0] for line in Path(path).read_text("utf-8").splitlines()]
    for text in lines[:: max(1, len(lines) // TEXTS)][:TEXTS]:
        yield model, dict(tokenizer(text, return_tensors="pt"))


def measure(name, cases, stabilizer, variant="transformer_attribution"):
    errors, ranks, said, changed = [], [], [], []
    for model, batch in cases:
        result = TransformerAttribution(model, stabilizer=stabilizer)(
            **batch, variant=variant, reliability="measured"
        )
        call = dict(target=result.target, variant=variant, reliability="off")
        wide = (TransformerAttribution(model, dtype=torch.float64, stabilizer=s) for s in (stabilizer, 0.0))
        exact, published = (attribute(**batch, **call).scores[0, 1:] for attribute in wide)
        scores = result.scores[0, 1:].double()
        errors.append(float((scores - exact).norm() / exact.norm()))
        changed.append(float((exact - published).norm() / published.norm()))
        ranks.append(float(spearmanr(scores, exact).statistic))
        said.append(float(result.error))
    return {
        "model": name,
        "variant": variant,
        "stabilizer": stabilizer,
        "cases": len(errors),
        "error_median": f"{median(errors):.1e}",
        "error_worst": f"{max(errors):.1e}",
        "rank_median": f"{median(ranks):.4f}",
        "rank_worst": f"{min(ranks):.4f}",
        "said_median": f"{median(said):.1e}",
        "changed_median": f"{median(changed):.1e}",
    }


def main(path=None, *models):
    warnings.simplefilter("ignore", PrecisionWarning)
    torch.set_num_threads(1)
    rows = []
    for stabilizer in STABILIZERS:
        for std, n in ((0.02, 32), (0.2, 32), (0.2, 128)):
            rows.append(measure(f"random, weights {std}, {n} tokens", random_cases(std, n), stabilizer))
        for name in (models or ("minilm-sst2",)) if path else ():
            for variant in ("transformer_attribution", "full"):
                rows.append(measure(Path(name).name, sentences(path, name), stabilizer, variant))
    with open(OUT, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
