"""The published classes' calls, on the published outputs."""

import numpy as np
import pytest
import torch
from chefer import chefer_golden, relative
from models import build

from pyglobenc.compat.chefer import LRP, Baselines, Generator

BERT = {
    "generate_LRP_last_layer": {},
    "generate_full_lrp": {},
    "generate_attn_last_layer": {},
    "generate_rollout": {},
    "generate_attn_gradcam": {},
}
VIT = {
    "transformer_attribution": dict(method="transformer_attribution"),
    "rollout": dict(method="rollout"),
    "full": dict(method="full"),
    "last_layer": dict(method="last_layer"),
    "last_layer_ablation": dict(method="last_layer", is_ablation=True),
    "last_layer_attn": dict(method="last_layer_attn"),
    "second_layer": dict(method="second_layer"),
    "second_layer_ablation": dict(method="second_layer", is_ablation=True),
}


def test_generator():
    model, cases = chefer_golden("chefer_bert")
    generator = Generator(model)
    for batch, target, _, published in cases:
        for start in (0, 1):
            out = generator.generate_LRP(**batch, index=target, start_layer=start)
            exact = published[f"generate_LRP_start{start}"]
            assert out.shape == exact.shape and relative(out, exact) <= 1e-9
        for name in BERT:
            out = getattr(generator, name)(**batch, index=target)
            assert out.shape == published[name].shape and relative(out, published[name]) <= 1e-9, name
        torch.testing.assert_close(generator.forward(**batch).logits, published["logits"], rtol=1e-9, atol=1e-9)


def test_generator_takes_what_argmax_returns():
    model, cases = chefer_golden("chefer_bert")
    batch, _, explained, _ = cases[0]
    generator = Generator(model)
    out = generator.generate_LRP(**batch, index=np.array([explained]), start_layer=0)
    assert torch.equal(out, generator.generate_LRP(**batch, index=explained, start_layer=0))
    with pytest.raises(ValueError, match=r"start_layer must lie in \[0, 3\)"):
        generator.generate_LRP(**batch)


def test_vit():
    model, cases = chefer_golden("chefer_vit")
    lrp = LRP(model)
    for batch, target, _, published in cases:
        images = batch["pixel_values"]
        for name, options in VIT.items():
            out = lrp.generate_LRP(images, index=target, **options)
            assert out.shape == published[name].shape and relative(out, published[name]) <= 1e-9, name
        out = lrp.generate_LRP(images, index=target, method="grad", start_layer=1)
        assert relative(out, published["transformer_attribution_start1"]) <= 1e-9
    with pytest.raises(ValueError, match="method must be one of transformer_attribution"):
        lrp.generate_LRP(images, method="lime")


def test_baselines():
    model, cases = chefer_golden("chefer_vit")
    images = cases[0][0]["pixel_values"]
    model.set_attn_implementation("eager")
    output = model(pixel_values=images, output_attentions=True)
    index = int(output.logits.argmax())
    grad = torch.autograd.grad(output.logits[0, index], output.attentions[-1], retain_graph=True)[0]
    cam = (output.attentions[-1][0, :, 0, 1:] * grad[0, :, 0, 1:].mean(1)[:, None]).mean(0).clamp(min=0)
    cam = ((cam - cam.min()) / (cam.max() - cam.min())).reshape(4, 4)
    out = Baselines(model).generate_cam_attn(images)
    # eager ViT attention computes its softmax in float32
    torch.testing.assert_close(out, cam.to(out.dtype), rtol=0, atol=1e-5)
    rolled = torch.eye(17, dtype=torch.float64)
    for attention in output.attentions[1:]:
        matrix = attention[0].mean(0) + torch.eye(17)
        rolled = matrix / matrix.sum(-1, keepdim=True) @ rolled
    out = Baselines(model).generate_rollout(images, start_layer=1)
    torch.testing.assert_close(out, rolled[:1, 1:].to(out.dtype), rtol=1e-5, atol=1e-7)


def test_several_images():
    model = build("vit")
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    together = LRP(model).generate_LRP(images, method="last_layer")
    assert together.shape == (2, 9)
    for image, row in zip(images, together, strict=True):
        torch.testing.assert_close(LRP(model).generate_LRP(image[None], method="last_layer"), row, rtol=1e-8, atol=1e-12)
    assert Baselines(model).generate_cam_attn(images).shape == (2, 3, 3)
