"""What the command line loads: heads, adapters, and code that comes with a model."""

import json
import shutil
import sys

import peft
import pytest
import torch
import transformers
from command_line import Input
from models import SMALL, randomize
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import classifier, minilm, tokenizer
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel

import pyglobenc
from pyglobenc.cli.main import main
from pyglobenc.models import checksums, pretrained
from pyglobenc.models.pretrained import load_pretrained

HEADS = (
    "TokenClassification QuestionAnswering MaskedLM MultipleChoice SequenceClassification "
    "NextSentencePrediction"
).split()


def saved(model, folder):
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def bert(head):
    return randomize(getattr(transformers, f"BertFor{head}")(BertConfig(**SMALL))).float().eval()


@pytest.mark.parametrize("head", HEADS)
def test_a_checkpoint_keeps_its_head(head, tmp_path, capsys):
    model = bert(head)
    folder = saved(model, tmp_path / "model")
    found, _ = load_pretrained(folder)
    assert type(found) is type(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.state_dict().items())
    # a rollout reads no head, and needs none
    out = str(tmp_path / "a.json")
    assert main(["explain", "deep good film", "--model", folder, "--json", out, "--quiet"]) == 0
    exact = pyglobenc.explain(model.base_model, tokenizer(), "deep good film", progress=False)
    torch.testing.assert_close(torch.tensor(pyglobenc.load(out).scores), torch.tensor(exact.scores))
    # a head without classes of the whole text is told from one with them
    status = main(["explain", "deep good film", "--model", folder, "--method", "lrp"])
    assert status == (head not in ("SequenceClassification", "NextSentencePrediction"))
    told = f"BertFor{head} has logits for every token or choice; TransformerAttribution explains them"
    assert not status or told in capsys.readouterr().err


def test_a_language_model_keeps_its_head(tmp_path):
    model = randomize(
        GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=40))
    ).eval()
    found, _ = load_pretrained(saved(model, tmp_path))
    ids = torch.randint(5, 97, (1, 7))
    assert torch.equal(found(ids).logits, model(ids).logits)


def adapted(base, folder, **settings):
    """A PEFT adapter of a base model, with random weights, in a folder of its own; the adapted model."""
    config = peft.LoraConfig(r=2, target_modules=["query", "value", "attention.output.dense"], **settings)
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = (
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2
            )
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "head, task, classes", [("SequenceClassification", "SEQ_CLS", 3), ("TokenClassification", "TOKEN_CLS", 4)]
)
def test_an_adapter_is_loaded_with_its_base_model(head, task, classes, tmp_path, capsys):
    base = bert(head).base_model
    saved(base, tmp_path / "base")
    start = getattr(transformers, f"BertFor{head}").from_pretrained(tmp_path / "base", num_labels=classes)
    model = adapted(start, tmp_path / "adapter", task_type=task)
    found, _ = load_pretrained(str(tmp_path / "adapter"))
    ids = torch.randint(5, 97, (1, 7))
    torch.testing.assert_close(found(ids).logits, model(ids).logits)
    assert main(["explain", "deep good film", "--model", str(tmp_path / "adapter")]) == 0
    # what its weights are not made for is not its base model
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "layer.1" not in name},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    capsys.readouterr()
    assert main(["explain", "a", "--model", str(tmp_path / "adapter")]) == 1
    assert "doesn't fit its base model" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "base")
    assert main(["explain", "a", "--model", str(tmp_path / "adapter")]) == 1
    err = capsys.readouterr().err
    assert "is a PEFT adapter, and its base model" in err and "no such folder" in err and err.count("\n") == 1


def test_an_adapter_without_a_head_of_its_own_needs_one_in_its_base_model(tmp_path, capsys):
    saved(bert("MaskedLM").base_model, tmp_path / "base")
    start = bert("SequenceClassification")
    adapted(start, tmp_path / "adapter", task_type="FEATURE_EXTRACTION")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps(config | {"task_type": "SEQ_CLS", "base_model_name_or_path": str(tmp_path / "base")})
    )
    assert main(["explain", "a", "--model", str(tmp_path / "adapter")]) == 1
    assert (
        "the checkpoint lacks bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias"
        in capsys.readouterr().err
    )


def test_an_adapter_without_peft_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["explain", "a", "--model", str(tmp_path)]) == 1
    assert "pip install peft" in capsys.readouterr().err


CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import {names}
class {name}({base}):
    pass
"""


def folder_with_code(folder, marker, known):
    """A model folder whose every part has code of its own, which leaves a file behind where it runs; known to
    transformers, or not.
    """
    saved(classifier(), folder)
    for file, name, base in (
        ("own_config", "OwnConfig", "BertConfig"),
        ("own_model", "OwnModel", "BertModel"),
    ):
        (folder / f"{file}.py").write_text(CODE.format(marker=str(marker), names=base, name=name, base=base))
    (folder / "own_tokenizer.py").write_text(
        CODE.format(marker=str(marker), names="BertTokenizer", name="OwnTokenizer", base="BertTokenizer")
    )
    models = {
        f"AutoModel{kind}": "own_model.OwnModel"
        for kind in ("", "ForSequenceClassification", "ForImageClassification")
    }
    config = json.loads((folder / "config.json").read_text()) | {
        "auto_map": {"AutoConfig": "own_config.OwnConfig"} | models
    }
    if not known:
        config |= {"model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "tokenizer_config.json"
    own = {
        "auto_map": {"AutoTokenizer": ["own_tokenizer.OwnTokenizer", None]},
        "tokenizer_class": "OwnTokenizer",
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {"auto_map": {"AutoImageProcessor": "own_model.OwnModel"}, "image_processor_type": "OwnProcessor"}
        )
    )


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("command", ["explain", "image", "attribute"])
def test_code_that_comes_with_a_model_never_runs_unasked(command, known, tmp_path, monkeypatch, capsys):
    marker, folder = tmp_path / "ran", tmp_path / "model"
    folder_with_code(folder, marker, known)
    (tmp_path / "texts.txt").write_text("a film\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    options = {
        "explain": ["explain", "a film"],
        "image": ["explain", "--image", str(tmp_path / "a.png")],
        "attribute": ["attribute", "--input", str(tmp_path / "texts.txt"), "--output", str(tmp_path / "out")],
    }[command]
    monkeypatch.setattr(sys, "stdin", Input(b"y\n" * 9))
    status = main([*options, "--model", str(folder)])
    assert not marker.exists()
    # a model that transformers knows is loaded by its own code, if the rest can be
    assert status in ((0, 1) if known else (1,)) and "Traceback" not in capsys.readouterr().err


def test_code_that_comes_with_a_model_runs_when_trusted(tmp_path, monkeypatch):
    marker, folder = tmp_path / "ran", tmp_path / "model"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder_with_code(folder, marker, known=False)
    main(["explain", "a film", "--model", str(folder), "--trust-remote-code"])
    assert marker.exists()


def test_demonstration_models_are_those_that_were_published(tmp_path, monkeypatch, capsys):
    minilm()
    folder = tmp_path / "model"
    shutil.copytree(pretrained.model_folder("minilm"), folder)
    monkeypatch.setattr(pretrained, "model_folder", lambda name: str(folder))
    checksums.check_minilm(folder)
    for name in ("vocab.txt", "model.safetensors"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        for model in ("minilm", "minilm-sst2"):
            assert main(["explain", "a", "--model", model]) == 1
            err = capsys.readouterr().err
            assert (
                f"{name}: not the file that was published" in err
                and "pip install" in err
                and err.count("\n") == 1
            )
        (folder / name).write_bytes(data)
    monkeypatch.setattr(checksums, "HEAD", tmp_path / "head.safetensors")
    (tmp_path / "head.safetensors").write_bytes(b"")
    assert main(["explain", "a", "--model", "minilm-sst2"]) == 1
    assert "head.safetensors: not the file that was published" in capsys.readouterr().err
