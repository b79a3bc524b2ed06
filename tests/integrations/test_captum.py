"""pyglobenc's methods with captum's interface: its metrics and pictures run, on the same numbers."""

import pytest
import torch
from models import build, random_batch
from tiny import classifier, tokenizer

from pyglobenc import GlobEnc, GradientAttribution, GradientRollout, TransformerAttribution
from pyglobenc.methods.registry import METHODS

captum = pytest.importorskip("captum", reason="captum isn't installed: pip install captum")

from captum.attr import InputXGradient, visualization  # noqa: E402
from captum.metrics import infidelity, sensitivity_max  # noqa: E402

from pyglobenc.integrations.captum import Attributor  # noqa: E402


def embedded(model, batch):
    return model.get_input_embeddings()(batch["input_ids"]).detach()


def texts(model, n=9):
    """Return the embeddings of two texts, one of them padded, their mask, and the batch of ids."""
    batch = random_batch(model, 2, n, [0, 3])
    return embedded(model, batch), batch["attention_mask"], batch


def test_scores_of_ids_are_those_of_the_call():
    model = classifier()
    _, mask, batch = texts(model)
    found = Attributor(model).attribute(batch["input_ids"], target=1, additional_forward_args=mask)
    assert torch.equal(found, GradientRollout(model)(**batch, target=1).scores)
    found = Attributor(model, "globenc").attribute(batch["input_ids"], additional_forward_args=mask)
    assert torch.equal(found, GlobEnc(model)(**batch).scores[:, 0])
    options = dict(start_layer=1, backend="reference", dtype=torch.float64)
    found = Attributor(model, "transformer-attribution", **options).attribute(
        batch["input_ids"], [0, 1], mask
    )
    exact = TransformerAttribution(model, "reference", torch.float64)
    assert torch.equal(found, exact(**batch, target=[0, 1], start_layer=1).scores)
    # The predicted class is explained if none is named.
    found = Attributor(model, "saliency").attribute(batch["input_ids"], additional_forward_args=(mask,))
    assert torch.equal(found, GradientAttribution(model, "saliency")(**batch).scores)


@pytest.mark.parametrize("method", ["gradient-rollout", "globenc", "saliency", "attnlrp", "gradient-x-input"])
def test_scores_of_embeddings_add_up_to_those_of_tokens(method):
    model = classifier()
    x, mask, _ = texts(model)
    target = None if METHODS[method].target == "token" else torch.tensor([0, 1])
    found = Attributor(model, method).attribute(x, target=target, additional_forward_args=mask)
    batch = dict(inputs_embeds=x, attention_mask=mask)
    exact = METHODS[method].run("test", model, "auto", None)(batch, target).scores
    assert found.shape == x.shape
    assert (found.sum(2) - exact).abs().max() <= 1e-14 * exact.abs().max() * x.shape[2]
    assert not found[mask == 0].any()


def test_products_of_a_decoders_embeddings_are_captums():
    # The first layer of Llama reads the embeddings themselves.
    model = build("llama")
    x, mask, _ = texts(model)
    at = mask.sum(1) - 1
    target = [(int(p), 7) for p in at]
    found = Attributor(model, "gradient-x-input").attribute(x, target, mask)
    exact = InputXGradient(lambda x, mask: model(inputs_embeds=x, attention_mask=mask).logits)
    exact = exact.attribute(x.clone().requires_grad_(), target, mask)
    assert (found - exact).abs().max() <= 1e-12 * exact.abs().max()
    # The default position is the same.
    assert torch.equal(Attributor(model, "gradient-x-input").attribute(x, 7, mask), found)


def test_embeddings_of_another_width_get_equal_shares():
    model = build("electra")
    x, mask, _ = texts(model)
    assert x.shape[2] != model.config.hidden_size
    found = Attributor(model, "attnlrp").attribute(x, 1, mask)
    exact = GradientAttribution(model, "attnlrp")(inputs_embeds=x, attention_mask=mask, target=1).scores
    assert torch.equal(found, (exact / x.shape[2])[..., None].expand(x.shape))


@pytest.mark.parametrize("size", [12, 14])
@pytest.mark.parametrize("method", ["transformer-attribution", "gradient-rollout", "occlusion"])
def test_scores_of_pixels_add_up_to_those_of_patches(method, size):
    model = build("vit", image_size=size)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    found = Attributor(model, method).attribute(x, target=[0, 1])
    target = torch.tensor([0, 1])
    exact = METHODS[method].run("test", model, "auto", None)({"pixel_values": x}, target).scores[:, -9:]
    patches = torch.nn.functional.avg_pool2d(found.sum(1), 4).flatten(1) * 16
    assert (patches - exact).abs().max() <= 1e-13 * exact.abs().max()
    # Pixels beyond the last whole patch aren't read.
    assert found.shape == x.shape and not found[:, :, 12:].any() and not found[..., 12:].any()


def noise(x):
    change = torch.randn_like(x) * 0.01
    return change, x - change


@pytest.mark.parametrize("method", ["gradient-rollout", "attnlrp"])
def test_captums_metrics_run_on_texts(method):
    model = classifier()
    x, mask, _ = texts(model)
    one = Attributor(model, method)
    scores = one.attribute(x, target=1, additional_forward_args=mask)
    assert torch.equal(one.forward_func(x, mask), model(inputs_embeds=x, attention_mask=mask).logits)
    torch.manual_seed(3)
    found = infidelity(one.forward_func, noise, x, scores, additional_forward_args=mask, target=1)
    torch.manual_seed(3)
    copies = [t.repeat_interleave(10, 0) for t in (x, mask, scores)]
    change, changed = noise(copies[0])
    logits = (model(inputs_embeds=t, attention_mask=copies[1]).logits[:, 1] for t in (copies[0], changed))
    fall = next(logits) - next(logits)
    exact = ((change * copies[2]).sum((1, 2)) - fall).square().view(2, 10).mean(1)
    assert (found - exact).abs().max() <= 1e-10 * exact.max()
    found = sensitivity_max(one.attribute, x, target=1, additional_forward_args=mask)
    assert found.shape == (2,) and bool((found > 0).all())
    # Without a perturbation nothing changes.
    still = sensitivity_max(one.attribute, x, lambda t: t, target=1, additional_forward_args=mask)
    assert float(still.max()) <= 1e-12


def test_captums_metrics_run_on_images():
    model = build("vit")
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    one = Attributor(model, "transformer-attribution")
    scores = one.attribute(x, target=1)
    assert infidelity(one.forward_func, noise, x, scores, target=1).shape == (2,)
    assert sensitivity_max(one.attribute, x, target=1, max_examples_per_batch=4).shape == (2,)


def test_captums_pictures_show_the_scores():
    model, words = classifier(), tokenizer()
    ids = words("the good film", return_tensors="pt")["input_ids"]
    scores = Attributor(model, "attnlrp").attribute(ids, target=1)[0]
    record = visualization.VisualizationDataRecord(
        scores, 0.7, "GOOD", "GOOD", "GOOD", scores.sum(), words.convert_ids_to_tokens(ids[0]), 0.0
    )
    assert "film" in visualization.visualize_text([record]).data


def test_what_cant_be_honoured_is_refused():
    model = classifier()
    x, mask, batch = texts(model)
    one = Attributor(model)
    with pytest.raises(TypeError, match="inputs must be one tensor"):
        one.attribute((x, mask), target=1)
    with pytest.raises(ValueError, match="globenc explains a position"):
        Attributor(model, "globenc").attribute(x, target=1)
    for target in ([0, 1, 1], torch.tensor([0.5, 1.0]), (1, 2, 3)):
        with pytest.raises(ValueError, match="target must be a class"):
            one.attribute(x, target=target)
    with pytest.raises(ValueError, match="must be attention_mask; got 2"):
        Attributor(model, names=["attention_mask"]).attribute(x, 1, (mask, mask))
    with pytest.raises(ValueError, match="integrated-gradients replaces token ids"):
        Attributor(model, "integrated-gradients").attribute(x, 1, mask)
    with pytest.raises(ValueError, match="method must be one of"):
        Attributor(model, "gradcam")
    assert isinstance(one.attribute((x,), 1, mask), tuple)
    graph = x.clone().requires_grad_()
    assert not one.attribute(graph, 1, mask).requires_grad
