"""CrossAttribution on models of usual sizes against their forward pass (random weights, float32, batch 1).

    pytest benchmarks/bench_cross_attribution.py --csv cross_attribution

n is the number of source tokens and of decoder tokens; CLIP has 50 image tokens, LXMERT 36 objects. `ratio`
is the call's time over the forward's, in turn in one process. On a CPU it is CPU time, which other work on
the machine changes less. `peak_mb` is the allocator's peak above the weights.
"""

import time

import pytest
import torch
import transformers
from measure import DEVICE, finished, paired_ratio
from op_benchmark import peak_mb

from pyglobenc import CrossAttribution

CLOCK = time.process_time if DEVICE.type == "cpu" else time.perf_counter
BART = dict(encoder_layers=6, decoder_layers=6, encoder_ffn_dim=3072, decoder_ffn_dim=3072, d_model=768)
BART |= dict(encoder_attention_heads=12, decoder_attention_heads=12)
T5 = dict(d_model=768, d_ff=3072, num_layers=12, num_heads=12)
MODELS = {
    "bart-base": ("BartForConditionalGeneration", "BartConfig", BART),
    "t5-base": ("T5ForConditionalGeneration", "T5Config", T5),
    "clip-base": ("CLIPModel", "CLIPConfig", {}),
    "lxmert": ("LxmertForQuestionAnswering", "LxmertConfig", {}),
}
CASES = [("bart-base", 128), ("bart-base", 512), ("t5-base", 512), ("clip-base", 20), ("lxmert", 20)]


@pytest.mark.parametrize("name, n", CASES)
def bench_cross_attribution(benchmark, name, n):
    torch.manual_seed(0)
    model_class, config_class, settings = MODELS[name]
    config = getattr(transformers, config_class)(**settings)
    model = getattr(transformers, model_class)(config).to(DEVICE).eval()
    ids = torch.randint(1000, 30000, (2, 1, n)).to(DEVICE)
    inputs = {"input_ids": ids[0]}
    if name == "clip-base":
        inputs["pixel_values"] = torch.randn(1, 3, 224, 224).to(DEVICE)
    elif name == "lxmert":
        inputs |= dict(visual_feats=torch.randn(1, 36, 2048), visual_pos=torch.rand(1, 36, 4))
    else:
        inputs["decoder_input_ids"] = ids[1]
    explain = CrossAttribution(model)
    plain = {"use_cache": False} if "decoder_input_ids" in inputs else {}
    call, forward = (
        finished(lambda: explain(**inputs)),
        finished(torch.no_grad()(lambda: model(**inputs, **plain))),
    )
    assert not call().nothing.any()
    ratio = paired_ratio(call, forward, 3, CLOCK)
    benchmark.extra_info.update(ratio, peak_mb=f"{peak_mb(call, DEVICE):.1f}")
    benchmark.pedantic(call, rounds=1, iterations=1)
