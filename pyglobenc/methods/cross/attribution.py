"""Gradient-weighted rollout of models with two streams of tokens (Chefer, Gur and Wolf, ICCV 2021).

An encoder-decoder's target token rests on decoder tokens and on source tokens. The similarity of a text and
an image rests on tokens and on patches. `pyglobenc.methods.cross.encoder_decoder` gives the equations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyglobenc.backends.dispatch import check_backend
from pyglobenc.common.arguments import known_arguments, refuse_unknown
from pyglobenc.common.autocast import callers_autocast, outside_autocast
from pyglobenc.common.deferred import check_range, require
from pyglobenc.hf.limits import check_readable, weights_named
from pyglobenc.hf.streams.capture import AttentionTrace, StreamsTrace, capture_streams
from pyglobenc.hf.streams.modules import Attention, Streams
from pyglobenc.hf.streams.registry import find_streams, start_token
from pyglobenc.hf.unwrap import called_module, is_stock_model
from pyglobenc.methods.arguments import REFUSED, run_model, takes
from pyglobenc.methods.cross.co_attention import CoAttentionRules
from pyglobenc.methods.cross.encoder_decoder import (
    AttentionMap,
    encoder_decoder_rows,
    self_attention_rows,
)
from pyglobenc.methods.head import detached, find_logits
from pyglobenc.methods.inputs import check_evaluation, graph_inputs, require_finite
from pyglobenc.methods.precision.reliability import warn_of_nothing
from pyglobenc.methods.target import Index, Target, find_target, next_token_position

WHO = "CrossAttribution"
TEXT = ("input_ids", "attention_mask", "token_type_ids")
DECODER = ("decoder_input_ids", "decoder_attention_mask")
OBJECTS = ("visual_feats", "visual_pos", "visual_attention_mask")
IMAGE = ("pixel_values", "interpolate_pos_encoding", *OBJECTS)
# Inputs that a model which takes them can't do without, and their shapes.
SHAPES = {
    "input_ids": "(B, n)",
    "pixel_values": "(B, channels, height, width)",
    "visual_feats": "(B, m, features)",
    "visual_pos": "(B, m, 4)",
}


@dataclass
class CrossResult:
    """Attribution of one value for each example to the tokens of both streams.

    If T logits of each example are explained, all fields but the output have T as their second dimension.

    Attributes:
        scores: (B, n), one score for each decoder token, or for each token of the text that is compared with
            an image; padding gets 0.
        source_scores: (B, m), one score for each source token, or for each token of the image encoder, its
            special tokens included; padding gets 0.
        target: (B,) int64, the class or the token id explained. For question answering, 0 is the start and 1
            the end. None for a similarity.
        position: (B,) int64, the decoder or text token whose rows the scores are.
        logit: (B,), the value explained.
        nothing: (B,) bool, True where no relevance reaches any token of either stream. The scores are 0
            there.
        output: the output of the model.
    """

    scores: Tensor
    source_scores: Tensor
    target: Tensor | None
    position: Tensor
    logit: Tensor
    nothing: Tensor
    output: Any = None


class CrossAttribution:
    """Gradient-weighted rollout through self-attention and cross attention (Chefer et al., ICCV 2021).

    Args:
        model: an encoder-decoder (BART's and T5's families, or a vision encoder-decoder), CLIP, or LXMERT for
            question answering, in evaluation mode. It is not changed.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        dtype: dtype of the rollout's arithmetic. None means float32, or float64 for a float64 model. The
            model itself runs in its own dtype.

    Raises:
        TypeError, ValueError: an unknown architecture, backend or dtype, or a model in training mode.
    """

    @known_arguments
    def __init__(self, model: nn.Module, backend: str = "auto", dtype: torch.dtype | None = None):
        check_backend(backend, WHO)
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"{WHO}: dtype must be None, torch.float32 or torch.float64, got {dtype}")
        self.model = called_module(model)
        if not is_stock_model(self.model):
            raise TypeError(
                f"{WHO}: model must be a transformers model itself, got {type(self.model).__name__} around "
                "one"
            )
        self.kind = find_streams(self.model).kind
        check_readable(self.model)
        check_evaluation(WHO, self.model)
        self.backend, self.dtype = backend, dtype

    @outside_autocast
    def __call__(
        self, *, target: Any = None, contrast: Index = None, position: Index = None, **batch: Any
    ) -> CrossResult:
        """Attribute one value of each example to the tokens of both streams.

        Args:
            target, contrast: the logit explained, as for `TransformerAttribution`; for a model that
                generates text token ids, None for the predicted one. A similarity takes neither.
            position: the decoder token whose logits are explained. They are those of the token after it.
                None means the last real decoder token. A position (B, T) explains T logits of each example
                from one forward pass; target and contrast may then be (B, T) too.
            batch: the model's inputs. Texts are input_ids and attention_mask (B, m), images are pixel_values
                (B, channels, height, width). decoder_input_ids (B, n) are the decoder's tokens, as the model
                takes them, the start token first; without them the decoder gets the start token alone, and
                the first generated token is explained. decoder_attention_mask is (B, n). CLIP compares text
                b with image b.

        Returns:
            CrossResult with scores (B, n) and source_scores (B, m): the rows, at the token that the head
            reads, of the relevance between the target's tokens and of that of the source's tokens. For CLIP
            they are the rows of the text encoder and of the image encoder.

        Raises:
            TypeError, ValueError: an index is out of range, the model can't take the input, the head reads
                several tokens, or a score or a logit is not finite.
        """
        batch = self._inputs(batch)
        with weights_named(self.model), torch.inference_mode(False), torch.enable_grad():
            trace, output = self._run(batch)
            chosen = self._target(trace, output, (target, contrast, position))
            several = chosen.logit.dim() == 2
            logits = list(chosen.logit.unbind(1)) if several else [chosen.logit]
            parts = []
            while logits:
                # The gradients of all layers exist for one logit at a time, on one graph.
                parts.append(self._rows(trace, logits.pop(0), keep=bool(logits)))
        scores, source_scores, at, nothing = (
            torch.stack(part, 1) if several else part[0] for part in zip(*parts, strict=True)
        )
        logit = chosen.logit.detach()
        require_finite(WHO, self.model, (scores, source_scores, logit))
        warn_of_nothing(WHO, nothing.any(1) if several else nothing)
        index = None if self.kind == "similarity" else chosen.index
        return CrossResult(scores, source_scores, index, at, logit, nothing, detached(output))

    def _run(self, batch: Mapping[str, Any]) -> tuple[StreamsTrace, Any]:
        with capture_streams(self.model) as trace, callers_autocast():
            output = run_model(self.model, graph_inputs(batch))
        trace.check()
        if self.kind == "cross":
            _check_keys(trace)
        return trace, output

    def _target(self, trace: StreamsTrace, output: Any, explained: tuple[Any, Index, Index]) -> Target:
        """Return the explained value of each example."""
        if self.kind == "similarity":
            if any(value is not None for value in explained):
                raise ValueError(
                    f"{WHO}: {type(self.model).__name__} explains the similarity of each text and its image; "
                    "it takes no target, contrast or position"
                )
            logits = output.logits_per_text
            # Only text b and image b contribute to entry (b, b).
            return Target(torch.zeros(len(logits), dtype=torch.long), None, logits.diagonal())
        if self.kind == "co-attention":
            # LXMERT has a name of its own for the logits.
            output = {"logits": output.get("question_answering_score")}
        target, contrast, position = explained
        logits, first = find_logits(output), trace.of(trace.streams.target[0].own)
        if position is None and logits is not None and logits.dim() == 3:
            position = next_token_position(WHO, logits, first.q.shape[2], first.key_mask)
        return find_target(WHO, output, target, contrast, position, first.key_mask, several=True)

    def _rows(self, trace: StreamsTrace, logit: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the scores (B, n) and (B, m) of the logits (B,), the token read and where they are nothing.

        `keep` keeps the graph for another logit.
        """
        streams = trace.streams
        tops = [trace.tops["target"]] + ([trace.tops["source"]] if self.kind == "similarity" else [])
        attentions = [one for layer in streams.layers for one in layer.attentions]
        wanted = [*tops, *(trace.of(one).graph for one in attentions)]
        found = torch.autograd.grad(logit.sum(), wanted, retain_graph=keep, allow_unused=True)
        # The text's last layer does not see what the image's last layer computes.
        unread = streams.source[-1].attentions if self.kind == "co-attention" else []
        missing = [one for grad, one in zip(found[len(tops) :], attentions, strict=True) if grad is None]
        if any(grad is None for grad in found[: len(tops)]) or any(one not in unread for one in missing):
            raise ValueError(
                f"{WHO}: the logit can't be followed to every layer; a part of the model runs without "
                "gradients, or the head doesn't read both streams"
            )
        wide = trace.of(attentions[0]).q.dtype == torch.float64
        dtype = self.dtype or (torch.float64 if wide else torch.float32)
        with torch.no_grad():
            read = [_token_read(grad) for grad in found[: len(tops)]]
            starts = [_unit_row(at, top, dtype) for at, top in zip(read, tops, strict=True)]
            maps = {
                one: AttentionMap(trace.of(one), _by_head(grad, trace.of(one)), dtype, self.backend)
                for one, grad in zip(attentions, found[len(tops) :], strict=True)
            }
            scores, source_scores = self._rolled_out(streams, maps, starts)
            start = starts[1] if self.kind == "similarity" else 0
            reached = (scores != starts[0]).any(2) | (source_scores != start).any(2)
            nothing = ~reached[:, 0]
            scores, source_scores = (
                t[:, 0].masked_fill(nothing[:, None], 0) for t in (scores, source_scores)
            )
        return scores, source_scores, read[0], nothing

    def _rolled_out(
        self, streams: Streams, maps: Mapping[Attention, AttentionMap], starts: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the rows (B, 1, n) and (B, 1, m) of both relevances, given the unit rows `starts`."""
        own = [[maps[layer.own] for layer in stream] for stream in (streams.target, streams.source)]
        if self.kind == "similarity":
            return tuple(self_attention_rows(*pair) for pair in zip(own, starts, strict=True))
        if self.kind == "cross":
            cross = [maps[layer.cross] for layer in streams.target]
            return encoder_decoder_rows(own[1], own[0], cross, starts[0])
        cross = [
            [maps[layer.cross] for layer in stream if layer.cross is not None]
            for stream in (streams.target, streams.source)
        ]
        both = len(cross[0])
        alone, own = [maps[:-both] for maps in own], [maps[-both:] for maps in own]
        return CoAttentionRules(alone, cross, own).rows(starts[0])

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Check the inputs of a call, and add the decoder's start token where it has none."""
        check_evaluation(WHO, self.model)
        names = [name for name in (*TEXT, *DECODER, *IMAGE) if takes(self.model, name)]
        if self.kind == "cross" and "pixel_values" in names:
            names = [name for name in names if name not in TEXT]
        types = batch.get("token_type_ids")
        if "token_type_ids" not in names and isinstance(types, Tensor) and not bool(types.any()):
            # Some tokenizers return token types of 0 for models without token types.
            batch = {name: value for name, value in batch.items() if name != "token_type_ids"}
        neutral = {name for name, value in batch.items() if name in REFUSED and value is REFUSED[name][0]}
        unknown = [name for name in batch if name not in names and name not in neutral]
        if set(unknown) & REFUSED.keys():
            name = next(name for name in unknown if name in REFUSED)
            raise ValueError(f"{WHO}: {name} can't be honoured: {REFUSED[name][1]}")
        refuse_unknown(WHO, unknown, {*names, "target", "contrast", "position"})
        batch = {name: batch[name] for name in names if batch.get(name) is not None}
        size = 0
        for name in SHAPES:
            if name in names and name not in batch:
                raise ValueError(f"{WHO}: the batch has no {name}, got {', '.join(batch) or 'nothing'}")
            if name in names:
                size = _check_size(name, batch[name], size)
        generates = self.kind == "cross" and self.model.get_output_embeddings() is not None
        if generates and "decoder_input_ids" not in batch:
            batch["decoder_input_ids"] = self._start(size)
        for ids, mask in ((TEXT[0], TEXT[1]), DECODER):
            if ids in batch:
                _check_size(ids, batch[ids], size)
                self._check_ids(ids, batch[ids])
            if mask in batch:
                _check_mask(mask, batch[mask], batch.get(ids))
        if "token_type_ids" in batch:
            _check_size("token_type_ids", batch["token_type_ids"], size)
            check_range(WHO, "token_type_ids", batch["token_type_ids"], self.model.config.type_vocab_size)
        if "visual_attention_mask" in batch:
            _check_mask(
                "visual_attention_mask", batch["visual_attention_mask"], batch["visual_feats"][..., 0]
            )
        return batch

    def _check_ids(self, name: str, ids: Tensor) -> None:
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{WHO}: {name} must be int64 or int32, got {ids.dtype}")
        if self.kind == "similarity":
            part = self.model.text_model
        elif self.kind == "co-attention":
            part = self.model
        else:
            part = self.model.get_encoder() if name == "input_ids" else self.model.get_decoder()
        check_range(WHO, name, ids, part.get_input_embeddings().num_embeddings)
        limit = getattr(part.config, "max_position_embeddings", None)
        if limit is not None and ids.shape[1] > limit:
            raise ValueError(f"{WHO}: {name} has {ids.shape[1]} tokens and the model takes {limit}")

    def _start(self, size: int) -> Tensor:
        """Return the decoder's start token for each example, (B, 1)."""
        start = start_token(self.model)
        if start is None:
            raise ValueError(
                f"{WHO}: the config of {type(self.model).__name__} has no decoder_start_token_id; give "
                "decoder_input_ids"
            )
        return torch.full((size, 1), start, device=self.model.device)


def _by_head(grad: Tensor | None, captured: AttentionTrace) -> Tensor:
    """Return a gradient (B, H, n, dh) or (B, n, H * dh) as (B, H, n, dh); zeros for None."""
    if grad is None:
        return torch.zeros_like(captured.o)
    return grad if grad.dim() == 4 else grad.unflatten(2, (captured.q.shape[1], -1)).transpose(1, 2)


def _check_keys(trace: StreamsTrace) -> None:
    """Check that the last source token's key and value come from that token alone of the encoder's output.

    A norm or a projection may lie between the encoder's last layer and the decoder, but nothing that mixes
    tokens.
    """
    one, top = trace.of(trace.streams.target[0].cross), trace.tops["source"]
    last = one.k.shape[2] - 1
    value = one.k[:, :, last].sum() + one.v[:, :, last].sum()
    gradient = torch.zeros_like(top)
    if value.requires_grad:
        (found,) = torch.autograd.grad(value, top, retain_graph=True, allow_unused=True)
        gradient = gradient if found is None else found
    read = (gradient != 0).any(2)
    own = read.shape[1] == last + 1 and read[:, last].all() & ~read[:, :last].any()
    require(
        torch.as_tensor(own),
        lambda: ValueError(
            f"{WHO}: the decoder doesn't attend to the encoder's last output token by token; a module "
            "between them mixes tokens, or its output doesn't depend on them"
        ),
    )


def _token_read(gradient: Tensor) -> Tensor:
    """Return the one token that the explained value reads of a last layer's output, (B,) int64.

    gradient is that of the value with respect to the output, (B, n, d).
    """
    read = (gradient != 0).any(-1)

    def error() -> ValueError:
        count = read.sum(1).tolist()
        return ValueError(
            f"{WHO}: the rules give the rows of one token, but the head reads {count} tokens of the last "
            "layer's output in the examples of the batch"
        )

    require((read.sum(1) == 1).all(), error)
    return read.int().argmax(1)


def _unit_row(at: Tensor, top: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows of the identity at positions (B,), (B, 1, n), for an output `top` (B, n, d)."""
    rows = torch.zeros(top.shape[0], 1, top.shape[1], dtype=dtype, device=top.device)
    return rows.scatter_(2, at[:, None, None].to(top.device), 1)


def _check_size(name: str, t: Any, size: int) -> int:
    """Return the number of examples in an input, which must be `size` unless that is 0."""
    shape = SHAPES.get(name, "(B, n)")
    if (
        not isinstance(t, Tensor)
        or t.dim() != len(shape.split(","))
        or 0 in t.shape
        or size not in (0, len(t))
    ):
        came = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
        raise ValueError(
            f"{WHO}: {name} must be a tensor {shape}{f' with B={size}' if size else ''}, got {came}"
        )
    return len(t)


def _check_mask(name: str, mask: Any, ids: Tensor | None) -> None:
    if ids is None:
        raise ValueError(f"{WHO}: {name} is given without its token ids")
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        came = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{WHO}: {name} must be a tensor (B, n) = {tuple(ids.shape)}, got {came}")
    real = mask == 1
    require(
        (real | (mask == 0)).all() & real.any(1).all(),
        lambda: ValueError(f"{WHO}: {name} must hold 0 and 1 alone, and a real token in each example"),
    )
