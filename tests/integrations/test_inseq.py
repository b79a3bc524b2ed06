"""pyglobenc's methods inside inseq: the same numbers as those of pyglobenc's own calls."""

import pytest
import torch
import two_streams
from models import build
from tiny import by_bytes

from pyglobenc import CrossAttribution, GlobEnc, GradientAttribution, GradientRollout, explain_generation
from pyglobenc.methods.registry import METHODS

inseq = pytest.importorskip("inseq", reason="inseq isn't installed: docs/integrations.md says how")

from inseq.attr.step_functions import get_step_function  # noqa: E402

from pyglobenc.integrations.inseq import CLASSES  # noqa: E402

PROMPT, ANSWER = "the good film", " and the"
WORDS = by_bytes("t h", "th e", "Ġ the", "f i", "l m", "fi lm", "Ġ film", eos_token="!", pad_token="$")
# Methods by their own calls on a prefix and for the token after it.
CALLS = {
    "globenc": lambda model, ids, target: GlobEnc(model)(input_ids=ids).scores[0],
    "gradient-rollout": lambda model, ids, target: (
        GradientRollout(model)(input_ids=ids, target=target).scores
    ),
    "attnlrp": lambda model, ids, target: (
        GradientAttribution(model, "attnlrp")(input_ids=ids, target=target).scores
    ),
}


def decoder(name="llama", dtype=torch.float64):
    return build(name, dtype, vocab_size=len(WORDS), bos_token_id=1, eos_token_id=WORDS.eos_token_id)


def loaded(model, method, **options):
    return inseq.load_model(model, f"pyglobenc-{method}", tokenizer=WORDS, **options)


def attributed(model, *texts, **options):
    out = model.attribute(*texts, show_progress=False, **options)
    return out.sequence_attributions


def known(scores):
    """Return scores with 0 where inseq has NaN: at tokens after the explained one."""
    return scores.nan_to_num(0)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("method", CALLS)
def test_each_token_gets_the_scores_of_its_own_call(method, name):
    model = decoder(name, torch.float32)
    (found,) = attributed(loaded(model, method), PROMPT, PROMPT + ANSWER)
    ids = WORDS(PROMPT + ANSWER)["input_ids"]
    start = len(WORDS(PROMPT)["input_ids"])
    assert [token.id for token in found.target] == ids and found.target_attributions.shape[1] == 5
    for step, n in enumerate(range(start, len(ids))):
        (row,) = CALLS[method](model, torch.tensor([ids[:n]]), ids[n])
        assert torch.equal(found.target_attributions[:n, step], row)


@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
@pytest.mark.parametrize("method", [name for name in CLASSES if name not in CALLS])
def test_every_method_that_explains_a_token_is_registered(method):
    assert f"pyglobenc-{method}" in inseq.list_feature_attribution_methods()
    model = decoder()
    if METHODS[method].models == "post-norm encoders":
        with pytest.raises(ValueError, match="N_ResLN"):
            attributed(loaded(model, method), PROMPT, PROMPT + ANSWER)
        return
    (found,) = attributed(loaded(model, method), PROMPT, PROMPT + ANSWER)
    rows = explain_generation(model, WORDS, PROMPT, method, answer=ANSWER)
    exact = torch.tensor(rows.scores).T
    # inseq keeps scores in float32.
    wrong = (known(found.target_attributions) - exact).abs().max()
    assert wrong <= torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_gets_the_scores_of_cross_attribution(name):
    model = two_streams.build(
        name,
        torch.float32,
        vocab_size=len(WORDS),
        pad_token_id=WORDS.pad_token_id,
        eos_token_id=WORDS.eos_token_id,
        decoder_start_token_id=WORDS.pad_token_id,
    )
    at_work = loaded(model, "gradient-rollout")
    (found,) = attributed(at_work, PROMPT, "a film", attribute_target=True)
    source, ids = (WORDS(text)["input_ids"] for text in (PROMPT, "a film"))
    ids = [WORDS.pad_token_id, *ids]
    for step, n in enumerate(range(1, len(ids))):
        exact = CrossAttribution(model)(
            input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([ids[:n]]), target=ids[n]
        )
        assert torch.equal(found.source_attributions[:, step], exact.source_scores[0])
        assert torch.equal(found.target_attributions[:n, step], exact.scores[0])
    (alone,) = attributed(at_work, PROMPT, "a film")
    assert alone.target_attributions is None
    assert torch.equal(alone.source_attributions, found.source_attributions)
    with pytest.raises(ValueError, match="belongs to an encoder-decoder"):
        loaded(model, "globenc")


def test_padding_gets_no_score_and_changes_none():
    method = loaded(decoder(), "attnlrp").attribution_method
    pad, ids = WORDS.pad_token_id, WORDS(PROMPT)["input_ids"]
    batch = torch.tensor([[pad, pad, *ids], [*ids, *ids[:2]]])
    mask = torch.ones_like(batch)
    mask[0, :2] = 0

    def scores(ids, mask):
        given = (ids, torch.full((len(ids), 1), 5), get_step_function("logit"), mask, True, [])
        step = method.attribute_step(dict(inputs=(None,), additional_forward_args=given))
        return step.target_attributions

    together, alone = scores(batch, mask), scores(batch[:1, 2:], mask[:1, 2:])
    assert torch.equal(together[0, 2:], alone[0]) and not together[0, :2].any()
    assert torch.equal(together[1:], scores(batch[1:], mask[1:]))


def test_the_logit_is_explained_and_nothing_else():
    model = loaded(decoder(), "gradient-rollout")
    out = model.attribute(PROMPT, PROMPT + ANSWER, show_progress=False)
    assert out.info["attributed_fn"] == "logit_fn"
    named = model.attribute(PROMPT, PROMPT + ANSWER, attributed_fn="logit", show_progress=False)
    assert torch.equal(known(named[0].target_attributions), known(out[0].target_attributions))
    with pytest.raises(ValueError, match="pyglobenc-gradient-rollout: .*'logit', got probability_fn"):
        model.attribute(PROMPT, PROMPT + ANSWER, attributed_fn="probability", show_progress=False)


def test_a_method_of_one_call_leaves_the_usual_one():
    model = inseq.load_model(decoder(), "saliency", tokenizer=WORDS)
    usual = model.attribute(PROMPT, PROMPT + ANSWER, show_progress=False)
    once = model.attribute(PROMPT, PROMPT + ANSWER, method="pyglobenc-globenc", show_progress=False)
    again = model.attribute(PROMPT, PROMPT + ANSWER, show_progress=False)
    assert [one.info["attributed_fn"] for one in (usual, once, again)] == [
        "probability_fn",
        "logit_fn",
        "probability_fn",
    ]
    assert again.info["attribution_method"] == "saliency" and model.is_hooked
    assert torch.equal(known(again[0].target_attributions), known(usual[0].target_attributions))


def test_options_and_refusals():
    model = decoder()
    (found,) = attributed(loaded(model, "gradient-rollout", start_layer=1), PROMPT, PROMPT + ANSWER)
    rows = explain_generation(model, WORDS, PROMPT, "gradient-rollout", answer=ANSWER, start_layer=1)
    exact = torch.tensor(rows.scores).T
    assert (known(found.target_attributions) - exact).abs().max() <= 1e-6 * exact.abs().max()
    with pytest.raises(ValueError, match="start_layer belongs to"):
        loaded(model, "globenc", start_layer=1)
    with pytest.raises(ValueError, match="causal language model with its head"):
        loaded(build("bert", vocab_size=len(WORDS), bos_token_id=1), "globenc")


def test_inseqs_viewer_shows_the_scores():
    model = loaded(decoder(), "globenc")
    out = model.attribute(PROMPT, PROMPT + ANSWER, show_progress=False)
    page = out.show(display=False, return_html=True)
    assert "film" in page and f"{float(out[0].target_attributions[0, 0]):.2f}"[:3] in page
