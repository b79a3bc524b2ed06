"""Generated tokens explained by one pass, compared with each token alone, with autograd and with generate."""

from functools import partial

import numpy as np
import pytest
import torch
from allocations import measure_allocations
from models import build
from sweeps import slow
from tiny import VOCABULARY, by_bytes, classifier, tokenizer

from pyglobenc import explain_generation
from pyglobenc.inputs import generation
from pyglobenc.methods.registry import METHODS

LANGUAGE = ("gpt2", "llama", "mistral", "qwen2", "qwen3-moe", "phi3", "gemma2", "gemma3")
PROMPT = "the good film. a b c"
# These methods are defined on a post-norm layer, or explain a class of the whole text.
REFUSED = (
    "n-resln",
    *(name for name, one in METHODS.items() if one.target == "class" and not one.next_token),
)
TEMPLATE = (
    "{% for m in messages %}[CLS] {{ m.role }} . {{ m.content }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}[CLS] a . {% endif %}"
)


def language_model(name, dtype=torch.float64, **changes):
    return build(name, dtype, vocab_size=len(VOCABULARY), **changes)


def alone(model, a, t):
    """Return the scores and the log_scale of generated token t by the method alone, on the text up to it."""
    method, n = METHODS[a.method], a.prompt_length + t
    batch = {"input_ids": torch.tensor([a.token_ids[:n]])}
    if method.replaces_tokens:
        batch |= dict(replacement=4, special_tokens_mask=torch.tensor([a.special[:n]]).long())
    target = n - 1 if method.target == "token" else a.token_ids[n]
    rows = method.run("test", model, "auto", None)(batch, torch.tensor([target]))
    return rows.scores[0].numpy(), float(rows.log_scale[0])


def assert_rows_are_those_alone(model, a):
    for t in range(len(a)):
        exact, log_scale = alone(model, a, t)
        n = a.prompt_length + t
        assert np.abs(a.scores[t, :n] - exact).max() <= 1e-9 * np.abs(exact).max()
        assert not a.scores[t, n:].any() and a.log_scale[t] == pytest.approx(log_scale, abs=1e-9)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in REFUSED])
@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.NoRelevanceWarning")
def test_each_row_is_that_of_the_text_up_to_its_token(method):
    model = language_model("llama")
    a = explain_generation(model, tokenizer(), PROMPT, method, max_new_tokens=4)
    assert (a.scores.shape, len(a), a.prompt_length) == ((4, 13), 4, 9)
    assert_rows_are_those_alone(model, a)


@pytest.mark.parametrize("method", ["globenc", "gradient-rollout"])
@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.NoRelevanceWarning")
def test_every_language_model(name, method):
    model = language_model(name)
    assert_rows_are_those_alone(
        model, explain_generation(model, tokenizer(), PROMPT, method, max_new_tokens=3)
    )


@pytest.mark.parametrize("name", LANGUAGE)
def test_gradients_and_tokens_are_those_of_transformers(name):
    model = language_model(name)
    # These settings would change what `generate` returns, and are no part of what is explained.
    model.generation_config.repetition_penalty = 1.5
    a = explain_generation(model, tokenizer(), PROMPT, max_new_tokens=4)
    model.generation_config.repetition_penalty = None
    n = a.prompt_length
    ids = model.generate(torch.tensor([a.token_ids[:n]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert a.token_ids == ids[0].tolist()
    for t in range(4):
        output = model(input_ids=ids[:, : n + t], output_hidden_states=True)
        logits, h = output.logits[0, -1], output.hidden_states[0]
        (grad,) = torch.autograd.grad(logits[ids[0, n + t]], h)
        exact = (grad * h).sum(-1)[0].detach().numpy()
        assert np.abs(a.scores[t, : n + t] - exact).max() <= 1e-9 * np.abs(exact).max()
        assert a.probabilities[t] == pytest.approx(
            float(logits.detach().softmax(-1)[ids[0, n + t]]), rel=1e-9
        )


def test_an_answer_that_is_given():
    model, tok = language_model("llama"), tokenizer()
    a = explain_generation(model, tok, PROMPT, answer="the deep film")
    ids = tok.convert_tokens_to_ids(["the", "deep", "film"])
    for answer in (ids, torch.tensor(ids), tuple(ids), np.array(ids)):
        b = explain_generation(model, tok, PROMPT, answer=answer)
        assert np.array_equal(a.scores, b.scores) and a.text == b.text
    assert a.generated_tokens == ["the", "deep", "film"] and a.token_ids[9:] == ids
    assert a.text == PROMPT + " the deep film" and (a.prompt, a.answer) == (PROMPT, " the deep film")
    assert_rows_are_those_alone(model, a)
    assert a.settings["answer"] == "given"
    (one,) = explain_generation(model, tok, PROMPT, answer="deep")
    assert one.target_name == "deep" and one.target == tok.convert_tokens_to_ids("deep")


def test_an_end_token_ends_the_answer():
    model, tok = language_model("llama"), tokenizer()
    free = explain_generation(model, tok, PROMPT, max_new_tokens=5)
    end = free.token_ids[free.prompt_length + 2]
    first = free.token_ids.index(end, free.prompt_length) - free.prompt_length
    for holder in (model.generation_config, tok):
        before, holder.eos_token_id = holder.eos_token_id, end
        a = explain_generation(model, tok, PROMPT, max_new_tokens=5)
        holder.eos_token_id = before
        assert a.token_ids == free.token_ids[: a.prompt_length + first + 1]
        assert np.array_equal(a.scores, free.scores[: first + 1, : len(a.tokens)])


def test_conversations():
    model, tok = language_model("llama"), tokenizer(chat_template=TEMPLATE)
    messages = [{"role": "b", "content": "the good film"}]
    a = explain_generation(model, tok, messages, max_new_tokens=3)
    text = "[CLS] b . the good film [SEP] [CLS] a . "
    assert a.token_ids[: a.prompt_length] == tok(text, add_special_tokens=False)["input_ids"]
    assert (
        a.special[:3] == [True, False, False] and a.special[6:8] == [True, True] and a.text.startswith(text)
    )
    assert_rows_are_those_alone(model, a)
    # An assistant's message is continued.
    plain = tokenizer(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    own = [{"role": "user", "content": "the "}, {"role": "assistant", "content": "good film"}]
    b = explain_generation(model, plain, own, answer="deep")
    assert b.tokens == ["the", "good", "film", "deep"] and not any(b.special)
    with pytest.raises(ValueError, match="chat template takes no such messages"):
        explain_generation(model, tokenizer(), messages)
    for wrong in (["text"], [], [{"role": "user"}], 7, ("a", "b")):
        with pytest.raises(TypeError, match="a list of messages with role and content"):
            explain_generation(model, tok, wrong)


def test_the_text_of_an_answer_in_bytes():
    tok = by_bytes("a b", eos_token="!")
    model = build("llama", vocab_size=300)
    ids = tok("a\u00e9 \U0001f389b")["input_ids"]
    a = explain_generation(model, tok, "ab \u00e9", answer=[*ids, tok.eos_token_id, ids[0], ids[1]])
    # A character of several bytes belongs to the last of them, one without its last byte to none.
    assert a.answer == "a\u00e9 \U0001f389ba" and a.text == "ab \u00e9" + a.answer
    pieces = [a.text[start:stop] for start, stop in a.offsets[a.prompt_length :]]
    assert pieces == ["a", "", "\u00e9", " ", "", "", "", "\U0001f389", "b", "", "a", ""]
    assert a.special[-3] and not a.special[-2] and a.word_ids[-3] is None
    a.to_html()


def test_sums_over_sentences_words_and_spans():
    model, tok = language_model("llama"), tokenizer()
    prompt = "the film. is it good? yes!\ndeep"
    a = explain_generation(model, tok, prompt, answer="film. good, the")
    s = a.sentences()
    expected = ["the film.", "is it good?", "yes!", "deep", "film .", "good , the"]
    assert [text.strip() for text in s.sources] == expected
    assert [text.strip() for text in s.targets] == expected[-2:]
    tokens, first = a.tokens, a.prompt_length
    groups = [range(1, 4), range(4, tokens.index("?") + 1)]
    rows = [range(2), range(2, 5)]
    for r, row in enumerate(rows):
        for c, column in enumerate(groups):
            exact = sum(float(a.scores[i, j]) for i in row for j in column)
            assert s.scores[r, c] == pytest.approx(exact, rel=1e-12, abs=1e-15)
    special = [i for i, flag in enumerate(a.special) if flag]
    assert s.scores.sum() == pytest.approx(a.scores.sum() - a.scores[:, special].sum())
    w = a.words(shares=True)
    assert w.scores.sum() == pytest.approx(a.shares().sum() - a.shares()[:, special].sum())
    assert "yes" in [text.strip() for text in w.sources] and len(w.targets) == 5
    p = a.spans([(0, 2), (1, 4)], [(first, first + 2)])
    assert p.scores[0] == pytest.approx([a.scores[:2, :2].sum(), a.scores[:2, 1:4].sum()])
    assert np.allclose(a.spans([(0, first)]).scores[:, 0], a.scores[:, :first].sum(1), rtol=1e-12)
    for wrong in ([(0, 0)], [(3, 2)], [(0, 99)], [5], [(-1, 2)]):
        with pytest.raises(ValueError, match="sources must be pairs"):
            a.spans(wrong)
    with pytest.raises(ValueError, match="targets must be pairs"):
        a.spans([(0, 1)], [(first - 1, first)])
    for sums in (s, w, p):
        assert "<table>" in sums.to_html() and sums.to_png().startswith(b"\x89PNG")


def test_rows_are_attributions():
    model, tok = language_model("llama"), tokenizer()
    a = explain_generation(model, tok, PROMPT, "n-res", answer="the deep film")
    one = a[1]
    assert np.array_equal(one.scores, a.scores[1]) and one.target == 9 and one.target_name == "the"
    assert one.target_kind == "token" and one.log_scale == a.log_scale[1] and a[-1].target_name == "deep"
    assert [b.target for b in a] == [8, 9, 10] and "film" in one.to_html()
    with pytest.raises(IndexError, match="there are 3 generated tokens, got 3"):
        a[3]
    # Rows of a rollout have scales of their own, so their shares are added.
    words, own = a.words(), a.words(shares=True)
    assert np.array_equal(words.scores, own.scores) and ("sums of", "shares") in words.caption
    assert ("sums of", "scores") in a.words(shares=False).caption
    shares = a.shares()
    assert np.allclose(np.abs(shares).sum(1), 1) and np.allclose(a.mean().scores, shares.mean(0))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_is_left_as_it_was(mode, monkeypatch):
    model, tok = language_model("llama", torch.float32), tokenizer()

    def state():
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        flags = [(p.requires_grad, p.grad, p._version) for p in model.parameters()]
        return hooks, flags, model.generation_config.to_dict(), model.config._attn_implementation

    before = state()
    for method in ("gradient-x-input", "gradient-rollout", "globenc", "integrated-gradients"):
        with mode():
            explain_generation(model, tok, PROMPT, method, max_new_tokens=2)
        assert state() == before
    monkeypatch.setattr(generation, "_result", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain_generation(model, tok, PROMPT, max_new_tokens=2)
    assert state() == before


@pytest.mark.parametrize("method", [slow("gradient-x-input"), "gradient-rollout"])
def test_memory_of_more_tokens_is_that_of_their_scores(method):
    """Every backward pass runs on one graph, and one gradient exists at a time."""
    model, tok = language_model("llama", torch.float32, max_position_embeddings=400), tokenizer()
    prompt = "the good film " * 100
    few, many = (
        measure_allocations(partial(explain_generation, model, tok, prompt, method, answer=[7] * count))
        for count in (4, 44)
    )
    # 40 more tokens make the text longer by an eighth; a graph for each would take ten times the memory.
    assert many.peak <= 1.5 * few.peak and many.largest <= 1.5 * few.largest


@pytest.mark.parametrize("method", ["gradient-x-input", "gradient-rollout", "globenc", "occlusion"])
def test_a_model_that_sees_later_tokens_is_refused(method):
    model = language_model("gemma3", use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="isn't causal|one pass over the whole text"):
        explain_generation(model, tokenizer(), PROMPT, method, max_new_tokens=3)
    with pytest.raises(ValueError, match="a token depends on tokens after it"):
        explain_generation(model, tokenizer(), PROMPT, method, answer="the deep film")


def test_a_cache_that_changes_the_logits_is_refused():
    model = language_model("llama")

    def hook(module, args, kwargs, output):
        if kwargs["input_ids"].shape[1] == 1:
            output.logits += torch.linspace(0, 1, output.logits.shape[-1], dtype=torch.float64)

    handle = model.register_forward_hook(hook, with_kwargs=True)
    with pytest.raises(
        ValueError, match="other logits with its cache .* those of generated token [12] differ"
    ):
        explain_generation(model, tokenizer(), PROMPT, max_new_tokens=3)
    handle.remove()
    explain_generation(model, tokenizer(), PROMPT, max_new_tokens=3)


@pytest.mark.parametrize("method", ["globenc", "gradient-x-input"])
def test_weights_that_are_no_numbers_are_named(method):
    model = language_model("llama")
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="parameter lm_head.weight holds NaN"):
        explain_generation(model, tokenizer(), PROMPT, method, answer="the deep film")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates_what_it_explains(dtype):
    a = explain_generation(language_model("llama", dtype), tokenizer(), PROMPT, max_new_tokens=4)
    assert a.scores.dtype == np.float32 and len(a) == 4


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(max_new_tokens=0), ValueError, "max_new_tokens must be at least 1"),
        (dict(max_new_tokens=True), TypeError, "max_new_tokens must be an integer"),
        (dict(max_new_tokens=3, answer="film"), ValueError, "not both"),
        (
            dict(max_new_tokens=33),
            ValueError,
            "the prompt has 9 tokens and the answer up to 33, of which 41 fit",
        ),
        (dict(answer=""), ValueError, "the answer has no tokens"),
        (dict(answer=[99]), ValueError, r"token ids in \[0, 70\), got 99 to 99"),
        (dict(answer=[1.5]), TypeError, "answer must be a text or a list of token ids"),
        (dict(answer=[True]), TypeError, "answer must be a text or a list of token ids"),
        (dict(answer=torch.tensor([[7, 8]])), TypeError, "answer must be a text or a list of token ids"),
        (dict(answer=7), TypeError, "answer must be a text or a list of token ids"),
        (dict(method="lrp"), ValueError, "lrp explains a class of the whole text; choose one of .*globenc"),
        (dict(method="norms"), ValueError, "explain_generation: method must be one of"),
        (dict(max_length=5), ValueError, "the prompt has 9 tokens and at most 5 fit"),
        (dict(temperature=1), TypeError, "explain_generation: takes no temperature"),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        explain_generation(language_model("llama"), tokenizer(), PROMPT, **options)


@pytest.mark.parametrize("name", ["bert-classifier", "qwen3", "bert"])
def test_models_that_generate_nothing_are_refused(name):
    model = classifier() if name == "bert-classifier" else build(name)
    with pytest.raises(ValueError, match="a causal language model with its head"):
        explain_generation(model, tokenizer(), PROMPT, "globenc")
    with pytest.raises(ValueError, match="training mode"):
        explain_generation(language_model("llama").train(), tokenizer(), PROMPT)
