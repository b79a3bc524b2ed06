"""Small models of two streams, and the rules of Chefer, Gur and Wolf (ICCV 2021) on stored matrices."""

import torch
import transformers
from models import IMAGE, SMALL, randomize
from torch import Tensor

IDS = dict(vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)
BART = IDS | dict(
    d_model=48,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=80,
    decoder_ffn_dim=80,
    max_position_embeddings=40,
)
T5 = IDS | dict(
    d_model=48, d_kv=12, d_ff=80, num_layers=2, num_decoder_layers=3, num_heads=4, decoder_start_token_id=0
)
GENERATORS = {
    "bart": ("BartConfig", "BartForConditionalGeneration", BART),
    "marian": ("MarianConfig", "MarianMTModel", BART),
    "blenderbot-small": ("BlenderbotSmallConfig", "BlenderbotSmallForConditionalGeneration", BART),
    "plbart": ("PLBartConfig", "PLBartForConditionalGeneration", BART),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", BART),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", BART),
    "blenderbot": ("BlenderbotConfig", "BlenderbotForConditionalGeneration", BART),
    "m2m_100": ("M2M100Config", "M2M100ForConditionalGeneration", BART),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "flan-t5": ("T5Config", "T5ForConditionalGeneration", T5 | dict(feed_forward_proj="gated-gelu")),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration", T5),
    "umt5": ("UMT5Config", "UMT5ForConditionalGeneration", T5),
}
CLASSIFIERS = {
    "bart-classifier": ("BartConfig", "BartForSequenceClassification", BART | dict(num_labels=3)),
    "mbart-classifier": ("MBartConfig", "MBartForSequenceClassification", BART | dict(num_labels=3)),
    "t5-classifier": ("T5Config", "T5ForSequenceClassification", T5 | dict(num_labels=3)),
}
# An encoder and a decoder of other architectures.
PAIRS = {
    "vit-gpt2": (
        ("ViTConfig", IMAGE),
        ("GPT2Config", dict(vocab_size=97, n_embd=48, n_layer=3, n_head=4, n_positions=40)),
    ),
    "deit-bert": (("DeiTConfig", IMAGE), ("BertConfig", SMALL)),
    "dinov2-roberta": (("Dinov2Config", IMAGE | dict(mlp_ratio=2)), ("RobertaConfig", SMALL)),
    "vit-mbart": (("ViTConfig", IMAGE), ("MBartConfig", BART)),
    "beit-bart": (("BeitConfig", IMAGE | dict(use_relative_position_bias=True)), ("BartConfig", BART)),
    "bert-bert": (("BertConfig", SMALL), ("BertConfig", SMALL)),
}
ALL = [*GENERATORS, *CLASSIFIERS, *PAIRS]
PATCHES = 10


def build(name: str, dtype: torch.dtype = torch.float64, **changes):
    """Return a random encoder-decoder, whose weights make attention peaked."""
    if name in PAIRS:
        (encoder, first), (decoder, second) = PAIRS[name]
        encoder, decoder = (
            getattr(transformers, kind)(**of) for kind, of in ((encoder, first), (decoder, second))
        )
        kind = "VisionEncoderDecoder" if "image_size" in first else "EncoderDecoder"
        config = getattr(transformers, f"{kind}Config").from_encoder_decoder_configs(encoder, decoder)
        config.decoder_start_token_id, config.pad_token_id = 1, 0
        model = getattr(transformers, f"{kind}Model")(config=config)
    else:
        config_class, model_class, settings = (GENERATORS | CLASSIFIERS)[name]
        config = getattr(transformers, config_class)(**settings | changes)
        model = getattr(transformers, model_class)(config)
    return randomize(model).to(dtype).eval()


def clip(dtype: torch.dtype = torch.float64):
    """Return a random CLIP."""
    text = dict(SMALL, projection_dim=24, eos_token_id=96, bos_token_id=1, pad_token_id=0)
    config = transformers.CLIPConfig(
        text_config=text, vision_config=IMAGE | dict(projection_dim=24), projection_dim=24
    )
    return randomize(transformers.CLIPModel(config)).to(dtype).eval()


def lxmert(dtype: torch.dtype = torch.float64, x_layers: int = 3):
    """Return a random LXMERT for question answering, whose image features have 7 numbers."""
    layers = dict(l_layers=2, r_layers=2, x_layers=x_layers, visual_feat_dim=7, num_qa_labels=5)
    sizes = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "num_attention_heads")}
    config = transformers.LxmertConfig(**sizes, intermediate_size=80, max_position_embeddings=40, **layers)
    return randomize(transformers.LxmertForQuestionAnswering(config)).to(dtype).eval()


def objects(model, size: int, m: int = 5) -> dict[str, Tensor]:
    """Return an image's features, their boxes, and a mask in which the second image has m - 2 objects."""
    mask = torch.ones(size, m, dtype=torch.long)
    mask[1:2, m - 2 :] = 0
    of = dict(visual_feats=torch.randn(size, m, 7), visual_pos=torch.rand(size, m, 4))
    return {name: t.to(model.dtype) for name, t in of.items()} | {"visual_attention_mask": mask}


def sources(model, size: int, m: int = 9, pads=(0, 3, 5)) -> dict[str, Tensor]:
    """Return the inputs of an encoder: random texts, with pads[b] padding tokens at the right, or images."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(size, 3, 12, 12, dtype=model.dtype)}
    mask = torch.ones(size, m, dtype=torch.long)
    for row, count in enumerate(pads[:size]):
        mask[row, m - count :] = 0
    ids = torch.randint(5, 97, (size, m))
    for row, end in enumerate(mask.sum(1).tolist()):
        ids[row, end - 1] = 2
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def targets(size: int, n: int = 6, pads=(2, 0, 1)) -> dict[str, Tensor]:
    """Return the inputs of a decoder, with padding at the right."""
    mask = torch.ones(size, n, dtype=torch.long)
    for row, count in enumerate(pads[:size]):
        mask[row, n - count :] = 0
    ids = torch.randint(5, 97, (size, n))
    ids[:, 0] = 2
    return {"decoder_input_ids": ids.masked_fill(mask == 0, 0), "decoder_attention_mask": mask}


def maps(value: Tensor, probabilities) -> list[Tensor]:
    """Return each layer's mean over heads of (alpha * grad_alpha)+, eq. 5, (B, n, m)."""
    gradients = torch.autograd.grad(value.sum(), probabilities)
    return [
        (alpha * gradient).clamp(min=0).mean(1).detach()
        for alpha, gradient in zip(probabilities, gradients, strict=True)
    ]


def normalized(r: Tensor) -> Tensor:
    """Eq. 8 and 9; where a row of R - I is 0 it stays 0."""
    change = r - torch.eye(r.shape[-1], dtype=r.dtype)
    return (change / change.sum(-1, keepdim=True)).nan_to_num(0) + torch.eye(r.shape[-1], dtype=r.dtype)


def encoder_decoder(encoder: list[Tensor], own: list[Tensor], cross: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return R_tt and R_ts, (B, n, n) and (B, n, m), by eq. 6, 7, 10 and 11 in the order of the layers."""
    (size, n, m), dtype = cross[0].shape, cross[0].dtype
    r_ss, r_tt = (torch.eye(k, dtype=dtype).expand(size, k, k) for k in (m, n))
    r_ts, r_st = torch.zeros(size, n, m, dtype=dtype), torch.zeros(size, m, n, dtype=dtype)
    for a in encoder:
        r_ss, r_st = r_ss + a @ r_ss, r_st + a @ r_st
    for a, c in zip(own, cross, strict=True):
        r_tt, r_ts = r_tt + a @ r_tt, r_ts + a @ r_ts
        r_ts = r_ts + normalized(r_tt).mT @ c @ normalized(r_ss)
        r_tt = r_tt + c @ r_st
    return r_tt, r_ts


def co_attention(
    alone: list[list[Tensor]], layers: list[tuple[list[Tensor], list[Tensor]]]
) -> list[list[Tensor]]:
    """Return R_st of streams s and t, by the equations in the order of the published code.

    Args:
        alone: the maps of each stream's first layers.
        layers: for each later layer the two cross maps, and then the two own maps.
    """
    r = [
        [torch.zeros(one[0].shape[0], one[0].shape[1], two[0].shape[1]).double() for two in alone]
        for one in alone
    ]
    for s in (0, 1):
        size, n, _ = alone[s][0].shape
        r[s][s] = torch.eye(n, dtype=torch.float64).expand(size, n, n)
        for a in alone[s]:
            r[s][s] = r[s][s] + a @ r[s][s]
    for cross, own in layers:
        old = [list(row) for row in r]
        for s, o in ((0, 1), (1, 0)):
            r[s][o] = old[s][o] + normalized(old[s][s]).mT @ cross[s] @ normalized(old[o][o])
            r[s][s] = old[s][s] + cross[s] @ old[o][s]
        for s in (0, 1):
            r[s] = [one + own[s] @ one for one in r[s]]
    return r
