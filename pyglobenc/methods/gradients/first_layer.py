"""One pass through a model whose autograd graph starts at the first layer's input.

This input is the sum of the embeddings, after their norm if they have one; transformers calls it
hidden_states[0].
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.common.autocast import callers_autocast
from pyglobenc.hf import find_layers
from pyglobenc.hf.limits import weights_named
from pyglobenc.hf.registry import is_decoder
from pyglobenc.hf.trace.threads import in_this_thread
from pyglobenc.hf.unwrap import stock_model
from pyglobenc.methods.arguments import run_model
from pyglobenc.methods.gradients.modified_backward import ModifiedBackward
from pyglobenc.methods.head import detached, find_logits
from pyglobenc.methods.precision.float64_forward import WideParameters
from pyglobenc.methods.target import Target, find_target, kept_positions, next_token_position

# Takes the first layer's input and the gradient of a logit with respect to it, both (B, n, d), and returns a
# score for each token, (B, n).
Reduction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pass:
    """Tensors of one pass, without a graph.

    Attributes:
        x: input of the first layer, (B, n, d).
        scores: what the reduction returned, (B, n); (B, T, n) for T logits of each example; None without a
            reduction.
        target: the explained logit of each example, (B,) or (B, T), with its class.
        output: the output of the model.
    """

    x: Tensor
    scores: Tensor | None
    target: Target
    output: Any


class FirstLayer:
    """Runs one model, with or without the gradient of the logit that is explained.

    It is called outside inference mode, whose tensors can't be part of a graph. Parameters keep their flags
    and get no gradient: only the gradient of the first layer's input is computed.

    Args:
        who: name of the method for errors.
        model: the module that `called_module` returned.
        dtype: torch.float64 runs the forward pass of a narrower model in float64.
        rules: a name in `RULES`, whose rules the gradients then follow; None for true gradients.
    """

    def __init__(self, who: str, model: nn.Module, dtype: torch.dtype | None, rules: str | None = None):
        self.who, self.model, self.dtype, self.rules = who, model, dtype, rules
        self.stock = stock_model(model)

    def run(
        self,
        batch: Mapping[str, Any],
        explained: tuple[Any, Any, Any] = (None, None, None),
        *,
        reduction: Reduction | None = None,
        values: Tensor | None = None,
        replaced: tuple[Tensor, int] | None = None,
    ) -> Pass:
        """Run the model once.

        Args:
            batch: the model's checked inputs, such as input_ids (B, n).
            explained: target, contrast and position, as `TransformerAttribution` takes them. If a language
                model's position is None, the logits of the token after the last real one are explained. A
                position (B, T) explains T logits of each example, each by a backward pass of its own through
                the same graph.
            reduction: turns a gradient into scores; None computes no gradient. Only one gradient exists at a
                time.
            values: (B, n, d), written over the first layer's input; None leaves it.
            replaced: a (B, n) bool tensor and a token id; the tokens where it is True get this id's
                embedding.

        Raises:
            ValueError: the model has no logits, or they can't be followed back to the first layer's input;
                or its forward pass can't run in float64; or one of its operations has no rule.
        """
        with weights_named(self.model), ExitStack() as stack:
            tape = None
            if reduction is not None and self.rules is not None:
                tape = ModifiedBackward(self.who, self.rules)
                stack.enter_context(tape.active(self.model))
            inputs = stack.enter_context(self._graph(reduction is not None, values, tape))
            if replaced is not None:
                stack.enter_context(self._replaced(*replaced))
            narrow = self.dtype == torch.float64 and self.stock.dtype != torch.float64
            if narrow:
                stack.enter_context(WideParameters(torch.float64))
            stack.enter_context(callers_autocast())
            try:
                output = run_model(self.model, batch)
            except RuntimeError as error:
                if not narrow or "dtype" not in str(error):
                    raise
                self._refuse_float64()
            if len(inputs) != 1:
                raise ValueError(f"{self.who}: {type(self.model).__name__} never ran its first layer")
            target = self._target(batch, output, explained, inputs[0].shape[1])
            if narrow and target.logit.dtype != torch.float64:
                self._refuse_float64()
            if tape is not None:
                tape.check(target.logit)
            return self._pass(inputs[0], target, output, reduction)

    def _pass(self, x: Tensor, target: Target, output: Any, reduction: Reduction | None) -> Pass:
        scores, logit = None, target.logit
        if reduction is not None:
            with torch.enable_grad():
                logits = [logit] if logit.dim() == 1 else list(logit.unbind(1))
            rows = []
            while logits:
                grad = self._gradient(x, logits.pop(0), keep=bool(logits))
                with torch.no_grad():
                    rows.append(reduction(x.detach(), grad))
            scores = rows[0] if logit.dim() == 1 else torch.stack(rows, 1)
        target.logit = logit.detach()
        return Pass(x.detach(), scores, target, detached(output))

    def _gradient(self, x: Tensor, logit: Tensor, keep: bool) -> Tensor:
        """Return the gradient of the logits (B,) with respect to x; `keep` keeps the graph for another."""
        grad = None
        if logit.requires_grad:
            # The sum of the logits has the same gradients, because no example depends on another one.
            grad = gradient(logit.sum(), x, keep)
        if grad is None:
            raise ValueError(
                f"{self.who}: the logit can't be followed back to the first layer's input; the model or its "
                "head runs without gradients, or doesn't read it"
            )
        return grad

    def _refuse_float64(self) -> None:
        raise ValueError(
            f"{self.who}: {type(self.stock).__name__} can't run in float64 on weights of {self.stock.dtype}; "
            "cast the model: model.double()"
        )

    def _target(self, batch: Mapping[str, Any], output: Any, explained: tuple, n: int) -> Target:
        target, contrast, position = explained
        mask, logits = key_mask(batch), find_logits(output)
        if logits is not None and logits.dim() == 3 and is_decoder(self.stock) and position is None:
            position = next_token_position(self.who, logits, n, mask)
        kept = kept_positions(batch, n)
        return find_target(self.who, output, target, contrast, position, mask, kept, several=True)

    @contextmanager
    def _graph(
        self, gradient: bool, values: Tensor | None, tape: ModifiedBackward | None
    ) -> Iterator[list[Tensor]]:
        """Context of one forward pass; yields a list that the first layer's input is put into.

        What the encoder computes before its first layer gets no graph. The input itself is flagged, not a
        copy, so that everything that reads it is part of the graph.
        """
        found, inputs, calls = find_layers(self.model), [], []
        first = found[0].block
        shared = sum(layer.block is first for layer in found)

        def start(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.append(module)
            if len(calls) > shared:
                raise ValueError(
                    f"{self.who}: the model's layers ran more than once in one forward pass; explain one "
                    "input at a time"
                )
            if len(calls) > 1:
                return
            if gradient and torch.is_inference_mode_enabled():
                raise ValueError(
                    f"{self.who}: the model runs in torch.inference_mode, which has no gradients; use "
                    "torch.no_grad"
                )
            x = args[0] if args else kwargs["hidden_states"]
            if values is not None:
                x.copy_(values)
            inputs.append(x)
            if gradient:
                if not x.requires_grad:
                    flagged.append(x.requires_grad_())
                # A user's module may run its encoder under torch.no_grad.
                torch.set_grad_enabled(True)
            if tape is not None:
                tape.start(x)

        flagged: list[Tensor] = []
        handles = [
            self.stock.register_forward_pre_hook(in_this_thread(lambda *_: _without_gradients())),
            first.register_forward_pre_hook(in_this_thread(start), prepend=True, with_kwargs=True),
        ]
        try:
            with torch.set_grad_enabled(gradient):
                yield inputs
        finally:
            for handle in handles:
                handle.remove()
            for x in flagged:
                x.requires_grad_(False)

    @contextmanager
    def _replaced(self, where: Tensor, token: int) -> Iterator[None]:
        """Context in which some tokens get the embedding of another id.

        Only the embedding changes. Positions that the model counts from its ids stay what they are.
        """
        embeddings, looked_up = self.stock.get_input_embeddings(), []

        def hook(module: nn.Module, args: tuple) -> tuple | None:
            # GPT-2 looks its token types up in the same table, after the tokens.
            if looked_up or not args or args[0].shape != where.shape:
                return None
            looked_up.append(module)
            return (torch.where(where.to(args[0].device), token, args[0]), *args[1:])

        handle = embeddings.register_forward_pre_hook(in_this_thread(hook))
        try:
            yield
        finally:
            handle.remove()
        if not looked_up:
            raise ValueError(
                f"{self.who}: {type(self.stock).__name__} doesn't look the ids up in its embedding table, so "
                "no token can be replaced"
            )


def gradient(y: Tensor, x: Tensor, keep: bool = False) -> Tensor | None:
    """Return the gradient of a sum y (a scalar) with respect to x (any shape), or None without a way to x.

    torch's engine is called itself. `torch.autograd.grad` would leave an active TorchFunctionMode, which
    must stay active for blocks that compute their forward pass again (torch.utils.checkpoint). For the same
    reason the backward pass stays in this thread.
    """
    run = torch.autograd.Variable._execution_engine.run_backward
    with torch.autograd.set_multithreading_enabled(False):
        return run(
            (y,), (torch.ones_like(y),), keep, False, (x,), allow_unreachable=True, accumulate_grad=False
        )[0]


def _without_gradients() -> None:
    torch.set_grad_enabled(False)


def key_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """Return the real tokens of a batch, (B, n) bool; None if all tokens are real."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask == 1
