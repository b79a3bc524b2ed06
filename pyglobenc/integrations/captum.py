"""The methods of pyglobenc as attributions of captum, so that its metrics and pictures run on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from pyglobenc.common.arguments import known_arguments
from pyglobenc.hf.limits import patch_grid, patch_size
from pyglobenc.hf.unwrap import called_module, stock_model
from pyglobenc.methods.arguments import run_model
from pyglobenc.methods.gradients.attribution import GradientAttribution
from pyglobenc.methods.gradients.backward_rules import RULES
from pyglobenc.methods.head import find_logits
from pyglobenc.methods.registry import find_method

WHO = "pyglobenc.integrations.captum"


class Attributor(Attribution):
    """A method of pyglobenc with captum's interface.

    Args:
        model: a transformers model of a known architecture, as for `pyglobenc.GlobEnc`.
        method: a name in `pyglobenc.methods.registry.METHODS`.
        names: the names of the model's arguments that additional_forward_args holds, in their order.
        start_layer, backend, dtype: as for `pyglobenc.explain`.

    Attributes:
        forward_func: the function of inputs and additional_forward_args that captum's metrics need. It
            returns the model's logits.

    Raises:
        TypeError, ValueError: the method is unknown or refuses the model.
    """

    @known_arguments
    def __init__(
        self,
        model: nn.Module,
        method: str = "gradient-rollout",
        *,
        names: Sequence[str] = ("attention_mask", "token_type_ids", "position_ids"),
        start_layer: int = 0,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
    ):
        self.method = find_method(method, WHO)
        self.run = self.method.run(WHO, model, backend, dtype, start_layer)
        self.called, self.names = called_module(model), tuple(names)
        self.stock = stock_model(self.called)
        self.images = self.stock.main_input_name == "pixel_values"
        apart = not self.images and method in ("gradient-x-input", *RULES)
        self.products = GradientAttribution(model, method, dtype) if apart else None
        super().__init__(self._logits)

    def attribute(
        self, inputs: Tensor | tuple[Tensor], target: Any = None, additional_forward_args: Any = None
    ) -> Tensor | tuple[Tensor]:
        """Attribute one logit of each example to the elements of an input.

        Args:
            inputs: a tensor, or a tuple of one: input_ids (B, n), inputs_embeds (B, n, d), or pixel_values
                (B, channels, height, width).
            target: the class: an integer, a list or a tensor (B,); None for the predicted class. For logits
                (B, n, classes), such as those of a language model, a tuple (position, class) or a list of
                such tuples; a class alone means the position that the method takes by default. Methods that
                explain a position, whatever the class, take None alone.
            additional_forward_args: the model's other inputs (B, n), a tensor or a tuple in the order of
                `names`.

        Returns:
            Scores of the shape of inputs; a tuple for a tuple. Those of a token's embedding add up to the
            token's score: of gradient-x-input and its relatives with other rules they are the products of
            gradient and first layer's input, if that is as wide as the embeddings; of other methods they are
            equal. Those of a patch's pixels, in all channels, are equal and add up to the patch's score.

        Raises:
            TypeError, ValueError: there are several inputs, the target isn't one of those above, or the
                method refuses the input.
        """
        one = self._one(inputs)
        explained = self._explained(target, len(one))
        # What was computed belongs to no graph, whatever the caller's inputs belong to.
        batch = self._batch(one.detach(), additional_forward_args)
        if self.products is not None and one.dim() == 3 and one.shape[2] == self.stock.config.hidden_size:
            target, position = explained["targets"], explained.get("position")
            found = self.products(**batch, target=target, position=position, elements=True).scores
        else:
            found = self._spread(self.run(batch, **explained).scores.detach(), one)
        return (found,) if isinstance(inputs, tuple) else found

    def _one(self, inputs: Any) -> Tensor:
        """Return the only tensor of inputs."""
        found = inputs if isinstance(inputs, tuple) else (inputs,)
        if len(found) != 1 or not isinstance(found[0], Tensor):
            raise TypeError(
                f"{WHO}: inputs must be one tensor, and the model's other inputs additional_forward_args; "
                f"got {', '.join(type(one).__name__ for one in found)}"
            )
        return found[0]

    def _batch(self, one: Tensor, others: Any) -> dict[str, Any]:
        """Return the model's inputs by name."""
        others = others if isinstance(others, tuple) else (others,)
        if len(others) > len(self.names):
            raise ValueError(
                f"{WHO}: additional_forward_args must be {', '.join(self.names)}; got {len(others)} of them"
            )
        text = "inputs_embeds" if one.is_floating_point() else "input_ids"
        given = {name: value for name, value in zip(self.names, others, strict=False) if value is not None}
        return {"pixel_values" if self.images else text: one} | given

    def _logits(self, inputs: Tensor, *others: Any) -> Tensor:
        logits = find_logits(run_model(self.called, self._batch(inputs, others)))
        if logits is None:
            raise ValueError(f"{WHO}: {type(self.called).__name__} has no logits")
        return logits

    def _explained(self, target: Any, size: int) -> dict[str, Tensor | None]:
        """Return the targets (B,) or None, and with them a position (B,) if there is one."""
        if target is None:
            return {"targets": None}
        if self.method.target == "token":
            raise ValueError(
                f"{WHO}: {self.method.name} explains a position, whatever the class; leave target out"
            )
        rows = torch.as_tensor(target, device=self.stock.device)
        # A tuple is one target of all examples.
        several = not isinstance(target, tuple) and rows.dim() > 0
        rows = rows if several else rows.expand(size, *rows.shape)
        if rows.is_floating_point() or len(rows) != size or rows.shape[1:] not in ((), (2,)):
            raise ValueError(
                f"{WHO}: target must be a class, a tuple (position, class), or one of these for each of "
                f"{size} examples; got {target!r:.80}"
            )
        if rows.dim() == 1:
            return {"targets": rows}
        return {"position": rows[:, 0], "targets": rows[:, 1]}

    def _spread(self, scores: Tensor, one: Tensor) -> Tensor:
        """Return scores of the shape of an input, of scores for its tokens, patches or pixels."""
        if not self.images:
            if one.dim() == 2:
                return scores
            return (scores / one.shape[2])[..., None].expand(one.shape).contiguous()
        if scores.dim() == 3:
            return (scores / one.shape[1])[:, None].expand(one.shape).contiguous()
        (rows, columns), (height, width) = patch_grid(self.stock, one.shape[2:]), patch_size(self.stock)
        grid = scores[:, -rows * columns :].view(-1, 1, rows, columns) / (height * width * one.shape[1])
        shown = grid.repeat_interleave(height, 2).repeat_interleave(width, 3)
        found = scores.new_zeros(one.shape)
        found[:, :, : rows * height, : columns * width] = shown
        return found
