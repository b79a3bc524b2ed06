"""Models as users have them: compiled, with adapters, quantised, offloaded, wrapped."""

import copy
import importlib.util

import pytest
import torch
from devices import Devices
from models import build, random_batch
from sweeps import slow

from pyglobenc import GlobEnc, TransformerAttribution
from pyglobenc.hf.unwrap import stock_model
from pyglobenc.hf.weights import dense_weight

STRICT = dict(rtol=1e-9, atol=1e-12)


def library(name):
    """The library, or a skip; looked for first, since importing one that isn't there whole may fail in other
    ways.
    """
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    return pytest.importorskip(name)


def with_lora(name, **options):
    peft = library("peft")
    model = build(name)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config).double().eval()


ADAPTERS = {
    "lora": ("bert-classifier", dict(target_modules=["query", "value", "dense"])),
    "dora": ("bert-classifier", dict(target_modules=["query", "value", "dense"], use_dora=True)),
    "conv1d": ("gpt2", dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_equal_merged_weights(kind):
    name, options = ADAPTERS[kind]
    model = with_lora(name, **options)
    batch = random_batch(build(name), 2, 9, pads=[0, 3])
    merged = copy.deepcopy(model).merge_and_unload()
    globenc = GlobEnc(model)
    exact = GlobEnc(merged)(**batch).scores
    torch.testing.assert_close(globenc(**batch).scores, exact, **STRICT)
    with model.disable_adapter():
        torch.testing.assert_close(globenc(**batch).scores, GlobEnc(build(name))(**batch).scores, **STRICT)
    # what is kept of the weights follows the adapters
    torch.testing.assert_close(globenc(**batch).scores, exact, **STRICT)


def test_other_adapters_are_read_off():
    peft = library("peft")
    config = peft.IA3Config(
        target_modules=["key", "attention.output.dense"], feedforward_modules=[], init_ia3_weights=False
    )
    model = peft.get_peft_model(build("bert"), config).double().eval()
    batch = random_batch(build("bert"), 1, 9)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(GlobEnc(model)(**batch).scores, GlobEnc(merged)(**batch).scores, **STRICT)


def test_virtual_tokens_are_refused():
    peft = library("peft")
    model = peft.get_peft_model(
        build("bert-classifier"), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    ).eval()
    with pytest.raises(ValueError, match="adds virtual tokens outside the model"):
        GlobEnc(model)


@pytest.mark.parametrize("how", ["wrapped", slow("in place"), "layers"])
def test_compiled_models(how):
    model = build("bert-classifier")
    batch = random_batch(model, 2, 9, pads=[0, 3])
    exact = GlobEnc(model)(**batch).scores
    compiled = torch.compile(model, backend="eager") if how == "wrapped" else model
    for module in {"wrapped": [], "in place": [model], "layers": model.bert.encoder.layer}[how]:
        module.compile(backend="eager")
    with torch.no_grad():
        before = compiled(**batch).logits
        torch.testing.assert_close(GlobEnc(compiled)(**batch).scores, exact, rtol=0, atol=0)
        torch.testing.assert_close(compiled(**batch).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["bert-classifier", "dinov2", "gemma2"])
def test_offloaded_weights(name, where, tmp_path):
    accelerate = library("accelerate")
    model = build(name)
    batch = random_batch(model, 2, 9, pads=[0, 3])
    maps = ["N", "mix_N_Res", "head_N"]
    exact = GlobEnc(model)(**batch, maps=maps)
    folder = [tmp_path] if where == "disk" else []
    offloaded = getattr(accelerate, f"{where}_offload")(model, *folder, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in offloaded.parameters())
    globenc = GlobEnc(offloaded)
    for _ in range(2):
        result = globenc(**batch, maps=maps)
        torch.testing.assert_close(result.scores, exact.scores, rtol=0, atol=0)
        for kind in maps:
            torch.testing.assert_close(result.maps[kind], exact.maps[kind], rtol=0, atol=0)


def test_layers_on_devices_of_their_own():
    """As accelerate dispatches them."""
    accelerate = library("accelerate")
    model, plain = build("bert-classifier"), build("bert-classifier")
    batch = random_batch(plain, 2, 9, pads=[0, 3])
    places = {
        "bert.embeddings": "cpu:1",
        "bert.encoder.layer.0": "cpu:1",
        "bert.encoder.layer.1": "cpu:2",
        "bert.encoder.layer.2": "cpu:1",
    }
    places |= dict.fromkeys(("bert.pooler", "dropout", "classifier"), "cpu:2")
    with Devices().apart():
        places = {name: torch.device(place) for name, place in places.items()}
        accelerate.dispatch_model(model, places, main_device=torch.device("cpu:1"), force_hooks=True)
        assert len({parameter.device for parameter in model.parameters()}) == 2
        norms, relevance = GlobEnc(model)(**batch), TransformerAttribution(model)(**batch)
    torch.testing.assert_close(norms.scores, GlobEnc(plain)(**batch).scores, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        relevance.scores, TransformerAttribution(plain)(**batch).scores, rtol=1e-12, atol=1e-12
    )


def test_relevance_refuses_offloaded_weights():
    offloaded = library("accelerate").cpu_offload(build("bert-classifier"), execution_device="cpu")
    with pytest.raises(ValueError, match="don't offload its weights"):
        TransformerAttribution(offloaded)(**random_batch(build("bert-classifier"), 1, 5))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights(bits):
    bnb = library("bitsandbytes")
    sizes = dict(hidden_size=64, intermediate_size=64)
    model, exact = build("bert", torch.float32, **sizes), build("bert", torch.float32, **sizes)
    for layer, plain in zip(model.encoder.layer, exact.encoder.layer, strict=True):
        old = layer.attention.output.dense
        if bits == 8:
            new = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(
                old.weight.data.half(), requires_grad=False, has_fp16_weights=False
            )
        else:
            new = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        new.bias = torch.nn.Parameter(old.bias.data)
        layer.attention.output.dense = new.to("cpu").eval()
        before = dense_weight(layer.attention.output.dense)
        # rounded to a scale a row or a block, of which half a step is at most this
        assert (before - old.weight.T).abs().max() <= {8: 0.5 / 127, 4: 0.5 * 0.31}[
            bits
        ] * old.weight.abs().max() * 1.01
        layer.attention.output.dense(torch.randn(1, 64))
        weight = dense_weight(layer.attention.output.dense)
        # the 4-bit CPU kernel multiplies in bfloat16
        assert (weight - before).abs().max() <= torch.finfo(torch.bfloat16).eps * before.abs().max()
        plain.attention.output.dense.weight.data = weight.T.float()
    batch = random_batch(exact, 1, 9)
    # the first layer's inputs are the same; below, the library multiplies in half precision
    maps = [GlobEnc(m)(**batch, maps=["N", "head_N"]).maps for m in (model, exact)]
    for name in maps[0]:
        torch.testing.assert_close(maps[0][name][:, 0], maps[1][name][:, 0], rtol=1e-5, atol=1e-6)


def test_weights_of_another_type_are_read_off():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module = Doubled(5, 3).double()
    torch.testing.assert_close(dense_weight(module), 2 * module.weight.T)


def test_sentence_transformers():
    model = build("mpnet")

    class Transformer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.auto_model = model

    wrapped = torch.nn.Sequential(Transformer(), torch.nn.Identity()).eval()
    assert stock_model(wrapped) is model
    batch = random_batch(model, 1, 7)
    assert torch.equal(GlobEnc(wrapped)(**batch).scores, GlobEnc(model)(**batch).scores)


def test_sentence_transformers_own_class(tmp_path):
    library("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    from pyglobenc.models.pretrained import model_folder

    try:
        folder = model_folder("minilm")
    except ValueError as error:
        pytest.skip(str(error))
    model = SentenceTransformer(folder, device="cpu")
    assert type(stock_model(model)).__name__ == "BertModel"
