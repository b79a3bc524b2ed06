"""Small models of every architecture, and the published implementations' outputs."""

import json
from pathlib import Path

import torch
import transformers
from numerics import SEED
from safetensors.torch import load_file
from torch import nn

GOLDEN = Path(__file__).parents[1] / "golden"

SMALL = dict(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
    max_position_embeddings=40,
)
DISTILBERT = dict(vocab_size=97, dim=48, n_layers=3, n_heads=4, hidden_dim=80, max_position_embeddings=40)
DEBERTA = SMALL | dict(
    relative_attention=True, position_biased_input=False, norm_rel_ebd="layer_norm", pad_token_id=0
)
IMAGE = dict(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
    image_size=12,
    patch_size=4,
)
DECODER = SMALL | dict(num_key_value_heads=2, head_dim=12, pad_token_id=0)
ALTERNATING = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=4)
ARCHITECTURES = {
    "bert": ("BertConfig", "BertModel", SMALL),
    "bert-classifier": ("BertConfig", "BertForSequenceClassification", SMALL),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", SMALL),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaModel", SMALL),
    "camembert": ("CamembertConfig", "CamembertModel", SMALL),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", SMALL | dict(embedding_size=32)),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification", DISTILBERT),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification", SMALL | dict(embedding_size=32)),
    "albert-groups": (
        "AlbertConfig",
        "AlbertModel",
        SMALL | dict(embedding_size=32, num_hidden_groups=2, inner_group_num=2),
    ),
    "mpnet": ("MPNetConfig", "MPNetModel", SMALL),
    "nomic-bert": ("NomicBertConfig", "NomicBertForSequenceClassification", SMALL),
}
DEBERTAS = {
    "deberta-v2": ("DebertaV2Config", "DebertaV2Model", DEBERTA | dict(pos_att_type=["p2c", "c2p"])),
    "deberta-v3": (
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        DEBERTA | dict(pos_att_type=["p2c", "c2p"], position_buckets=4, share_att_key=True),
    ),
    "deberta-c2p": (
        "DebertaV2Config",
        "DebertaV2Model",
        DEBERTA | dict(pos_att_type=["c2p"], position_buckets=4),
    ),
}
ARCHITECTURES |= DEBERTAS
PRE_NORM = {
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForSequenceClassification",
        SMALL
        | dict(local_attention=6, global_attn_every_n_layers=2)
        | dict(pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2),
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(vocab_size=97, n_embd=48, n_layer=3, n_head=4, n_positions=40, pad_token_id=0),
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "mistral": ("MistralConfig", "MistralForCausalLM", DECODER | dict(sliding_window=5)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER | ALTERNATING | dict(use_sliding_window=True)),
    "qwen3": ("Qwen3Config", "Qwen3Model", DECODER),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        DECODER | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=2),
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", DECODER | dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "gemma": ("GemmaConfig", "GemmaModel", DECODER),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        DECODER | ALTERNATING | dict(query_pre_attn_scalar=12, attn_logit_softcapping=2.0),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        DECODER | ALTERNATING | dict(query_pre_attn_scalar=12),
    ),
    "gemma3-encoder": (
        "Gemma3TextConfig",
        "Gemma3TextModel",
        DECODER | ALTERNATING | dict(use_bidirectional_attention=True),
    ),
}
IMAGES = {
    "vit": ("ViTConfig", "ViTForImageClassification", IMAGE),
    "deit": ("DeiTConfig", "DeiTModel", IMAGE),
    "dinov2": ("Dinov2Config", "Dinov2Model", IMAGE | dict(mlp_ratio=2)),
    "dinov2-swiglu": ("Dinov2Config", "Dinov2Model", IMAGE | dict(mlp_ratio=2, use_swiglu_ffn=True)),
    "beit": ("BeitConfig", "BeitModel", IMAGE | dict(use_relative_position_bias=True)),
    "beit-shared": (
        "BeitConfig",
        "BeitModel",
        IMAGE | dict(use_shared_relative_position_bias=True, layer_scale_init_value=0.0),
    ),
}
# One model of each binding, without those that are built from the same modules.
EACH = (
    "bert-classifier distilbert albert albert-groups mpnet deberta-v3 modernbert gpt2 mistral gemma3 vit "
    "dinov2 beit"
).split()
# transformers has no sdpa attention for these models.
EAGER_ALONE = ("gemma2", "mpnet", *DEBERTAS)
OWN_SCORES = ("mpnet", *DEBERTAS)
CAUSAL = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "qwen3-moe", "phi3", "gemma", "gemma2", "gemma3")


def build(name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **changes):
    """Return a random model of an architecture, whose weights make attention peaked and LayerNorms matter."""
    config_class, model_class, settings = (ARCHITECTURES | PRE_NORM | IMAGES)[name]
    config = getattr(transformers, config_class)(**(settings | changes))
    config._attn_implementation = "eager" if name in EAGER_ALONE else attention
    # torch has no grouped product of float64 for a mixture of experts
    config._experts_implementation = "eager"
    model = getattr(transformers, model_class)(config)
    return randomize(model).to(dtype).eval()


def randomize(model, std: float = 0.12):
    """Fill every parameter with random numbers; LayerNorm weights lie around 1."""
    generator = torch.Generator().manual_seed(1 + SEED)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        parameter.data = noise + (1 if "norm" in name.lower() and name.endswith("weight") else 0)
    return model


def random_batch(
    model, batch: int, n: int, pads: list[int] | None = None, side: str = "right"
) -> dict[str, torch.Tensor]:
    """Return random token ids above the special ones, with pads[b] padding tokens at one end of example b."""
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": torch.randn(batch, 3, size, size, dtype=model.dtype)}
    ids = torch.randint(5, model.config.vocab_size, (batch, n))
    mask = torch.ones(batch, n, dtype=torch.long)
    for b, count in enumerate(pads or []):
        if count:
            mask[b, slice(n - count, n) if side == "right" else slice(0, count)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id), "attention_mask": mask}


def golden(name: str):
    """Return the model in float64 and the outputs of a published GlobEnc case."""
    settings = json.loads((GOLDEN / f"{name}.config.json").read_text())
    settings.pop("torch_dtype")
    kind = "Electra" if "electra" in name else "Bert"
    model = getattr(transformers, f"{kind}ForSequenceClassification")(
        getattr(transformers, f"{kind}Config")(**settings)
    )
    model.load_state_dict(load_file(GOLDEN / f"{name}.weights.safetensors"))
    return model.double().eval(), load_file(GOLDEN / f"{name}.outputs.safetensors")


class Classifier(nn.Module):
    """A user's module with a linear head that reads the last real token, the first one, or the mean."""

    def __init__(self, encoder: nn.Module, reads: str):
        super().__init__()
        self.encoder, self.reads = encoder, reads
        self.linear = nn.Linear(encoder.config.hidden_size, 3).to(encoder.dtype)

    def forward(self, **batch):
        h = self.encoder(**batch).last_hidden_state
        mask = batch.get("attention_mask")
        mask = torch.ones_like(h[..., 0]) if mask is None else mask.to(h.dtype)
        if self.reads == "mean":
            h = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            index = (mask * torch.arange(h.shape[1])).argmax(1) if self.reads == "last" else mask.argmax(1)
            h = h[torch.arange(len(h)), index]
        return self.linear(h)


def classifier(name: str, reads: str, dtype: torch.dtype = torch.float64) -> Classifier:
    model = build(name, dtype).base_model
    return Classifier(model, reads).eval()
