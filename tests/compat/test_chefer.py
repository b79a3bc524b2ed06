"""The published classes' calls, on the published outputs."""

import numpy as np
import pytest
import torch
from chefer import chefer_golden, relative
from models import GOLDEN, build
from safetensors.torch import load_file

from pyglobenc.compat import chefer as compat
from pyglobenc.compat.chefer import LRP, Baselines, Generator, VisionTransformer
from pyglobenc.hf import find_layers
from pyglobenc.hf.architectures.vit import patch_projection

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
        torch.testing.assert_close(
            generator.forward(**batch).logits, published["logits"], rtol=1e-9, atol=1e-9
        )


def test_generator_takes_what_argmax_returns():
    model, cases = chefer_golden("chefer_bert")
    batch, _, explained, _ = cases[0]
    generator = Generator(model)
    out = generator.generate_LRP(**batch, index=np.array([explained]), start_layer=0)
    assert torch.equal(out, generator.generate_LRP(**batch, index=explained, start_layer=0))
    assert torch.equal(
        out, generator.generate_LRP(**batch, index=explained - model.config.num_labels, start_layer=0)
    )
    with pytest.raises(TypeError, match="target must be integers"):
        generator.generate_LRP(**batch, index=1.0, start_layer=0)
    with pytest.raises(ValueError, match="one integer or one for each of 1 examples"):
        generator.generate_LRP(**batch, index=[0, 1], start_layer=0)
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


def published_baselines(model, index):
    """What the published code's other models give on a case: outputs by name."""
    start = f"{model}.case{index}."
    outputs = load_file(GOLDEN / "chefer_baselines.outputs.safetensors")
    return {name.removeprefix(start): value for name, value in outputs.items() if name.startswith(start)}


def rebuilt(cls, stock):
    """A stock model's weights in a class of the drop-in module."""
    model = cls(stock.config).double().eval()
    model.load_state_dict(stock.state_dict())
    return model


def same(out, exact):
    return out.shape == exact.shape and relative(out.detach(), exact) <= 1e-9


def test_baselines():
    stock, cases = chefer_golden("chefer_vit")
    model = rebuilt(compat.BaselineVisionTransformer, stock)
    baselines = Baselines(model)
    for index, (batch, target, *_) in enumerate(cases):
        images, published = batch["pixel_values"], published_baselines("new_vit", index)
        assert same(model(images), published["logits"])
        assert same(baselines.generate_cam_attn(images, index=target), published["cam_attn"])
        assert same(baselines.generate_rollout(images, start_layer=1), published["rollout_start1"])


def test_lrp_baseline_of_bert():
    stock, cases = chefer_golden("chefer_bert")
    generator = Generator(rebuilt(compat.BertForClsOrigLrp, stock))
    for index, (batch, target, _, ours) in enumerate(cases):
        published = published_baselines("orig_bert", index)
        assert same(generator.generate_LRP(**batch, index=target, start_layer=0), published["generate_LRP"])
        for name in ("generate_LRP_last_layer", "generate_full_lrp"):
            assert same(getattr(generator, name)(**batch, index=target), published[name]), name
        for name in ("generate_attn_last_layer", "generate_rollout", "generate_attn_gradcam"):
            assert same(getattr(generator, name)(**batch, index=target), ours[name]), name


def test_lrp_baseline_of_vit():
    stock, cases = chefer_golden("chefer_vit")
    lrp = LRP(rebuilt(compat.OrigVisionTransformer, stock))
    for index, (batch, target, *_) in enumerate(cases):
        for method, exact in published_baselines("orig_vit", index).items():
            assert same(lrp.generate_LRP(batch["pixel_values"], index=target, method=method), exact), method


def test_several_images():
    model = build("vit")
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    together = LRP(model).generate_LRP(images, method="last_layer")
    assert together.shape == (2, 9)
    for image, row in zip(images, together, strict=True):
        torch.testing.assert_close(
            LRP(model).generate_LRP(image[None], method="last_layer"), row, rtol=1e-8, atol=1e-12
        )
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
    np.testing.assert_allclose(
        [expl[i].item() for i in range(len(input_ids.flatten()))], exact, rtol=0, atol=1e-8
    )


def vision_golden():
    stock, cases = chefer_golden("chefer_vit")
    return rebuilt(VisionTransformer, stock), cases


def test_vit_cells():
    """Logits of images given alone have the published LayerNorms' eps; maps become pictures as in the
    cells.
    """
    model, cases = vision_golden()
    attribution_generator = LRP(model)
    for batch, target, _, published in cases:
        original_image = batch["pixel_values"][0]
        predictions = model(original_image.unsqueeze(0))
        torch.testing.assert_close(predictions, published["logits"], rtol=1e-9, atol=1e-9)
        assert predictions.data.topk(5, dim=1)[1][0].tolist()[0] == int(published["logits"].argmax())
        images = original_image.unsqueeze(0).requires_grad_()
        index = None if target is None else torch.tensor([target])
        out = attribution_generator.generate_LRP(
            images, method="transformer_attribution", index=index
        ).detach()
        out, exact = (
            torch.nn.functional.interpolate(t.reshape(1, 1, 4, 4), scale_factor=8, mode="bilinear").reshape(
                32, 32
            )
            for t in (out, published["transformer_attribution"].double())
        )
        out = ((out - out.min()) / (out.max() - out.min())).data.cpu().numpy()
        np.testing.assert_allclose(
            out, (exact - exact.min()) / (exact.max() - exact.min()), rtol=0, atol=1e-8
        )
        assert images.grad is None


def test_vit_saved_and_loaded(tmp_path):
    model, cases = vision_golden()
    images = cases[0][0]["pixel_values"]
    model.save_pretrained(tmp_path)
    loaded = VisionTransformer.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(images), cases[0][3]["logits"], rtol=1e-9, atol=1e-9)
    assert torch.equal(loaded(pixel_values=images).logits, loaded(images))


def test_published_vits(monkeypatch):
    base, large, deit, new, orig = (
        compat.vit_base_patch16_224,
        compat.vit_large_patch16_224,
        compat.deit_base_patch16_224,
        compat.vit_new_base_patch16_224,
        compat.vit_orig_base_patch16_224,
    )
    with torch.device("meta"):
        models = [build() for build in (base, large, deit, new, orig)]
        assert base(num_classes=3).classifier.out_features == 3
    assert [sum(p.numel() for p in model.parameters()) for model in models[:3]] == [
        86_567_656,
        304_326_632,
        86_567_656,
    ]
    assert [model.vit.layernorm.eps for model in models] == [1e-5, 1e-5, 1e-5, 1e-6, 1e-5]
    assert not any(model.training for model in models)
    monkeypatch.setattr(
        VisionTransformer,
        "from_pretrained",
        classmethod(lambda cls, name, **options: (cls, name, options["num_labels"])),
    )
    assert base(pretrained=True) == (VisionTransformer, "google/vit-base-patch16-224", 1000)
    assert large(pretrained=True) == (VisionTransformer, "google/vit-large-patch16-224", 1000)
    assert deit(pretrained=True, num_classes=3) == (VisionTransformer, "facebook/deit-base-patch16-224", 3)
    assert new(pretrained=True) == (compat.BaselineVisionTransformer, "google/vit-base-patch16-224", 1000)
    assert orig(pretrained=True) == (compat.OrigVisionTransformer, "google/vit-base-patch16-224", 1000)


def test_weights_under_published_names():
    model, cases = vision_golden()
    names = {
        "patch_embed.proj": patch_projection(model.vit),
        "norm": model.vit.layernorm,
        "head": model.classifier,
    }
    published = {
        "cls_token": model.vit.embeddings.cls_token,
        "pos_embed": model.vit.embeddings.position_embeddings,
    }
    for index, m in enumerate(find_layers(model)):
        block = {
            "norm1": m.attention_norm,
            "attn.proj": m.output,
            "norm2": m.output_norm,
            "mlp.fc1": m.intermediate,
            "mlp.fc2": m.mlp_output,
        }
        names |= {f"blocks.{index}.{name}": module for name, module in block.items()}
        for kind in ("weight", "bias"):
            published[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat(
                [getattr(part, kind) for part in (m.query, m.key, m.value)]
            )
    published |= {
        f"{name}.{kind}": getattr(module, kind)
        for name, module in names.items()
        for kind in ("weight", "bias")
    }
    loaded = VisionTransformer(model.config).double().eval()
    loaded.load_state_dict(published)
    assert same(loaded(cases[0][0]["pixel_values"]), cases[0][3]["logits"])
    with pytest.raises(RuntimeError, match="pre_logits"):
        loaded.load_state_dict(published | {"pre_logits.fc.weight": torch.ones(1)})
    with pytest.raises(RuntimeError, match="Missing key.*classifier.bias"):
        loaded.load_state_dict({name: value for name, value in published.items() if name != "head.bias"})


def test_another_head(tmp_path):
    """As published, weights of another number of classes leave the head random."""
    model, cases = vision_golden()
    model.save_pretrained(tmp_path)
    loaded = VisionTransformer.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert loaded(cases[0][0]["pixel_values"]).shape == (1, 3)
    assert torch.equal(loaded.vit.embeddings.cls_token, model.vit.embeddings.cls_token)
