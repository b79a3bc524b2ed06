"""Gradient x input, saliency, integrated gradients and occlusion of a logit, and modified backward passes.

All explain a logit y by the input h of the first layer, a vector for each token or patch; see `first_layer`.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyglobenc.common.arguments import known_arguments
from pyglobenc.common.autocast import outside_autocast
from pyglobenc.hf.limits import padding_id, patch_grid, patch_size, vocabulary
from pyglobenc.hf.unwrap import stock_model
from pyglobenc.methods.arguments import model_inputs
from pyglobenc.methods.gradients.backward_rules import RULES
from pyglobenc.methods.gradients.first_layer import FirstLayer, Pass, key_mask
from pyglobenc.methods.inputs import check_batch, check_model, graph_inputs, require_finite
from pyglobenc.methods.precision.reliability import DIGITS_GONE, PrecisionWarning, named
from pyglobenc.methods.target import SPANS, Index

GRADIENTS = {
    "gradient-x-input": "the gradient of the logit times the first layer's input, summed over the hidden "
    "size; signed (Shrikumar et al., 2016)",
    "gradient-x-input-norm": "the gradient of the logit times the first layer's input, as a norm over the "
    "hidden size: GlobEnc's saliency (Modarressi et al., 2022)",
    "saliency": "norm of the logit's gradient by the first layer's input (Simonyan et al., 2014)",
    "integrated-gradients": "gradients from a text of mask tokens up to the text, integrated; signed "
    "(Sundararajan et al., 2017)",
    "occlusion": "how much the logit falls if the mask token takes a token's place; signed (Zeiler and "
    "Fergus, 2014)",
}
# These methods replace tokens, or the pixels of patches.
REPLACING = ("integrated-gradients", "occlusion")
WHO = "GradientAttribution"
# The most tokens of all copies in one pass of integrated gradients or occlusion, unless one copy of every
# example has more.
COPIED_TOKENS = 4096
# Numbers of nodes of integrated gradients. An example takes the second number if the sum of its scores is too
# far from the difference of the logits. With few nodes the two may agree by chance: of 40 sentences of SST-2,
# those that passed had scores that were off by up to 8 % with 16 nodes, and by 0.8 % with 32.
STEPS = (32, 128)


# The scores (B, n) by the first layer's input and its gradient, (B, n, d).
REDUCTIONS = {
    "gradient-x-input": lambda x, grad: _products(x, grad).sum(-1),
    "gradient-x-input-norm": lambda x, grad: _products(x, grad).norm(dim=-1),
    "saliency": lambda x, grad: wide(grad).norm(dim=-1),
}


@dataclass
class GradientResult:
    """Attribution of one logit for each example, or of T logits.

    Attributes:
        scores: (B, n), one score for each token, or (B, patches) for images; padding gets 0. (B, T, n) for T
            logits of each example.
        target: (B,) or (B, T) int64, the class explained. For question answering, 0 is the start and 1 the
            end.
        logit: (B,) or (B, T), the value explained.
        error: (B,) or (B, T) for integrated gradients, else None: the difference between the sum of the
            scores and the difference of the logits of text and baseline, relative to the sum of the scores'
            absolute values. In exact arithmetic it would be 0 with infinitely many steps.
        nothing: always None: no method here fails to find a score.
        output: the output of the model.
    """

    scores: Tensor
    target: Tensor
    logit: Tensor
    error: Tensor | None = None
    nothing: None = None
    output: Any = None


class GradientAttribution:
    """One of the methods in GRADIENTS or RULES, on any model with a head whose layers are known.

    Args:
        model: a known architecture with a head, or a user's module with a head of its own around one, in
            evaluation mode. It is not changed: parameters get no gradient and keep their flags.
        method: a name in GRADIENTS, or in `RULES` for AttnLRP and its relatives.
        dtype: None computes in the model's own dtype, and in float32 at least after the forward pass.
            torch.float64 runs the forward pass of a narrower model in float64, where its modules allow it.

    Raises:
        TypeError, ValueError: the method or architecture is unknown, or the model is in training mode.
    """

    @known_arguments
    def __init__(self, model: nn.Module, method: str = "gradient-x-input", dtype: torch.dtype | None = None):
        if method not in GRADIENTS and method not in RULES:
            raise ValueError(
                f"{WHO}: method must be one of {', '.join([*GRADIENTS, *RULES])}, got {method!r}"
            )
        self.model = check_model(WHO, model, "auto", dtype)
        self.stock = stock_model(self.model)
        self.images = self.stock.main_input_name == "pixel_values"
        self.method = method
        self.first_layer = FirstLayer(WHO, self.model, dtype, method if method in RULES else None)

    @known_arguments
    @outside_autocast
    def __call__(
        self,
        *,
        target: Any = None,
        contrast: Index = None,
        position: Index = None,
        replacement: int | None = None,
        special_tokens_mask: Tensor | None = None,
        elements: bool = False,
        **batch: Any,
    ) -> GradientResult:
        """Attribute one logit of each example to its tokens or patches.

        With h the first layer's input and y the logit, the score of token i is:

        - gradient-x-input: the sum over the hidden size of dy/dh_i h_i.
        - gradient-x-input-norm: the L2 norm over the hidden size of the products dy/dh_i h_i.
        - saliency: the L2 norm of dy/dh_i.
        - integrated-gradients: the integral of dy/dh_i (h_i - b_i) along the straight line from the baseline
          b to h, by Gauss-Legendre quadrature. b is the first layer's input for the text whose tokens are all
          replaced; the image whose pixels are all 0, after the processor. The scores add up to the
          difference of the two logits.
        - occlusion: y minus the logit of the text in which token i is replaced; of the image in which the
          pixels of patch i are 0.

        - attnlrp, cp-lrp, gim, libragrad: as gradient-x-input, with a gradient that follows the method's
          backward rules; see `pyglobenc.methods.gradients.backward_rules`.

        A replaced token keeps its position and token type, and gets the embedding of another id.

        Args:
            target, contrast, position: the logit explained, as `TransformerAttribution` takes them. For a
                language model, position None is the last real token, which predicts the next one. A position
                (B, T) explains T logits of each example from one forward pass; target and contrast may then
                be (B, T) too.
            replacement: id of the token that replaces others, such as the tokenizer's mask token; None for
                the padding id of the model's config.
            special_tokens_mask: (B, n), as a tokenizer returns it: 1 at special tokens, which are not
                replaced. None replaces all tokens.
            elements: keep the products of gradient and input apart, where a method adds them up for a token's
                score: gradient-x-input and the methods in RULES, of texts.
            batch: the model's inputs, as its tokenizer or image processor returns them: input_ids and
                attention_mask (B, n), or pixel_values (B, channels, height, width).

        Returns:
            GradientResult with scores (B, n), or (B, T, n) for T logits; with `elements` (B, n, d) or
            (B, T, n, d). Each example gets the scores that it would get alone, without padding.

        Raises:
            TypeError, ValueError: an index is out of range; the model can't take the input, or has no head
                that reads it; there is no token that could replace others; a score isn't finite; or an
                operation of the model has no backward rule.
        """
        batch = model_inputs(WHO, self.model, batch, GradientAttribution.__call__)
        check_batch(WHO, self.model, batch)
        if elements and (self.images or self.method not in ("gradient-x-input", *RULES)):
            raise ValueError(
                f"{WHO}: elements belong to texts, and to gradient-x-input, {', '.join(RULES)}; got "
                f"{self.method}{' of images' * self.images}"
            )
        explained = dict(target=target, contrast=contrast, position=position)
        with torch.inference_mode(False), torch.no_grad():
            explained = tuple(graph_inputs(explained).values())
            return self._attribute(graph_inputs(batch), explained, replacement, special_tokens_mask, elements)

    def _attribute(
        self,
        batch: Mapping[str, Any],
        explained: tuple,
        replacement: int | None,
        special: Tensor | None,
        elements: bool,
    ) -> GradientResult:
        """Return the result for a checked batch; the arguments are those of the call."""
        if self.method == "integrated-gradients":
            found, scores, error = self._integrated(batch, explained, replacement, special)
        elif self.method == "occlusion":
            found, error = self.first_layer.run(batch, explained), None
            scores = self._occluded(batch, found, replacement, special)
        else:
            reduction = REDUCTIONS["gradient-x-input" if self.method in RULES else self.method]
            if elements:
                reduction = _products
            found, error = self.first_layer.run(batch, explained, reduction=reduction), None
            scores = found.scores
        mask = key_mask(batch)
        if mask is not None:
            mask = mask.to(scores.device)
            mask = mask if found.target.logit.dim() == 1 else mask[:, None]
            scores = scores.masked_fill(~(mask[..., None] if elements else mask), 0)
        if not elements:
            scores = scores[..., self._prefix(batch, found.x) :]
        require_finite(WHO, self.model, (scores, found.target.logit))
        if error is not None:
            _warn_of_steps(error)
        return GradientResult(scores, found.target.index, found.target.logit, error, output=found.output)

    def _integrated(
        self, batch: Mapping[str, Any], explained: tuple, replacement: int | None, special: Tensor | None
    ) -> tuple[Pass, Tensor, Tensor]:
        """Return the pass of the inputs, the scores (B, n) and their error (B,); (B, T, n) and (B, T)."""
        run = self.first_layer.run
        found = run(batch, explained)
        if self.images:
            base = run({**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])}, _same_logit(found))
        else:
            where, token = self._content(batch, special), self._token(batch, replacement)
            base = run(batch, _same_logit(found), replaced=(where, token))
        change = wide(found.x) - wide(base.x)
        expected = wide(found.target.logit) - wide(base.target.logit)
        scores = change.new_zeros(*expected.shape, change.shape[1])
        error = torch.full_like(expected, float("inf"))
        for steps in STEPS:
            wrong = error > DIGITS_GONE
            rows = wrong.view(len(wrong), -1).any(1).nonzero()[:, 0]
            if not len(rows):
                break
            # Of T logits, only the columns in which one is wrong need more steps.
            part = (rows,) if wrong.dim() == 1 else (rows[:, None], wrong.any(0).nonzero()[:, 0])
            explained = _rows(_same_logit(found), *part)
            found_now = self._integral(
                _take(batch, rows, len(error)), found.x[rows], change[rows], explained, steps
            )
            size = found_now.abs().sum(-1)
            gap = (found_now.sum(-1) - expected[part].to(found_now.device)).abs()
            # A baseline of the same logit gives scores of 0, which are right.
            gap = torch.where(gap > 0, gap / size, gap).to(error.device)
            # Each logit keeps the smallest number of steps that suffices for it.
            again = wrong[part]
            scores[wrong.to(scores.device)] = found_now[again.to(found_now.device)]
            error[wrong] = gap[again]
        return found, scores, error

    def _integral(
        self, batch: Mapping[str, Any], x: Tensor, change: Tensor, explained: tuple, steps: int
    ) -> Tensor:
        """Return the integral for all examples with a number of nodes, (B, n) or (B, T, n)."""
        size, n = x.shape[:2]
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        total = 0

        def times_change(x: Tensor, grad: Tensor) -> Tensor:
            return (wide(grad).unflatten(0, (-1, size)) * change).sum(-1).flatten(0, 1)

        at_once = max(1, COPIED_TOKENS // (size * n))
        for start in range(0, steps, at_once):
            part = slice(start, start + at_once)
            # The nodes lie in [-1, 1], and 1 stands for the inputs themselves.
            back = change.new_tensor((1 - nodes[part]) / 2)
            values = (wide(x) - back[:, None, None, None] * change).flatten(0, 1).to(x.dtype)
            rows = torch.arange(size, device=x.device).repeat(len(back))
            copies, explained_by = _take(batch, rows, size), _rows(explained, rows)
            found = self.first_layer.run(copies, explained_by, reduction=times_change, values=values)
            weight = change.new_tensor(weights[part] / 2)
            total = total + torch.tensordot(weight, found.scores.unflatten(0, (-1, size)), 1)
        return total

    def _occluded(
        self, batch: Mapping[str, Any], found: Pass, replacement: int | None, special: Tensor | None
    ) -> Tensor:
        """Return how much the logit falls without each token or patch, (B, n) or (B, T, n)."""
        logit = wide(found.target.logit)
        scores = logit.new_zeros(*found.x.shape[:2], *logit.shape[1:])
        if self.images:
            prefix = self._prefix(batch, found.x)
            where = torch.ones(found.x.shape[:2], dtype=torch.bool, device=found.x.device)
            where[:, :prefix] = False
        else:
            where, token = self._content(batch, special), self._token(batch, replacement)
        size, n = where.shape
        for pairs in where.nonzero().split(max(1, COPIED_TOKENS // n)):
            rows, tokens = pairs.T
            copies = _take(batch, rows, size)
            if self.images:
                hidden = self._without_patches(copies["pixel_values"], tokens - prefix)
                copies, replaced = {**copies, "pixel_values": hidden}, None
            else:
                replaced = (torch.nn.functional.one_hot(tokens, n).bool(), token)
            same = _rows(_same_logit(found), rows)
            changed = self.first_layer.run(copies, same, replaced=replaced).target.logit
            fall = logit[rows.to(logit.device)] - wide(changed)
            scores[rows.to(scores.device), tokens.to(scores.device)] = fall
        return scores.movedim(1, -1)

    def _without_patches(self, pixels: Tensor, patches: Tensor) -> Tensor:
        """Return pixels (B, channels, height, width) in which each image's patch of this number is 0."""
        height, width = patch_size(self.stock)
        pixels, columns = pixels.clone(), pixels.shape[3] // width
        for image, patch in zip(pixels, patches.tolist(), strict=True):
            row, column = divmod(patch, columns)
            image[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = 0
        return pixels

    def _prefix(self, batch: Mapping[str, Any], x: Tensor) -> int:
        """Return the number of tokens before the patches of an image, and 0 for text."""
        if not self.images:
            return 0
        rows, columns = patch_grid(self.stock, batch["pixel_values"].shape[2:])
        return x.shape[1] - rows * columns

    def _content(self, batch: Mapping[str, Any], special: Tensor | None) -> Tensor:
        """Return the tokens that may be replaced, (B, n) bool: real tokens that aren't special."""
        ids, mask = batch.get("input_ids"), key_mask(batch)
        if ids is None:
            raise ValueError(
                f"{WHO}: {self.method} replaces token ids, so it needs input_ids; inputs_embeds have none"
            )
        content = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        if special is None:
            return content
        if not isinstance(special, Tensor) or special.shape != ids.shape:
            came = tuple(special.shape) if isinstance(special, Tensor) else type(special).__name__
            raise ValueError(f"{WHO}: special_tokens_mask must be (B, n) = {tuple(ids.shape)}, got {came}")
        return content & (special.to(content.device) == 0)

    def _token(self, batch: Mapping[str, Any], replacement: int | None) -> int:
        token = padding_id(self.stock) if replacement is None else replacement
        if token is None:
            raise ValueError(
                f"{WHO}: {self.method} replaces tokens, and the model's config has no padding id; name the "
                "id: replacement=i"
            )
        known = vocabulary(self.stock)
        if not 0 <= token < known:
            raise ValueError(f"{WHO}: replacement must be a token id in [0, {known}), got {token}")
        return token


def _warn_of_steps(error: Tensor) -> None:
    large = error > DIGITS_GONE
    if large.any():
        warnings.warn(
            f"{WHO}: with {STEPS[-1]} steps, the integrated gradients of {int(large.sum())} of {len(error)} "
            f"examples still miss the difference of the logits by more than {DIGITS_GONE:.0%} (at worst "
            f"{float(error.max()):.1%}: {named(large)})",
            PrecisionWarning,
            stacklevel=5,
        )


def wide(t: Tensor) -> Tensor:
    """Return a tensor in float32 at least."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _products(x: Tensor, grad: Tensor) -> Tensor:
    return wide(x) * wide(grad)


def _take(batch: Mapping[str, Any], rows: Tensor, size: int) -> dict[str, Any]:
    """Return copies of some of a batch's `size` examples, in the order of rows."""
    return {
        name: value[rows.to(value.device)]
        if isinstance(value, Tensor) and value.dim() and len(value) == size and name != "logits_to_keep"
        else value
        for name, value in batch.items()
    }


def _same_logit(found: Pass) -> tuple[Any, Index, Index]:
    """Return target, contrast and position that explain the same logits again."""
    target = found.target
    spans = isinstance(found.output, Mapping) and f"{SPANS[0]}_logits" in found.output
    index = SPANS[int(target.index[0])] if spans else target.index
    return index, target.contrast, target.position


def _rows(explained: tuple, *part: Tensor) -> tuple:
    """Return target, contrast and position of some examples, or of some logits of theirs."""
    return tuple(
        value[tuple(index.to(value.device) for index in part)] if isinstance(value, Tensor) else value
        for value in explained
    )
