"""Several logits of each example from one forward pass: each row is what its logit gives alone."""

from itertools import product

import pytest
import torch
from models import build, random_batch
from sweeps import sweep

from pyglobenc import GradientAttribution, GradientRollout, TransformerAttribution
from pyglobenc.methods.gradients.attribution import GRADIENTS, REPLACING

LANGUAGE = ("gpt2", "llama", "mistral", "qwen2", "qwen3-moe", "phi3", "gemma2", "gemma3")
METHODS = (*GRADIENTS, "gradient-rollout")
POSITIONS = torch.tensor([[3, 5, 8], [6, 2, 4]])
TARGETS = torch.tensor([[7, 9, 11], [12, 13, 14]])


@pytest.mark.parametrize(
    "name, method",
    sweep(
        product(LANGUAGE, METHODS),
        [*product(("llama",), METHODS), *zip(LANGUAGE * 2, [*METHODS, *METHODS], strict=False)],
    ),
)
@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.PrecisionWarning")
@pytest.mark.filterwarnings("ignore::pyglobenc.methods.precision.reliability.NoRelevanceWarning")
def test_each_row_is_that_of_the_text_up_to_its_token(name, method):
    model = build(name)
    run = GradientRollout(model) if method == "gradient-rollout" else GradientAttribution(model, method)
    batch = random_batch(model, batch=2, n=9, pads=[0, 2])
    options = dict(contrast=20) | (dict(replacement=4) if method in REPLACING else {})
    several = run(**batch, **options, target=TARGETS, position=POSITIONS)
    # The model may also return the logits of these tokens alone.
    some = torch.tensor([2, 3, 4, 5, 6, 8])
    kept = run(**batch, **options, target=TARGETS, position=POSITIONS, logits_to_keep=some)
    assert several.scores.shape == (2, 3, 9) and several.logit.shape == (2, 3)
    for b in range(2):
        for t in range(3):
            n = int(POSITIONS[b, t]) + 1
            one = run(input_ids=batch["input_ids"][b : b + 1, :n], target=int(TARGETS[b, t]), **options)
            close = 1e-9 * float(one.scores.abs().max())
            for result in (several, kept):
                assert float((result.scores[b, t, :n] - one.scores[0]).abs().max()) <= close
                assert float(result.scores[b, t, n:].abs().sum()) <= close
                assert float(result.logit[b, t]) == pytest.approx(float(one.logit), rel=1e-9)
            assert one.error is None or abs(float(several.error[b, t] - one.error)) <= 1e-9


def test_refusals():
    model = build("llama")
    batch = random_batch(model, batch=2, n=9, pads=[0, 2])
    run = GradientAttribution(model)
    for wrong, message in (
        (dict(position=torch.tensor([[3], [7]])), "position is a padding token"),
        (dict(position=POSITIONS[:1]), "position must be one integer or one for each of 2 examples"),
        (dict(position=POSITIONS, target=TARGETS[:, :2]), "target must be one integer or one for each of 2"),
        (dict(position=POSITIONS, logits_to_keep=torch.tensor([3, 5])), "position must lie in"),
        (
            dict(position=POSITIONS, logits_to_keep=torch.tensor([3, 8])),
            "position must be one of the tokens that logits_to_keep names",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(**batch, **wrong)
    classifier = build("bert-classifier")
    with pytest.raises(ValueError, match="one set of logits"):
        run = GradientAttribution(classifier)
        run(**random_batch(classifier, batch=2, n=9), position=POSITIONS)
    with pytest.raises(ValueError, match="target must be one integer or one for each of 1 examples"):
        TransformerAttribution(classifier)(
            **random_batch(classifier, batch=1, n=5), target=torch.tensor([[0, 1]])
        )
