"""Small models of every architecture, and the published implementations' outputs."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"

SMALL = dict(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
    max_position_embeddings=40,
)
DISTILBERT = dict(vocab_size=97, dim=48, n_layers=3, n_heads=4, hidden_dim=80, max_position_embeddings=40)
ARCHITECTURES = {
    "bert": ("BertConfig", "BertModel", SMALL),
    "bert-classifier": ("BertConfig", "BertForSequenceClassification", SMALL),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", SMALL),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel", SMALL),
    "camembert": ("CamembertConfig", "CamembertModel", SMALL),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", SMALL | dict(embedding_size=32)),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification", DISTILBERT),
}


def build(name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **changes):
    """Random model of an architecture, weights large enough that attention is peaked and the LayerNorms matter."""
    config_class, model_class, settings = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**(settings | changes))
    config._attn_implementation = attention
    model = getattr(transformers, model_class)(config)
    return randomize(model).to(dtype).eval()


def randomize(model, std: float = 0.12):
    """Fill every parameter anew; LayerNorm weights around 1."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        parameter.data = noise + (1 if "norm" in name.lower() and name.endswith("weight") else 0)
    return model


def random_batch(model, batch: int, n: int, pads: list[int] | None = None, side: str = "right") -> dict[str, torch.Tensor]:
    """Random token ids above the special ones; pads[b] padding tokens in example b, on one side."""
    ids = torch.randint(5, model.config.vocab_size, (batch, n))
    mask = torch.ones(batch, n, dtype=torch.long)
    for b, count in enumerate(pads or []):
        if count:
            mask[b, slice(n - count, n) if side == "right" else slice(0, count)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id), "attention_mask": mask}


def golden(name: str):
    """Model in float64 and outputs of a published GlobEnc case."""
    settings = json.loads((GOLDEN / f"{name}.config.json").read_text())
    settings.pop("torch_dtype")
    kind = "Electra" if "electra" in name else "Bert"
    model = getattr(transformers, f"{kind}ForSequenceClassification")(getattr(transformers, f"{kind}Config")(**settings))
    model.load_state_dict(load_file(GOLDEN / f"{name}.weights.safetensors"))
    return model.double().eval(), load_file(GOLDEN / f"{name}.outputs.safetensors")
