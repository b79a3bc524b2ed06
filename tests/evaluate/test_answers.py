"""Language models: the probability of an answer, its attribution, and perturbation of the prompt."""

import numpy as np
import pytest
import torch
from models import ALTERNATING, DECODER, build, randomize
from sweeps import sweep
from tiny import VOCABULARY, classifier, tokenizer
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import Gemma2Config, Gemma2ForSequenceClassification, PreTrainedTokenizerFast

import pyglobenc
from pyglobenc.methods.registry import METHODS

TEXTS = [
    "deep film the good film is deep",
    "the good film",
    "a b c d e f g h i j k l m n o p q r s t u v w x",
]
ANSWERS = ["good film", "the", "a b the"]
# The last one gives NaN for sequences with more padding than its window.
KINDS = ["gpt2", "llama", "gemma2"]


def words(**changes) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, without special tokens in texts."""
    inner = Tokenizer(WordLevel({token: i for i, token in enumerate([*VOCABULARY, "is"])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **(names | changes))


def log_probability(model, prompt: list[int], answer: list[int]) -> float:
    """The sum of the log-probabilities of the answer's tokens, one forward pass for each."""
    total = 0.0
    for i, token in enumerate(answer):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer[:i]])).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
    return total


def plain_scores(model, tokenizer, text: str, answer: list[int], method: str) -> np.ndarray:
    """The mean over the answer's tokens of the rows of `explain`, each with a sum of 1 over the prompt."""
    rows, names = [], tokenizer.convert_ids_to_tokens(answer)
    n = len(text.split())
    for i in range(len(answer)):
        target = answer[i] if METHODS[method].target == "class" else None
        found = pyglobenc.explain(
            model, tokenizer, " ".join([text, *names[:i]]), method, target=target, dtype=torch.float64
        )
        rows.append(found.scores[:n].astype(np.float64))
    return rows[0] if len(rows) == 1 else np.mean([row / abs(row).sum() for row in rows], axis=0)


def plain_metrics(values, weights, groups):
    """RISE and MAS as FlashTrace's definition has them, step by step."""
    left, share, low = [], [1.0], 1.0
    for value in values:
        low = min(low, min(max((value - values[-1]) / abs(values[0] - values[-1]), 0.0), 1.0))
        left.append(low)
    for group in groups:
        share.append(share[-1] - sum(weights[i] for i in group) / sum(weights))
    if sum(weights) <= 0:
        share = np.linspace(1, 0, len(left))
    aligned = [min(max(one + abs(one - other), 0.0), 1.0) for one, other in zip(left, share, strict=True)]
    aligned = [(one - min(aligned)) / (max(aligned) - min(aligned)) for one in aligned]
    return [(sum(curve) - curve[0] / 2 - curve[-1] / 2) / (len(curve) - 1) for curve in (left, aligned)]


@pytest.mark.parametrize(
    "kind, remove, method",
    sweep(
        [
            (*how, method)
            for how in zip(KINDS, ("delete", "pad", "delete"), strict=True)
            for method in ("globenc", "attention-rollout", "raw-attention", "gradient-x-input")
        ],
        [
            ("gpt2", "delete", "gradient-x-input"),
            ("llama", "pad", "globenc"),
            ("gemma2", "delete", "globenc"),
        ],
    ),
)
def test_equals_a_plain_loop(kind, method, remove):
    model, tokenizer = build(kind), words()
    metrics = ("rise", "mas", "comprehensiveness", "sufficiency")
    options = dict(methods=(method,), metrics=metrics, remove=remove, dtype=torch.float64)
    options |= dict(progress=False, fractions=(0.1, 0.5))
    table = pyglobenc.evaluate(model, tokenizer, TEXTS, answers=ANSWERS, **options)
    measured = 0
    for index, (text, answer) in enumerate(zip(TEXTS, ANSWERS, strict=True)):
        prompt, ids = (tokenizer(one)["input_ids"] for one in (text, answer))
        # The last token of the prompt is the one that is explained.
        scores = plain_scores(model, tokenizer, text, ids, method)[:-1]
        ranking = sorted(range(len(scores)), key=lambda i: -scores[i])

        def after(removed, prompt=prompt, ids=ids):
            copy = [0 if i in removed else token for i, token in enumerate(prompt)]
            if remove == "delete":
                copy = [token for i, token in enumerate(prompt) if i not in removed]
            return log_probability(model, copy, ids)

        m, steps = len(scores), min(20, len(scores))
        sizes = [m // steps + (step < m % steps) for step in range(steps)]
        ends = np.cumsum([0, *sizes])
        values = [after(set(ranking[:end])) for end in ends]
        groups = [ranking[start:end] for start, end in zip(ends, ends[1:], strict=False)]
        falls = values[0] > values[-1]
        for name, value in zip(("rise", "mas"), plain_metrics(values, scores, groups), strict=True):
            expected = value if falls else np.nan
            assert table.per_text[method, name][index] == pytest.approx(expected, abs=1e-6, nan_ok=True)
        measured += falls
        tops = [ranking[: max(1, int(np.ceil(fraction * m)))] for fraction in (0.1, 0.5)]
        for name, sets in (
            ("comprehensiveness", tops),
            ("sufficiency", [set(ranking) - set(top) for top in tops]),
        ):
            drop = np.mean([np.exp(values[0]) - np.exp(after(set(removed))) for removed in sets])
            assert table.per_text[method, name][index] == pytest.approx(drop, abs=1e-6)
    assert measured or table.rows[0]["n"] == 0


def test_classes_of_a_model_that_gives_nan_behind_long_padding():
    config = Gemma2Config(**(DECODER | ALTERNATING), query_pre_attn_scalar=12, num_labels=2)
    config._attn_implementation = "eager"
    model, tokenizer = randomize(Gemma2ForSequenceClassification(config)).double().eval(), words()
    options = dict(methods=("globenc",), progress=False, remove="delete")
    table = pyglobenc.evaluate(model, tokenizer, TEXTS, **options)
    for index, text in enumerate(TEXTS):
        alone = pyglobenc.evaluate(model, tokenizer, [text], **options)
        for key, values in alone.per_text.items():
            assert np.isfinite(values).all()
            np.testing.assert_allclose(table.per_text[key][[index]], values, atol=1e-9)


def test_without_answers_the_most_probable_next_token_is_explained():
    model, tokenizer = build("gpt2"), words()
    options = dict(methods=("globenc", "random"), metrics=("comprehensiveness", "rise"), progress=False)
    table = pyglobenc.evaluate(model, tokenizer, TEXTS, **options)
    with torch.no_grad():
        best = [int(model(**tokenizer(text, return_tensors="pt")).logits[0, -1].argmax()) for text in TEXTS]
    for index, token in enumerate(best):
        one = pyglobenc.evaluate(model, tokenizer, [TEXTS[index]], target=token, **options)
        for key in (("globenc", "comprehensiveness"), ("globenc", "rise")):
            np.testing.assert_allclose(one.per_text[key], table.per_text[key][[index]], atol=1e-6)


def test_recovery_by_hand():
    """The needle is the word that attention looks at; both are found by the plain ranking."""
    model, tokenizer, text = build("llama"), words(), TEXTS[2]
    scores = pyglobenc.explain(model, tokenizer, text, "raw-attention").scores[:-1]
    ranking, starts = np.argsort(-scores), np.arange(len(scores)) * 2
    needle = [(int(starts[i]), int(starts[i]) + 1) for i in ranking[[0, 2, 5, 20]]]
    table = pyglobenc.evaluate(
        model,
        tokenizer,
        [text, "the film"],
        needles=[needle, None],
        methods=("raw-attention",),
        metrics=("recovery",),
        fractions=(0.01, 0.2, 1.0),
        progress=False,
    )
    # 23 units: 10 % are 3, 1 % is 1, and 20 % are 5.
    values = {name: values.tolist() for (_, name), values in table.per_text.items()}
    found = {name: column[0] for name, column in values.items()}
    expected = {"recovery": 0.5, "recovery.0.01": 0.25, "recovery.0.2": 0.5, "recovery.1": 1.0}
    assert found == expected
    assert all(np.isnan(column[1]) for column in values.values())


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"answers": ["a"]}, ValueError, "answers must be a list of 3 strings"),
        ({"answers": ["a", "b", 3]}, TypeError, "answer 3 must be a string, got 3"),
        ({"answers": ["a", " ", "b"]}, ValueError, "answer 2 has no tokens: ' '"),
        ({"answers": ["a", "b", "a " * 20]}, ValueError, "text 3 and its answer have 44 tokens"),
        ({"answers": ANSWERS, "target": 3}, ValueError, "target must be None"),
        ({"target": 97}, ValueError, r"target must be a token id in \[0, 97\), got 97"),
        ({"target": "good"}, TypeError, "a language model's target must be a token id"),
        ({"labels": [0, 1, 1]}, ValueError, "labels are classes"),
        ({"metrics": ("decision-flips",)}, ValueError, "decision-flips needs the probabilities of classes"),
        ({"metrics": ("recovery",)}, ValueError, "recovery needs needles"),
        ({"needles": [[(0, 99)], [], []]}, ValueError, "needle of text 1 has the span"),
    ],
)
def test_refuses_what_a_language_model_cannot_take(options, error, message):
    options = dict(methods=("random",), metrics=("rise",), progress=False) | options
    with pytest.raises(error, match=f"evaluate: .*{message}"):
        pyglobenc.evaluate(build("gpt2"), words(), TEXTS, **options)


def test_refuses_answers_and_decoder_metrics_of_a_classifier():
    options = dict(methods=("random",), progress=False)
    with pytest.raises(ValueError, match="answers need a language model"):
        pyglobenc.evaluate(classifier(), words(), TEXTS, answers=ANSWERS, **options)
    with pytest.raises(ValueError, match="rise needs a language model"):
        pyglobenc.evaluate(classifier(), words(), TEXTS, metrics=("rise",), remove="delete", **options)
    with pytest.raises(ValueError, match="remove='pad' needs a padding or end token"):
        pyglobenc.evaluate(
            build("gpt2"), words(pad_token=None, eos_token=None), TEXTS, remove="pad", **options
        )


def test_words_are_removed_whole_and_the_last_word_stays():
    """The tokenizer splits words at characters; the last word of the prompt holds the explained token."""
    model, letters = build("gpt2"), tokenizer(sep_token=None)
    letters.backend_tokenizer.post_processor = None
    options = dict(methods=("raw-attention",), remove="delete", fractions=(0.5,), progress=False)
    table = pyglobenc.evaluate(
        model, letters, ["deep abc film xyz"], words=True, target=9, metrics=("comprehensiveness",), **options
    )
    found = pyglobenc.explain(model, letters, "deep abc film xyz", "raw-attention")
    pieces = [[i for i, word in enumerate(found.word_ids) if word == w] for w in range(3)]
    sums = [found.scores[own].sum() for own in pieces]
    ids = found.token_ids
    removed = {i for w in np.argsort(sums)[::-1][:2] for i in pieces[w]}
    whole, after = (
        np.exp(log_probability(model, copy, [9]))
        for copy in (ids, [token for i, token in enumerate(ids) if i not in removed])
    )
    value = table.per_text["raw-attention", "comprehensiveness"][0]
    assert value == pytest.approx(whole - after, abs=1e-6)
