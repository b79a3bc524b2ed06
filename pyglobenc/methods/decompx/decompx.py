"""DecompX (Modarressi et al., ACL 2023): what each input token gives to a logit, signed.

Each token's representation is the sum of decomposed vectors, one for each input token. They are propagated
through the whole model up to the logit, where each becomes one signed number. The rules are those of the
published code with its default options:

- Attention probabilities and the standard deviations of layer norms are held fixed.
- An activation f(z), in the MLP (GELU) or the head (tanh), becomes the line f(z) / z through the origin
  (FFN_approx_type="GeLU_ZO", tanh_approx_type="ZO").
- Decomposed vectors pass from layer to layer unmixed (aggregation="vector"), then through the pooler and the
  classifier (include_classifier_w_pooler).
- The first layer's values count with their bias, as values of their tokens; in all other layers the bias of
  the values is added to that of the attention's output.
- Every other bias is split among the input tokens as `bias` says.

The published code adds 1e-12 to its denominators. Here a quotient is 0 where the denominator is 0.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.common.arguments import known_arguments
from pyglobenc.common.autocast import outside_autocast
from pyglobenc.hf import find_layers
from pyglobenc.methods.arguments import model_inputs
from pyglobenc.methods.decompx.absdot import AbsDot
from pyglobenc.methods.decompx.layers import WHO, check_layers
from pyglobenc.methods.decompx.linear import LinearPass
from pyglobenc.methods.decompx.states import States, run_forward
from pyglobenc.methods.inputs import check_batch, check_model, require_finite
from pyglobenc.methods.precision.reliability import warn_of_precision
from pyglobenc.methods.target import Index

BIASES = ("absdot", "equal", "cls", "token", "none")
MEMORY = 1 << 30


@dataclass
class DecompXResult:
    """Signed attribution of one logit for each example.

    Attributes:
        scores: (B, n), what each token gives to the logit; padding gets 0.
        bias: (B,), what no token gets. The scores and this number add up to the logit. With bias="token" it
            is the score of the bias token. With "none" it is what the biases would add. Otherwise it is 0.
        target: (B,) int64, the class explained. For question answering, 0 is the start and 1 the end.
        logit: (B,), the value explained.
        error: (B,), by how much the sum of the scores and the bias misses the logit, relative to the sum of
            their absolute values. In exact arithmetic it would be 0.
        nothing: always None: the method never fails to find a score.
        output: the output of the model.
    """

    scores: Tensor
    bias: Tensor
    target: Tensor
    logit: Tensor
    error: Tensor
    nothing: None = None
    output: Any = None


class DecompX:
    """DecompX of a classifier with BERT's layer: BERT, RoBERTa, ELECTRA, DistilBERT, ALBERT and others.

    Args:
        model: a known architecture with a head, or a user's module with a head of its own around one, in
            evaluation mode. It is not changed. The head must be a chain of Linear modules and activations
            that reads one token, or the sum or mean of several.
        backend: accepted as by other methods. All of them run torch's own functions here.
        dtype: dtype of the arithmetic. None means float32, or float64 for a float64 model. With
            torch.float64 on a narrower model, the forward pass runs in float64 too.
        memory: bytes that decomposed vectors may take from one layer to the next, for bias="absdot". The
            vectors of source tokens that don't fit are computed again for each layer, which changes no score.

    Raises:
        TypeError, ValueError: an unknown architecture or backend, a layer that isn't built as BERT's, or a
            model in training mode.

    Source: Modarressi et al., 2023, and its published code.
    """

    @known_arguments
    def __init__(
        self,
        model: nn.Module,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        memory: int = MEMORY,
    ):
        self.model = check_model(WHO, model, backend, dtype)
        if not isinstance(memory, int) or isinstance(memory, bool) or memory < 0:
            raise ValueError(f"{WHO}: memory must be a number of bytes, 0 or more, got {memory!r}")
        check_layers(find_layers(self.model))
        self.dtype, self.memory = dtype, memory

    @outside_autocast
    def __call__(
        self,
        *,
        target: Any = None,
        contrast: Index = None,
        position: Index = None,
        bias: str = "absdot",
        **batch: Any,
    ) -> DecompXResult:
        """Attribute one logit of each example to its tokens.

        Args:
            target, contrast, position: the logit explained, as `TransformerAttribution` takes them.
            bias: how each bias b is split among the decomposed vectors t_ij that it is added to, where i is
                the token and j the source:

                - "absdot", the published default: in proportion to |<b, t_ij>|. It takes about 0.7 n times
                  the forward pass. All other splits take one pass down the model.
                - "equal": in equal parts, to all real tokens.
                - "cls": all of it goes to the first real token.
                - "token": all of it goes to a token of its own, whose score is `bias` of the result.
                - "none": the biases are left out.
            batch: the model's inputs, as its tokenizer returns them: input_ids and attention_mask (B, n).

        Returns:
            DecompXResult with scores (B, n). Each example gets the scores that it would get alone, without
            padding.

        Raises:
            TypeError, ValueError: bias is unknown, an index is out of range, the model can't take the input,
                the head isn't a chain of Linear modules and activations, a layer computed something else
                than BERT's layer, or a score isn't finite.
        """
        batch = model_inputs(WHO, self.model, batch, DecompX.__call__)
        if bias not in BIASES:
            raise ValueError(f"{WHO}: bias must be one of {', '.join(BIASES)}, got {bias!r}")
        check_batch(WHO, self.model, batch)
        states = run_forward(self.model, batch, (target, contrast, position), self.dtype)
        with torch.inference_mode(False), torch.no_grad():
            return self._result(states, bias)

    def _result(self, states: States, bias: str) -> DecompXResult:
        linear = LinearPass(states).run()
        require_finite(WHO, self.model, (linear.scores, states.target.logit))
        linear.check()
        real, scores, rest = states.real.to(linear.scores.device), linear.scores, linear.biases
        rest = rest.to(scores.device)
        if bias == "absdot":
            scores = torch.zeros_like(scores)
            for number in range(len(scores)):
                scores[number, real[number]] = AbsDot(states, number, self.memory).scores().to(scores)
        elif bias == "equal":
            scores = scores + (rest / real.sum(1))[:, None]
        elif bias == "cls":
            scores = scores.scatter_add(1, real.int().argmax(1, keepdim=True), rest[:, None])
        rest = rest if bias in ("token", "none") else torch.zeros_like(rest)
        scores = scores.masked_fill(~real, 0)
        require_finite(WHO, self.model, (scores, rest))
        size = scores.abs().sum(1) + rest.abs()
        error = (scores.sum(1) + rest - states.target.logit.to(scores)).abs() / size
        warn_of_precision(WHO, error, None, "by the sum of the scores", "use dtype=torch.float64")
        target = states.target
        return DecompXResult(scores, rest, target.index, target.logit, error, output=states.output)
