"""The methods of pyglobenc as attribution methods of inseq: importing this module registers them.

Each method that explains what a language model writes is called "pyglobenc-" and its name in
`pyglobenc.methods.registry.METHODS`, such as "pyglobenc-gradient-rollout".
"""

from __future__ import annotations

from typing import Any

import torch
from inseq.attr.feat import FeatureAttribution
from inseq.attr.step_functions import get_step_function
from inseq.data import CoarseFeatureAttributionStepOutput
from torch import Tensor

from pyglobenc.inputs.batches import Runner
from pyglobenc.inputs.generation import check_language_model
from pyglobenc.inputs.options import Options
from pyglobenc.inputs.windows import Encoded
from pyglobenc.methods.cross.attribution import CrossAttribution
from pyglobenc.methods.registry import METHODS

PREFIX = "pyglobenc-"
EXPLAINED = "logit"


class Attributor(FeatureAttribution):
    """A method of pyglobenc in inseq: explains the logit of each token, or its position.

    Args:
        attribution_model: the model of inseq, around a decoder that `explain_generation` takes; or around an
            encoder-decoder that `CrossAttribution` takes, with "pyglobenc-gradient-rollout".
        start_layer, backend, dtype: as for `pyglobenc.explain_generation`.
        hook_to_model: as for inseq's own methods.

    Raises:
        TypeError, ValueError: the method refuses the model.
    """

    method_name = f"{PREFIX}method"

    def __init__(
        self,
        attribution_model: Any,
        start_layer: int = 0,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        hook_to_model: bool = True,
    ):
        super().__init__(attribution_model, hook_to_model)
        options = Options(
            method=self.method_name.removeprefix(PREFIX),
            start_layer=start_layer,
            backend=backend,
            dtype=dtype,
        )
        self.runner = Runner(attribution_model.model, attribution_model.tokenizer, options)
        if not self.runner.source:
            check_language_model(self.runner)

    def hook(self, **kwargs: Any) -> None:
        """Make the logit what inseq explains if the user names nothing else."""
        super().hook(**kwargs)
        self.default = self.attribution_model.default_attributed_fn_id
        self.attribution_model._default_attributed_fn_id = EXPLAINED

    def unhook(self, **kwargs: Any) -> None:
        """Undo `hook`."""
        super().unhook(**kwargs)
        self.attribution_model._default_attributed_fn_id = self.default

    def prepare_and_attribute(self, *args: Any, **kwargs: Any) -> Any:
        """Attribute as inseq does; a method that is used for one call is unhooked after it."""
        try:
            return super().prepare_and_attribute(*args, **kwargs)
        finally:
            usual = self.attribution_model.attribution_method
            if usual is not self:
                self.unhook()
                usual.hook()

    def attribute_step(
        self, attribute_fn_main_args: dict[str, Any], attribution_args: dict[str, Any] | None = None
    ) -> CoarseFeatureAttributionStepOutput:
        """Attribute the next token of each text in a batch to the tokens before it."""
        inputs, given = attribute_fn_main_args["inputs"], attribute_fn_main_args["additional_forward_args"]
        encoder_decoder = self.runner.source
        # Without the target, inseq puts the target's embeddings first.
        given = given[1:] if encoder_decoder and len(inputs) == 1 else given
        count = 2 if encoder_decoder else 1
        ids, (target, explained), masks = given[:count], given[count : count + 2], given[count + 2 :]
        if explained is not get_step_function(EXPLAINED):
            name = getattr(explained, "__name__", explained)
            raise ValueError(
                f"{self.method_name}: explains the logit of each token, so attributed_fn must be "
                f"{EXPLAINED!r}, got {name}"
            )
        target = target.flatten()
        if encoder_decoder:
            return self._of_source(*ids, *masks[:2], target, len(inputs) == 2)
        scores = torch.zeros(ids[0].shape, dtype=torch.float64)
        for row, real, one, wanted in zip(scores, masks[0].bool().cpu(), ids[0], target, strict=True):
            # inseq pads on the left, which would move the positions of the text.
            row[real] = self._of_prefix(one[real.to(one.device)].tolist(), int(wanted))
        return CoarseFeatureAttributionStepOutput(target_attributions=scores)

    def _of_prefix(self, ids: list[int], target: int) -> Tensor:
        """Return the scores (n,) of n tokens for the token after them."""
        runner, n = self.runner, len(ids)
        known = set(runner.tokenizer.all_special_ids)
        text = Encoded("", {"input_ids": ids}, [], [one in known for one in ids], None, None, 0, [])
        targets = at = torch.tensor([[n - 1]], device=runner.model.device)
        explained = {}
        if runner.method.target == "class":
            targets, explained = torch.full_like(at, target), {"position": at}
        rows = runner.one_pass(text, list(range(n)), targets, {}, **explained)
        return rows.scores[0, 0].detach().double().cpu()

    def _of_source(
        self, ids: Tensor, prefix: Tensor, mask: Tensor, prefix_mask: Tensor, target: Tensor, whole: bool
    ) -> CoarseFeatureAttributionStepOutput:
        """Return the scores of source tokens (B, m), and if `whole` those of the target's prefix (B, n)."""
        options = self.runner.options
        result = CrossAttribution(self.runner.called, options.backend, options.dtype)(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=prefix,
            decoder_attention_mask=prefix_mask,
            target=target,
        )
        return CoarseFeatureAttributionStepOutput(
            source_attributions=result.source_scores.detach().cpu(),
            target_attributions=result.scores.detach().cpu() if whole else None,
        )


# inseq's registry finds the subclasses.
CLASSES = {
    name: type(f"Attributor_{name.replace('-', '_')}", (Attributor,), {"method_name": PREFIX + name})
    for name, method in METHODS.items()
    if method.target == "token" or method.next_token
}
