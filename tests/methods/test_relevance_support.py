import pytest
import torch
from models import build, random_batch

from pyglobenc import TransformerAttribution

REASONS = {
    "albert": "layers share modules",
    "deberta-v3": "computes attention scores itself",
    "gpt2": "no Linear module of their own for query and key and value",
    "modernbert": "no Linear module of their own for query and key and value and intermediate",
}


@pytest.mark.parametrize("name", REASONS)
def test_other_shapes_are_refused(name):
    model = build(name)
    with pytest.raises(ValueError, match=REASONS[name]):
        TransformerAttribution(model)(**random_batch(model, batch=1, n=6))


def test_compiled_model():
    model = build("bert-classifier")
    batch = random_batch(model, batch=2, n=6, pads=[0, 2])
    exact = TransformerAttribution(model)(**batch).scores
    assert torch.equal(TransformerAttribution(torch.compile(model, backend="eager"))(**batch).scores, exact)


def test_weights_that_rules_would_misread():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = build("bert-classifier")
    layer = model.bert.encoder.layer[1]
    layer.output.dense = Doubled(80, 48).double()
    with pytest.raises(
        ValueError, match="mlp_output of a layer is a .*Doubled whose weights aren't a plain matrix"
    ):
        TransformerAttribution(model)(**random_batch(model, batch=1, n=6))
