import subprocess
import sys

import numpy as np
import pytest
import torch
from models import EAGER_ALONE, build
from tiny import classifier, minilm, tokenizer
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import BertForTokenClassification, ByT5Tokenizer, PreTrainedTokenizerFast

import pyglobenc
from pyglobenc import GlobEnc, InformationFlow, Rollout, TransformerAttribution, explain
from pyglobenc.explain import explain_each
from pyglobenc.inputs.batches import Runner
from pyglobenc.inputs.windows import MAX_CHARACTERS, encode, join
from pyglobenc.methods.builders import Rows
from pyglobenc.methods.registry import METHODS, RELEVANCE, Method
from pyglobenc.viz.common import caption

TEXT = "the good film is deep, filming."
LONG = " ".join(["the", "deep", "good", "film", "a", "b", "c"] * 10)


def alone(model, ids, target=0, method="globenc"):
    """Return the scores (n,) float64 and the log_scale of one example, directly from the method."""
    if method == "information-flow":
        flow = InformationFlow(model)(input_ids=torch.tensor([ids]), target_span=(target, target + 1))
        return flow.scores[0].numpy(), 0.0
    attribute = GlobEnc(model) if method == "globenc" else Rollout(model, method)
    result = attribute(input_ids=torch.tensor([ids]), targets=[target])
    return result.scores[0, 0].numpy(), float(result.log_scale[0, 0])


def test_real_model():
    model, tok = minilm()
    a = explain(
        model, tok, "A deep and meaningful film, though its tokenization felt rushed.", merge_words=True
    )
    scores, log_scale = alone(model, a.token_ids)
    assert np.array_equal(a.scores, scores) and a.log_scale == log_scale and a.scores.max() == 1
    assert a.tokens[:3] == ["[CLS]", "a", "deep"] and a.special == [True] + [False] * (len(a) - 2) + [True]
    words = {unit.text: unit for unit in a.units()}
    assert words["tokenization"].positions == (9, 10) and words["tokenization"].score == pytest.approx(
        float(a.scores[9:11].sum())
    )
    assert (
        a.method == "globenc"
        and a.target_name == "[CLS]"
        and a.label is None
        and a.version == pyglobenc.__version__
    )
    assert a.settings["model_dtype"] == "float32" and a.settings["torch"] == torch.__version__


def test_real_tokenizer_does_not_cut():
    model, tok = minilm()
    # The model's tokenizer.json asks for truncation at 128 and padding to 128.
    a = explain(model, tok, "word " * 150)
    assert len(a) == 152 and a.cut == 0 and len(explain(model, tok, "word")) == 3


def test_real_text_in_any_script_is_kept_whole():
    model, tok = minilm()
    text = (
        "Na\u00efve \U0001f389 \u4e2d\u6587\u3000\u0645\u0631\u062d\u0628\u0627\n<b>e\u0301\u00ad</b> "
        "\x07 end"
    )
    a = explain(model, tok, text)
    shown = "".join(unit.before + unit.text for unit in a.units() if not unit.special)
    assert a.text == text and shown.strip() == text
    assert "[UNK]" in a.tokens and np.isfinite(a.scores).all()


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].target == "token"])
def test_every_method_is_explained_as_it_computes(method):
    a = explain(classifier(), tokenizer(), TEXT, method=method, target=2)
    scores, log_scale = alone(classifier(), a.token_ids, 2, method)
    assert np.array_equal(a.scores, scores) and a.log_scale == log_scale and a.method == method
    assert a.target == 2 and a.target_name == "good" and a.target_kind == "token"
    assert METHODS[method].summary and METHODS[method].name == method


@pytest.mark.parametrize(
    "name", ["roberta", "albert", "mpnet", "deberta-v2", "modernbert", "gpt2", "llama", "gemma3-encoder"]
)
def test_every_architecture_has_the_target_of_its_method(name):
    model = build(name, attention="eager" if name in EAGER_ALONE else "sdpa")
    a, again = explain(model, tokenizer(), [TEXT, TEXT + " deep"], batch_size=1, progress=False)
    expected = GlobEnc(model)(input_ids=torch.tensor([a.token_ids]))
    assert np.array_equal(a.scores, expected.scores[0, 0].numpy())
    assert a.target_name == ("[SEP]" if name in ("gpt2", "llama") else "[CLS]") and len(again) == len(a) + 1


def test_wrapped_models_are_the_models_inside():
    # sentence-transformers wraps a model in this way.
    inner = torch.nn.Module()
    inner.auto_model = build("bert")
    wrapped = torch.nn.Sequential(inner)
    assert np.array_equal(
        explain(wrapped, tokenizer(), TEXT).scores, explain(build("bert"), tokenizer(), TEXT).scores
    )


@pytest.mark.parametrize("target", [None, 0, 1])
@pytest.mark.parametrize("method", RELEVANCE)
def test_every_variant_is_explained_as_it_computes(method, target):
    a = explain(classifier(), tokenizer(), TEXT, method=method, target=target)
    attribute = TransformerAttribution(classifier())
    expected = attribute(input_ids=torch.tensor([a.token_ids]), target=target, variant=RELEVANCE[method])
    assert (
        np.array_equal(a.scores, expected.scores[0].numpy()) and a.log_scale == 0 and a.target_kind == "class"
    )
    assert (
        a.target == int(expected.target)
        and a.target_name == ["BAD", "GOOD"][a.target]
        and a.label is not None
    )
    assert a.target_name == a.label or target is not None


def test_the_start_layer_is_the_methods():
    model = classifier()
    attribute = TransformerAttribution(model)
    for start_layer in (0, 1):
        a = explain(model, tokenizer(), TEXT, "transformer-attribution", start_layer=start_layer)
        exact = attribute(input_ids=torch.tensor([a.token_ids]), start_layer=start_layer).scores[0]
        assert np.array_equal(a.scores, exact.numpy()) and a.settings["start_layer"] == start_layer
    for method in ("globenc", "lrp", "attention-gradcam"):
        with pytest.raises(ValueError, match=f"start_layer belongs to .*; {method} has none"):
            explain(model, tokenizer(), TEXT, method, start_layer=1)


def test_classes_of_several_texts_are_those_of_each_alone():
    texts = [TEXT, LONG, "good", LONG[5:200], "a b"]
    options = dict(method="transformer-attribution", long="windows")
    several = explain(classifier(), tokenizer(), texts, batch_size=3, progress=False, **options)
    for a, text in zip(several, texts, strict=True):
        one = explain(classifier(), tokenizer(), text, batch_size=1, **options)
        assert a.target_name == a.label == one.target_name and a.windows == one.windows
        torch.testing.assert_close(torch.tensor(a.scores), torch.tensor(one.scores))


def test_labels_numbered_by_strings():
    model = build("bert-classifier")
    model.config.id2label = {"0": "BAD", "1": "GOOD"}
    assert explain(model, tokenizer(), "film", "transformer-attribution", target=1).target_name == "GOOD"


def test_classifiers_tell_what_they_predict():
    a = explain(classifier(), tokenizer(), TEXT)
    with torch.no_grad():
        chances = classifier()(input_ids=torch.tensor([a.token_ids])).logits[0].softmax(0)
    assert a.label == ["BAD", "GOOD"][int(chances.argmax())] and a.probability == pytest.approx(
        float(chances.max()), rel=1e-12
    )
    assert a.predictions == [(a.label, a.probability)]


def test_the_problem_type_decides_what_is_predicted():
    names = dict(id2label={0: "RED", 1: "ROUND", 2: "TALL"})
    model = build("bert-classifier", problem_type="multi_label_classification", **names)
    a = explain(model, tokenizer(), TEXT)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([a.token_ids])).logits[0]
    chances = dict(zip(["RED", "ROUND", "TALL"], logits.sigmoid().tolist(), strict=True))
    assert dict(a.predictions) == pytest.approx(
        {name: chance for name, chance in chances.items() if chance > 0.5}, rel=1e-12
    )
    assert (a.label, a.probability) == (
        max(chances, key=chances.get),
        pytest.approx(max(chances.values()), rel=1e-12),
    )
    model.config.problem_type = "regression"
    b = explain(model, tokenizer(), TEXT)
    assert b.label is None and b.probability is None
    assert dict(b.predictions) == pytest.approx(dict(zip(chances, logits.tolist(), strict=True)), rel=1e-12)
    one = explain(build("bert-classifier", num_labels=1), tokenizer(), TEXT, long="windows", max_length=8)
    assert one.label is None and len(one.predictions) == 1 and one.predictions[0][0] == "LABEL_0"
    assert "predicted LABEL_0 (" in " ".join(f"{name} {value}" for name, value in caption(one))


@pytest.mark.parametrize("names", [{0: "A", 2: "C"}, {"first": "A"}, {2: None}, None])
def test_classes_without_a_name_are_called_by_their_number(names):
    model = build("bert-classifier", num_labels=3)
    model.config.id2label = names
    for target in range(3):
        a = explain(model, tokenizer(), "film", "transformer-attribution", target=target)
        expected = (names or {}).get(target)
        assert a.target_name == (str(target) if expected is None else expected) and a.label is not None
    with pytest.raises(ValueError, match=r"target must be a class in \[0, 3\), got 3"):
        explain(model, tokenizer(), "film", "transformer-attribution", target=3)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_several_texts_equal_each_alone(side, batch_size):
    texts = [TEXT, "good", LONG[:60], "a b"]
    several = explain(
        classifier(), tokenizer(padding_side=side), texts, batch_size=batch_size, target=-1, progress=False
    )
    assert [a.text for a in several] == texts
    for a, text in zip(several, texts, strict=True):
        one = explain(classifier(), tokenizer(), text, target=-1)
        assert a.tokens == one.tokens and a.target == len(a) - 1 and a.target_name == "[SEP]"
        torch.testing.assert_close(torch.tensor(a.scores), torch.tensor(one.scores))
        assert a.log_scale == pytest.approx(one.log_scale, rel=1e-10)


def test_precision():
    assert explain(classifier(), tokenizer(), TEXT).scores.dtype == np.float64
    single = build("bert", torch.float32)
    assert explain(single, tokenizer(), TEXT).scores.dtype == np.float32
    a = explain(single, tokenizer(), TEXT, dtype=torch.float64, backend="reference")
    assert (
        a.scores.dtype == np.float64
        and a.settings["dtype"] == "float64"
        and a.settings["backend"] == "reference"
    )


def test_too_long_a_text_is_refused_with_the_way_out():
    with pytest.raises(
        ValueError,
        match="text has 72 tokens and at most 40 fit; choose long=truncate to leave out the last 32, or "
        "long=windows",
    ):
        explain(classifier(), tokenizer(), LONG)
    with pytest.raises(ValueError, match="text 2 has 72 tokens"):
        explain(classifier(), tokenizer(), ["a", LONG])
    with pytest.raises(ValueError, match="at most 10 fit"):
        explain(classifier(), tokenizer(model_max_length=10), LONG)


def test_a_text_of_too_many_characters_is_not_tokenized():
    def tokenize(*args, **options):
        raise AssertionError("the text was tokenized")

    refused = {("error", 128 * 40 + 1): "at most 5120 are tokenized; choose long=truncate"}
    refused["windows", MAX_CHARACTERS + 1] = f"at most {MAX_CHARACTERS} are tokenized$"
    for (long, count), message in refused.items():
        with pytest.raises(ValueError, match=f"text has {count} characters and .*{message}"):
            encode(tokenize, "a" * count, "text", 40, long)
    assert len(encode(tokenizer(), "the " * 1200, "text", 40, "windows").windows) > 1


def test_truncation_keeps_the_length_it_cut():
    a = explain(classifier(), tokenizer(), LONG, long="truncate")
    full = encode(tokenizer(), LONG, "text", None)
    assert len(a) == 40 and a.cut == 32 and a.text == LONG and a.windows is None
    assert a.token_ids == full.inputs["input_ids"][:39] + [3] and a.tokens[-1] == "[SEP]"
    assert np.array_equal(a.scores, alone(classifier(), a.token_ids)[0])
    assert LONG[: a.offsets[-2][1]].split() == [token for token in a.tokens[1:-1]]
    assert explain(classifier(), tokenizer(), TEXT, long="truncate").cut == 0


def joined_by_hand(ids, size, stride, target):
    """Return the mean share over windows that are computed one by one, in plain loops."""
    body, shares = len(ids) - 2, [[] for _ in ids]
    starts, used = [], []
    for start in [*range(0, body - size, stride), body - size]:
        starts.append(start)
        positions = [0, *range(1 + start, 1 + start + size), len(ids) - 1]
        if target not in positions:
            continue
        used.append((1 + start, 1 + start + size))
        row, _ = alone(classifier(), [ids[i] for i in positions], positions.index(target))
        for i, score in zip(positions, row / row.sum(), strict=True):
            shares[i].append(score)
    return np.array([sum(share) / len(share) if share else 0.0 for share in shares]), used


@pytest.mark.parametrize("target", [0, 5, 30, -1])
@pytest.mark.parametrize("stride", [None, 3, 8])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_windows_are_joined_as_stated(target, stride, batch_size):
    options = dict(long="windows", max_length=12, stride=stride, target=target, batch_size=batch_size)
    a = explain(classifier(), tokenizer(), LONG[:120], **options)
    n = len(a)
    assert n > 12 and a.cut == 0 and a.scores.max() == 1
    expected, used = joined_by_hand(a.token_ids, 10, stride or 5, target % n)
    assert a.windows == used
    torch.testing.assert_close(torch.tensor(a.scores * np.exp(a.log_scale)), torch.tensor(expected))
    assert a.target == target % n and a.target_name == a.tokens[target]
    if target not in (0, -1):
        assert (a.scores == 0).any() and a.scores[a.target] > 0


def test_a_text_that_fits_is_not_split():
    a, b = (explain(classifier(), tokenizer(), TEXT, long=long) for long in ("windows", "error"))
    assert a.windows is None and np.array_equal(a.scores, b.scores) and a.log_scale == b.log_scale


def test_windows_of_many_texts_go_to_the_right_one():
    texts = [LONG[:100], "a", LONG[20:150], TEXT]
    options = dict(long="windows", max_length=14, stride=5)
    several = explain(classifier(), tokenizer(), texts, batch_size=3, progress=False, **options)
    for a, text in zip(several, texts, strict=True):
        one = explain(classifier(), tokenizer(), text, **options)
        assert a.windows == one.windows
        torch.testing.assert_close(torch.tensor(a.scores), torch.tensor(one.scores))
        assert a.probability == pytest.approx(one.probability, rel=1e-10)


def test_join_keeps_silent_windows_and_single_ones():
    assert join(2, [[0, 1]], [np.array([3.0, 5.0])], [2.0])[1] == 2.0
    scores, log_scale = join(
        3, [[0, 1], [1, 2]], [np.zeros(2, np.float32), np.zeros(2, np.float32)], [0.0, 0.0]
    )
    assert not scores.any() and log_scale == 0 and scores.dtype == np.float32
    scores, log_scale = join(3, [[0, 1], [1, 2]], [np.array([1.0, -3.0]), np.array([1.0, 1.0])], [0.0, 7.0])
    assert scores * np.exp(log_scale) == pytest.approx([0.25, (-0.75 + 0.5) / 2, 0.5])


def test_windows_all_explain_one_class(monkeypatch):
    calls = []

    def build_it(model, backend, dtype):
        def run(batch, targets):
            calls.extend(targets.tolist())
            scores = batch["attention_mask"].double()
            return Rows(scores, torch.zeros(len(scores)), targets, model(**batch).logits)

        return run

    monkeypatch.setitem(
        METHODS, "by-class", Method("by-class", "for tests", build_it, "every model", target="class")
    )
    a = explain(classifier(), tokenizer(), LONG, method="by-class", long="windows", batch_size=2)
    assert calls == [a.target] * len(a.windows) and a.target_name == a.label
    assert a.windows[0][0] == 1 and a.windows[-1][1] == len(a) - 1
    other = explain(classifier(), tokenizer(), LONG, method="by-class", long="windows", target=1 - a.target)
    assert other.target == 1 - a.target and other.label == a.label


def test_methods_that_explain_a_class_say_what_they_lack():
    with pytest.raises(ValueError, match=r"target must be a class in \[0, 2\), got 2"):
        explain(classifier(), tokenizer(), TEXT, method="transformer-attribution", target=2)
    with pytest.raises(ValueError, match="the model has no head to explain"):
        explain(build("bert"), tokenizer(), TEXT, method="transformer-attribution")
    tagger = BertForTokenClassification(classifier().config).double().eval()
    with pytest.raises(ValueError, match="logits for every token"):
        explain(tagger, tokenizer(), TEXT, method="transformer-attribution")


@pytest.mark.parametrize(
    "texts, error, message",
    [
        ("", ValueError, "text is empty"),
        (" \t\n\u3000", ValueError, "text is nothing but white space"),
        ("\x00\x01", ValueError, "text holds nothing that the tokenizer knows"),
        ("a\ud800", ValueError, "text isn't valid Unicode"),
        (["a", ""], ValueError, "text 2 is empty"),
        ([], ValueError, "there is no text, got an empty list"),
        (["a", None], TypeError, "text 2 must be a string, got NoneType"),
        (None, TypeError, "must be a string or a list of strings, got NoneType"),
        (b"a", TypeError, "must be a string or a list of strings, got bytes"),
    ],
)
def test_texts_that_are_none(texts, error, message):
    with pytest.raises(error, match=f"explain: .*{message}"):
        explain(classifier(), tokenizer(), texts)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(method="magic"), ValueError, "method must be one of raw-attention, .*, got 'magic'"),
        (dict(long="cut"), ValueError, "long must be one of error, truncate, windows, got 'cut'"),
        (
            dict(target=99),
            ValueError,
            r"target must lie in \[0, 12\), the tokens of text, or \[-12, -1\] from the end, got 99",
        ),
        (dict(target=-13), ValueError, "got -13"),
        (dict(target=1.0), TypeError, "target must be an integer, got 1.0"),
        (dict(target=True), TypeError, "target must be an integer, got True"),
        (dict(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (dict(max_length=41), ValueError, "max_length must be at most 40, which the model takes, got 41"),
        (
            dict(max_length=2),
            ValueError,
            "max_length must be above the 2 special tokens that the tokenizer adds, got 2",
        ),
        (dict(stride=0), ValueError, r"stride must lie in \[1, 38\]"),
        (dict(stride=39, long="windows"), ValueError, r"stride must lie in \[1, 38\]"),
        (dict(backend="gpu"), ValueError, "backend must be one of"),
        (dict(dtype=torch.float16), ValueError, "dtype must be None, torch.float32 or torch.float64"),
    ],
)
def test_options_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=message):
        explain(classifier(), tokenizer(), TEXT, **options)


def test_models_and_tokenizers_that_do_not_fit():
    with pytest.raises(
        ValueError, match="the tokenizer isn't the model's: token id 65, and the model has 60 embeddings"
    ):
        explain(build("bert", vocab_size=60), tokenizer(), "film")
    with pytest.raises(TypeError, match="tokenizer must be a transformers tokenizer, got str"):
        explain(classifier(), "bert-base-uncased", TEXT)
    with pytest.raises(TypeError, match="model must be a transformers PreTrainedModel, .*, got Linear"):
        explain(torch.nn.Linear(2, 2), tokenizer(), TEXT)
    with pytest.raises(ValueError, match="ViTForImageClassification takes pixel_values, not text"):
        explain(build("vit"), tokenizer(), TEXT)
    with pytest.raises(ValueError, match="training mode"):
        explain(build("bert").train(), tokenizer(), TEXT)


def test_slow_tokenizers_lack_only_words():
    model, tok = build("bert", vocab_size=400), ByT5Tokenizer()
    a = explain(model, tok, "abc")
    assert (
        a.tokens == ["a", "b", "c", "</s>"]
        and a.special == [False] * 3 + [True]
        and a.word_ids is None
        and a.offsets is None
    )
    with pytest.raises(ValueError, match="merge_words needs a fast tokenizer"):
        explain(model, tok, "abc", merge_words=True)
    long = explain(model, tok, "abc" * 20, long="windows", max_length=10, target=-1)
    assert long.windows[0] == (0, 9) and long.windows[-1] == (51, 60) and len(long) == 61


def test_bytes_of_one_character_merge_into_its_word():
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(BPE({token: index for index, token in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    tok = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    a = explain(build("bert", vocab_size=300), tok, "Hi \U0001f389 na\u00efve, yo", merge_words=True)
    assert [unit.text for unit in a.units()] == ["<s>", "Hi", "\U0001f389", "na\u00efve", ",", "yo", "</s>"]
    assert "".join(unit.before + unit.text for unit in a.units()[1:-1]).strip() == a.text
    tokens = [unit.text for unit in a.units(merge_words=False)]
    assert tokens[:5] == ["<s>", "H", "i", "\u0120", "\U0001f389"] and len(tokens) == len(a)
    assert sum(unit.score for unit in a.units()) == pytest.approx(a.scores.sum())


def test_a_stopped_job_has_given_what_was_done(monkeypatch):
    compute, seen = Runner._rows, []

    def stop(self, texts, plans, names, jobs):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(jobs)
        return compute(self, texts, plans, names, jobs)

    monkeypatch.setattr(Runner, "_rows", stop)
    done = []
    with pytest.raises(KeyboardInterrupt):
        for a in explain_each(classifier(), tokenizer(), ["a", "b", "c", "d"], batch_size=1, progress=False):
            done.append(a)
    assert [a.text for a in done] == ["a", "b"]
    monkeypatch.undo()
    assert explain(classifier(), tokenizer(), "a") == done[0].__class__(
        **(vars(done[0]) | {"settings": done[0].settings | {"batch_size": 8}})
    )


def test_all_texts_are_checked_before_the_first_is_computed(monkeypatch):
    monkeypatch.setattr(Runner, "_rows", lambda *args: pytest.fail("computed"))
    with pytest.raises(ValueError, match="text 3 has 72 tokens"):
        explain_each(classifier(), tokenizer(), ["a", "b", LONG])


def test_progress_is_shown_for_several_texts(capsys):
    explain(classifier(), tokenizer(), ["a", "b"])
    assert "2/2" in capsys.readouterr().err
    explain(classifier(), tokenizer(), "a")
    explain(classifier(), tokenizer(), ["a"])
    explain(classifier(), tokenizer(), ["a", "b"], progress=False)
    assert capsys.readouterr().err == ""


def test_import_leaves_the_heavy_packages_alone():
    heavy = ("torch", "transformers", "matplotlib", "scipy", "triton")
    code = f"import sys, pyglobenc, pyglobenc.cli.main; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_public_names():
    assert all(getattr(pyglobenc, name) for name in pyglobenc.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pyglobenc.nothing  # noqa: B018
