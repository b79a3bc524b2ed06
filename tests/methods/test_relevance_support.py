import pytest
from models import build, random_batch

from pyglobenc import TransformerAttribution

REASONS = {
    "albert": "layers share modules",
    "deberta-v3": "computes attention scores itself",
    "modernbert": "no Linear module of their own for query and key and value and intermediate",
}


@pytest.mark.parametrize("name", REASONS)
def test_other_shapes_are_refused(name):
    model = build(name)
    with pytest.raises(ValueError, match=f"relevance rules don't cover this model: .*{REASONS[name]}"):
        TransformerAttribution(model)(**random_batch(model, batch=1, n=6))
