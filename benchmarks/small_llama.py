"""A small Llama with random weights for benchmarks, and a tokenizer whose words are its token ids."""

import torch
from measure import DEVICE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def small_llama(**sizes: int) -> LlamaForCausalLM:
    """Return 2 layers of a Llama with the sizes that its config takes."""
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=2, attn_implementation="sdpa", **sizes)
    return LlamaForCausalLM(config).to(DEVICE).eval()


def number_tokenizer(vocabulary: int, **special: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words are the numbers below `vocabulary`; special names further tokens."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="0", **special)
