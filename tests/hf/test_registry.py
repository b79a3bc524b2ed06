"""Models that can't be attributed: every method refuses them, and the error gives the reason."""

import pytest
import torch
import transformers
from models import SMALL

from pyglobenc import GlobEnc, TransformerAttribution, capture
from pyglobenc.methods.rollout.baselines import Rollout

T5 = dict(vocab_size=97, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
BART = dict(vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=40)
BART |= dict(encoder_attention_heads=4, decoder_attention_heads=4, decoder_ffn_dim=40)
VISION = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
VISION |= dict(image_size=12, patch_size=4)
TEXT, TINY = SMALL | dict(pad_token_id=0), dict(vocab_size=97, hidden_size=32, num_hidden_layers=2)
REFORMER = dict(vocab_size=97, hidden_size=32, num_attention_heads=2, attention_head_size=16)
REFORMER |= dict(feed_forward_size=40, axial_pos_embds=False, attn_layers=["local"])
ENCODER_DECODER, UNKNOWN = "belongs to an encoder-decoder", "unknown architecture"
# class of the model, class of its config, settings, reason
UNSUPPORTED = [
    ("T5EncoderModel", "T5Config", T5, UNKNOWN),
    ("T5Model", "T5Config", T5, ENCODER_DECODER),
    ("UMT5EncoderModel", "UMT5Config", T5, ENCODER_DECODER),
    ("BartForSequenceClassification", "BartConfig", BART, ENCODER_DECODER),
    ("CLIPTextModel", "CLIPTextConfig", TEXT, UNKNOWN),
    ("CLIPVisionModel", "CLIPVisionConfig", VISION, UNKNOWN),
    ("MambaModel", "MambaConfig", TINY | dict(state_size=4), UNKNOWN),
    ("LongformerModel", "LongformerConfig", TEXT | dict(attention_window=4), UNKNOWN),
    ("BigBirdModel", "BigBirdConfig", TEXT | dict(block_size=4), UNKNOWN),
    ("ReformerModel", "ReformerConfig", REFORMER, UNKNOWN),
    ("DebertaModel", "DebertaConfig", TEXT, "computes attention itself"),
    ("FNetModel", "FNetConfig", TINY | dict(intermediate_size=40, max_position_embeddings=40), UNKNOWN),
    ("XLNetModel", "XLNetConfig", dict(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=40), UNKNOWN),
    ("GPTNeoXModel", "GPTNeoXConfig", TEXT, UNKNOWN),
    ("BloomModel", "BloomConfig", dict(vocab_size=97, hidden_size=32, n_layer=2, n_head=4), UNKNOWN),
    ("MegatronBertModel", "MegatronBertConfig", TEXT, UNKNOWN),
    ("RoFormerModel", "RoFormerConfig", TEXT, UNKNOWN),
    ("LukeModel", "LukeConfig", TEXT | dict(entity_vocab_size=9, entity_emb_size=16), UNKNOWN),
    ("ViTMAEModel", "ViTMAEConfig", VISION, UNKNOWN),
    ("ResNetModel", "ResNetConfig", dict(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]), UNKNOWN),
]


class OtherModules(transformers.BertPreTrainedModel):
    """A user's class with BERT's config, and layers that are not BERT's."""

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.layer = torch.nn.TransformerEncoderLayer(config.hidden_size, 4, batch_first=True)

    def forward(self, input_ids, attention_mask=None):
        return self.layer(self.embed(input_ids))


def refused(model, reason):
    batch = (
        {"input_ids": torch.randint(5, 97, (1, 8)), "attention_mask": torch.ones(1, 8, dtype=torch.long)}
        if model.main_input_name == "input_ids"
        else {"pixel_values": torch.randn(1, 3, 12, 12)}
    )
    for method in (GlobEnc, Rollout, TransformerAttribution):
        with pytest.raises(ValueError, match=f"capture: .*{type(model).__name__}.*") as error:
            method(model)(**batch)
        assert reason in str(error.value)
    with pytest.raises(ValueError, match=reason), capture(model):
        model(**batch)


@pytest.mark.parametrize(
    "model, config, settings, reason", UNSUPPORTED, ids=[name for name, *_ in UNSUPPORTED]
)
def test_unsupported_models_are_refused_with_the_reason(model, config, settings, reason):
    refused(getattr(transformers, model)(getattr(transformers, config)(**settings)).eval(), reason)


def test_a_known_name_with_other_modules():
    refused(OtherModules(transformers.BertConfig(**SMALL)).eval(), "has not the modules of the architecture")
