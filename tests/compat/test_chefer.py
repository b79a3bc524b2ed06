"""The published classes' calls, on the published outputs."""

import numpy as np
import pytest
import torch
from chefer import chefer_golden, relative
from models import build

from pyglobenc.compat import chefer as compat
from pyglobenc.compat.chefer import LRP, Baselines, Generator, VisionTransformer

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
    assert torch.equal(out, generator.generate_LRP(**batch, index=explained - model.config.num_labels, start_layer=0))
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


def test_bert_cells():
    model, cases = chefer_golden("chefer_bert")
    batch, _, predicted, published = cases[0]
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    explanations = Generator(model)
    expl = explanations.generate_LRP(input_ids=input_ids, attention_mask=attention_mask, start_layer=0)[0]
    expl = (expl - expl.min()) / (expl.max() - expl.min())
    output = torch.nn.functional.softmax(model(input_ids=input_ids, attention_mask=attention_mask)[0], dim=-1)
    assert output.argmax(dim=-1).item() == predicted
    expl *= -1
    exact = published["generate_LRP_start0"][0]
    exact = (exact.min() - exact) / (exact.max() - exact.min())
    np.testing.assert_allclose([expl[i].item() for i in range(len(input_ids.flatten()))], exact, rtol=0, atol=1e-8)


def vision_golden():
    stock, cases = chefer_golden("chefer_vit")
    model = VisionTransformer(stock.config).double().eval()
    model.load_state_dict(stock.state_dict())
    return model, cases


def test_vit_cells():
    """Logits of images given alone have the published LayerNorms' eps; maps become pictures as in the cells."""
    model, cases = vision_golden()
    attribution_generator = LRP(model)
    for batch, target, _, published in cases:
        original_image = batch["pixel_values"][0]
        predictions = model(original_image.unsqueeze(0))
        torch.testing.assert_close(predictions, published["logits"], rtol=1e-9, atol=1e-9)
        assert predictions.data.topk(5, dim=1)[1][0].tolist()[0] == int(published["logits"].argmax())
        images = original_image.unsqueeze(0).requires_grad_()
        index = None if target is None else torch.tensor([target])
        out = attribution_generator.generate_LRP(images, method="transformer_attribution", index=index).detach()
        out, exact = (
            torch.nn.functional.interpolate(t.reshape(1, 1, 4, 4), scale_factor=8, mode="bilinear").reshape(32, 32)
            for t in (out, published["transformer_attribution"].double())
        )
        out = ((out - out.min()) / (out.max() - out.min())).data.cpu().numpy()
        np.testing.assert_allclose(out, (exact - exact.min()) / (exact.max() - exact.min()), rtol=0, atol=1e-8)
        assert images.grad is None


def test_vit_saved_and_loaded(tmp_path):
    model, cases = vision_golden()
    images = cases[0][0]["pixel_values"]
    model.save_pretrained(tmp_path)
    loaded = VisionTransformer.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(images), cases[0][3]["logits"], rtol=1e-9, atol=1e-9)
    assert torch.equal(loaded(pixel_values=images).logits, loaded(images))


def test_published_vits(monkeypatch):
    with torch.device("meta"):
        models = [compat.vit_base_patch16_224(), compat.vit_large_patch16_224(), compat.deit_base_patch16_224()]
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [86_567_656, 304_326_632, 86_567_656]
    assert not any(model.training for model in models)
    monkeypatch.setattr(VisionTransformer, "from_pretrained", lambda name: name)
    names = [compat.vit_base_patch16_224(pretrained=True), compat.vit_large_patch16_224(pretrained=True)]
    assert names == ["google/vit-base-patch16-224", "google/vit-large-patch16-224"]
    assert compat.deit_base_patch16_224(pretrained=True) == "facebook/deit-base-patch16-224"
