"""Runs a method on tokenized texts: pads their windows into batches, and joins the scores of the windows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyglobenc.backends.shared.launch import HALF
from pyglobenc.hf.labels import class_count, class_name, predict
from pyglobenc.hf.limits import max_tokens, padding_id, vocabulary
from pyglobenc.hf.registry import is_decoder
from pyglobenc.hf.streams.registry import reads_a_source, refuse_comparison
from pyglobenc.hf.unwrap import called_module, stock_model
from pyglobenc.inputs.batching import fitting_batch, in_batches
from pyglobenc.inputs.options import SPANS, written
from pyglobenc.inputs.targets import class_named, token_named
from pyglobenc.inputs.windows import Encoded, join
from pyglobenc.methods.arguments import accepts, run_model
from pyglobenc.methods.builders import Rows
from pyglobenc.methods.head import find_logits
from pyglobenc.methods.inputs import require_finite
from pyglobenc.methods.packing import check_packable
from pyglobenc.methods.precision.reliability import examples_named
from pyglobenc.methods.registry import find_method

if TYPE_CHECKING:
    from pyglobenc.inputs.options import Options

# The logits of models with these name endings are not those of classes of the whole text.
OTHER_HEADS = (
    "TokenClassification",
    "QuestionAnswering",
    "MultipleChoice",
    "MaskedLM",
    "CausalLM",
    "LMHeadModel",
)
# Of these, language models have logits of the next token, and masked language models of the token at a mask.
LANGUAGE_HEADS, MASKED_HEAD = ("CausalLM", "LMHeadModel"), "MaskedLM"
# A tokenizer without a limit has a huge number as its limit.
NO_LIMIT = 10**9


def longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: int | None) -> int | None:
    """Return the largest number of tokens that a text may have, special tokens included; None for no limit.

    Args:
        model, tokenizer: their own limits count.
        asked: the user's limit, or None.

    Raises:
        ValueError: the user's limit is above the model's.
    """
    limit = max_tokens(model)
    if asked is None:
        limits = [
            length
            for length in (limit, tokenizer.model_max_length)
            if length is not None and length < NO_LIMIT
        ]
        return min(limits, default=None)
    if limit is not None and asked > limit:
        raise ValueError(f"explain: max_length must be at most {limit}, which the model takes, got {asked}")
    return asked


def versions(model: PreTrainedModel) -> dict[str, str]:
    """Return what an attribution records of its model and of the libraries."""
    found = {"model_dtype": str(model.dtype).split(".")[-1], "device": str(model.device)}
    return found | {"torch": torch.__version__, "transformers": transformers.__version__}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise TypeError or ValueError unless this is a tokenizer of transformers with a vocabulary."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"explain: tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}"
        )
    # transformers makes a tokenizer of special tokens alone if the tokenizer's files are missing.
    special = set(tokenizer.all_special_tokens)
    # The length is compared first, because reading the whole vocabulary takes longer than the forward
    # pass of a short text.
    if len(tokenizer) <= len(special) and special.issuperset(tokenizer.get_vocab()):
        raise ValueError("explain: the tokenizer has no vocabulary; were its files saved with the model?")


def check_target(runner: Runner, encoded: Encoded, name: str) -> None:
    """Raise ValueError if the target doesn't exist, or if the tokenizer doesn't fit the model.

    Args:
        runner: holds the target, the method and the model; it has checked classes.
        encoded: the tokenized text.
        name: name of the text for the message.
    """
    target, kind, n = runner.target, runner.method.target, len(encoded.tokens)
    if runner.fills_mask:
        masks = encoded.inputs["input_ids"].count(runner.tokenizer.mask_token_id)
        if masks != 1:
            raise ValueError(
                f"explain: a masked language model's prediction for one {runner.tokenizer.mask_token} is "
                f"explained, and {name} has {masks}"
            )
    if kind == "token" and isinstance(target, int) and not -n <= target < n:
        raise ValueError(
            f"explain: target must lie in [0, {n}), the tokens of {name}, or [-{n}, -1] from the end, got "
            f"{target}"
        )
    for option in SPANS:
        span = runner.options.spans.get(option)
        if span is not None and span[1] > n:
            raise ValueError(
                f"explain: {option} must lie within the {n} tokens of {name}, got {written(span)}"
            )
    known, largest = vocabulary(runner.model), max(encoded.inputs["input_ids"])
    if largest >= known:
        raise ValueError(
            f"explain: the tokenizer isn't the model's: token id {largest}, and the model has {known} "
            f"embeddings"
        )


# The target of one text (None: the method's own default), followed by the windows that contain it.
Plan = tuple[int | str | None, list[list[int]]]


class Row(NamedTuple):
    """The result of one window."""

    scores: np.ndarray  # (n,) of the window
    log_scale: float
    target: int | None  # class index, or position in the window; None for a mean over tokens
    logits: Tensor | None  # (classes,); None without a classifier
    error: float | None = None  # None where it isn't known


class Runner:
    """A method that is ready to run on a model.

    Raises:
        TypeError, ValueError: the method is unknown or refuses the model, or the tokenizer can't be used.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Options):
        self.method = find_method(options.method)
        refuse_comparison("explain", called_module(model))
        arithmetic = (options.backend, options.dtype)
        self._run = self.method.run("explain", model, *arithmetic, options.start_layer, **options.spans)
        self.called = called_module(model)
        model = stock_model(self.called)
        if model.main_input_name != "input_ids":
            raise ValueError(f"explain: {type(model).__name__} takes {model.main_input_name}, not text")
        # The "class" is then the token that the model predicts after the text, or at its mask token.
        head = type(model).__name__ if self.method.next_token and self.called is model else ""
        self.next_token = head.endswith(LANGUAGE_HEADS) and is_decoder(model)
        # An encoder-decoder's text is the source, and its decoder's first token is explained.
        self.source = reads_a_source(self.called)
        if self.source:
            self.next_token = self.method.next_token and model.get_output_embeddings() is not None
            if options.long == "windows":
                raise ValueError(
                    "explain: long='windows' splits the source of an encoder-decoder, whose parts have other "
                    "targets; truncate it"
                )
        self.fills_mask = head.endswith(MASKED_HEAD)
        if (
            self.method.target == "class"
            and self.called is model
            and type(model).__name__.endswith(OTHER_HEADS)
            and not (self.next_token or self.fills_mask)
        ):
            raise ValueError(
                f"explain: {options.method} explains a class of the whole text, and {type(model).__name__} "
                "has logits for every token or choice; TransformerAttribution explains them (target=, "
                "position=), methods with a token target, such as globenc, explain its tokens, and gradient "
                "methods a language model's next token, or the token at its mask"
            )
        check_tokenizer(tokenizer)
        if options.merge_words and not tokenizer.is_fast:
            raise ValueError(
                f"explain: merge_words needs a fast tokenizer, which knows its words; got "
                f"{type(tokenizer).__name__}"
            )
        self.model, self.tokenizer, self.options = model, tokenizer, options
        if self.fills_mask and tokenizer.mask_token_id is None:
            raise ValueError(
                f"explain: {type(model).__name__} predicts the token at a mask, and the tokenizer has no "
                "mask token"
            )
        self.target, self.contrast = (self._meant(name) for name in ("target", "contrast"))
        if self.target is not None and self.target == self.contrast:
            raise ValueError(
                f"explain: contrast must be another class than target, got {options.target!r} and "
                f"{options.contrast!r}"
            )
        # The model is inspected only if packing is wanted, because that costs time for a short text.
        why_padded = None if options.packed is False else self._why_padded()
        if options.packed and why_padded:
            raise ValueError(why_padded)
        # On a GPU, torch's attention for packed sequences exists in half precision only; in float32 each
        # length needs a call of its own. By default a class is explained in padded batches, where the
        # rounding error is estimated and reported.
        pays = (self.model.device.type == "cpu" or self.model.dtype in HALF) and self.method.target == "token"
        self.packed = why_padded is None and (pays if options.packed is None else options.packed)
        # Texts of different lengths can form a batch only with a padding id and an attention mask.
        self.batches = self.packed or (
            padding_id(self.model) is not None and accepts(self.called, "attention_mask")
        )
        self.model_name = model.name_or_path or type(model).__name__
        self.versions = versions(model)

    def _meant(self, name: str) -> int | str | None:
        """Return the class or the token's id that the option `name`, target or contrast, means.

        The target of a method that explains a token stays what it is.

        Raises:
            TypeError, ValueError: a string is no label or token, the class doesn't exist, or the method has
                no contrast.
        """
        value, kind, who = getattr(self.options, name), self.method.target, self.options.method
        if kind == "token":
            if name == "contrast" and value is not None:
                raise ValueError(
                    f"explain: contrast belongs to methods that explain a class or a predicted token; {who} "
                    "explains a position"
                )
            if isinstance(value, str) and value != "mean":
                raise TypeError(
                    f"explain: {who} explains a position of the text or 'mean'; target must be an integer, "
                    f"got {value!r}"
                )
            return value
        if value is None:
            return None
        if self.next_token or self.fills_mask:
            classes = vocabulary(self.model)
            value = token_named(self.tokenizer, value, name) if isinstance(value, str) else value
        else:
            # Only the logits tell how many classes a user's own head has, and a base model has none.
            known = (
                self.called is self.model
                and self.model is not self.model.base_model
                and type(self.model).__module__.startswith("transformers.")
            )
            classes = class_count(self.model) if known else None
            value = class_named(self.model.config, classes, value, name) if isinstance(value, str) else value
        if classes is not None and not 0 <= value < classes:
            raise ValueError(f"explain: {name} must be a class in [0, {classes}), got {value}")
        return value

    def _why_padded(self) -> str | None:
        """Return the reason why texts can't be packed, or None if they can."""
        if not self.method.supports_packing:
            return f"explain: {self.method.name} takes no packed texts"
        try:
            check_packable("explain", self.called)
        except ValueError as error:
            return str(error)
        return None

    def run(
        self,
        texts: list[Encoded],
        classes: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield the results of each text as fields of `Attribution`.

        They are scores (n,), log_scale, target, windows, error and the model's prediction.

        Args:
            texts: the texts.
            classes: for a method that explains a class, the class of each text; None for the options' target.
            names: names of the texts in warnings; None for their numbers from 1.
        """
        names = [f"text {number}" for number in range(1, len(texts) + 1)] if names is None else names
        jobs, waiting, done = [], 0, defaultdict(list)
        plans = [self._plan(text) for text in texts]
        if classes is not None:
            plans = [(target, windows) for target, (_, windows) in zip(classes, plans, strict=True)]
        for index, (_, windows) in enumerate(plans):
            jobs += [(index, window) for window in windows]
        width, options = max((len(window) for _, window in jobs), default=0), self.options
        most = min(options.batch_size, len(jobs)) if self.batches else 1
        if not self.source:
            most = fitting_batch(self.model, width, most, options.method, options.dtype)
        for (index, _), row in in_batches(lambda batch: self._rows(texts, plans, names, batch), jobs, most):
            done[index].append(row)
            while waiting < len(texts) and len(done[waiting]) == len(plans[waiting][1]):
                yield self._joined(texts[waiting], plans[waiting], done.pop(waiting))
                waiting += 1

    def _plan(self, text: Encoded) -> Plan:
        target = self.target
        if self.method.target == "token":
            if isinstance(target, int):
                target %= len(text.tokens)
            return target, [
                window for window in text.windows if not isinstance(target, int) or target in window
            ]
        if self.fills_mask:
            mask = text.inputs["input_ids"].index(self.tokenizer.mask_token_id)
            text = replace(text, windows=[window for window in text.windows if mask in window])
        elif self.next_token:
            # The next token follows the last window.
            text = replace(text, windows=text.windows[-1:])
        if target is None and len(text.windows) > 1:
            # All windows must explain the same class.
            target = self._predict(text)
        return target, text.windows

    @torch.no_grad()
    def _predict(self, text: Encoded) -> int:
        """Return the class with the largest logit, averaged over the windows of a text."""
        logits = []
        for window in text.windows:
            batch = self._batch([text], [window])
            found = find_logits(run_model(self.called, batch))
            if found is not None and self.fills_mask:
                found = found[:, self._masks(batch["input_ids"])[0]]
            if found is None or found.dim() != 2:
                raise ValueError(f"explain: {type(self.called).__name__} has no head that classifies texts")
            logits.append(found[0])
        return int(torch.stack(logits).mean(0).argmax())

    def _rows(
        self, texts: list[Encoded], plans: list[Plan], names: Sequence[str], jobs: list[tuple[int, list[int]]]
    ) -> list[Row]:
        """Return one result for each job; a job is the index of a text and a window."""
        arrange = self._columns if self.packed else self._batch
        batch = arrange([texts[index] for index, _ in jobs], [window for _, window in jobs])
        if self.method.replaces_tokens:
            batch |= self._replacing([(texts[index], window) for index, window in jobs])
        explained = {}
        if self.contrast is not None:
            explained["contrast"] = torch.full((len(jobs),), self.contrast, device=self.model.device)
        if self.fills_mask:
            explained["position"] = self._masks(batch["input_ids"])
        with examples_named([names[index] for index, _ in jobs]):
            rows = self._run(batch, self._targets(texts, plans, jobs), **explained)
        scores, log_scale = rows.scores.detach().cpu().numpy(), rows.log_scale.tolist()
        errors = [None] * len(jobs) if rows.error is None else rows.error.tolist()
        logits, targets = (
            [None] * len(jobs),
            [None] * len(jobs) if rows.targets is None else rows.targets.tolist(),
        )
        if rows.logits is not None and rows.logits.shape[:-1] == (len(jobs),):
            # A NaN weight may affect the logits but not the scores.
            require_finite("explain", self.called, (rows.logits,))
            logits = list(rows.logits.detach().double().cpu())
        return [
            Row(scores[b, : len(window)], log_scale[b], targets[b], logits[b], errors[b])
            for b, (_, window) in enumerate(jobs)
        ]

    def one_pass(
        self, text: Encoded, window: list[int], targets: Tensor, options: Mapping[str, Any], **explained: Any
    ) -> Rows:
        """Return T rows of scores (1, T, n) of one text.

        Args:
            text: the text.
            window: the positions of the n tokens that the model reads.
            targets: (1, T), as `Run` in the registry takes them.
            options: further arguments of the model.
            explained: position and contrast, as `Run` takes them.
        """
        batch = self._batch([text], [window]) | options
        if self.method.replaces_tokens:
            batch |= self._replacing([(text, window)])
        return self._run(batch, targets, **explained)

    def _targets(
        self, texts: list[Encoded], plans: list[Plan], jobs: list[tuple[int, list[int]]]
    ) -> Tensor | str | None:
        """Return the targets, (B,) int64 or "mean"; None if every target is the method's own default."""
        targets = [plans[index][0] for index, _ in jobs]
        if self.method.target == "token" and self.target == "mean":
            return "mean"
        if self.method.target == "token" and self.target is not None:
            targets = [window.index(target) for target, (_, window) in zip(targets, jobs, strict=True)]
        elif all(target is None for target in targets):
            return None
        else:
            targets = [
                self._predict(texts[index]) if target is None else target
                for target, (index, _) in zip(targets, jobs, strict=True)
            ]
        return torch.tensor(targets, device=self.model.device)

    def _masks(self, ids: Tensor) -> Tensor:
        """Return the position (B,) of the mask token in each row of ids (B, n)."""
        return (ids == self.tokenizer.mask_token_id).int().argmax(1)

    def _columns(self, texts: list[Encoded], windows: list[list[int]]) -> dict[str, list[list[int]]]:
        """Return the model's inputs by name, each with one list for every window."""
        pairs = list(zip(texts, windows, strict=True))
        keys = [key for key in texts[0].inputs if accepts(self.called, key)]
        return {key: [[text.inputs[key][i] for i in window] for text, window in pairs] for key in keys}

    def _batch(self, texts: list[Encoded], windows: list[list[int]]) -> dict[str, Tensor]:
        """Return the model's inputs (B, n), always padded on the right so that positions start at 0."""
        width = max(len(window) for window in windows)
        fill = {"input_ids": padding_id(self.model) or 0}
        batch = {}
        for key, columns in self._columns(texts, windows).items():
            batch[key] = torch.tensor(
                [column + [fill.get(key, 0)] * (width - len(column)) for column in columns],
                device=self.model.device,
            )
        if not accepts(self.called, "attention_mask"):
            return batch
        mask = [[1] * len(window) + [0] * (width - len(window)) for window in windows]
        return batch | {"attention_mask": torch.tensor(mask, device=self.model.device)}

    def _replacing(self, windows: list[tuple[Encoded, list[int]]]) -> dict[str, Any]:
        """Return which tokens must not be replaced, (B, n), and the token id that replaces others.

        It is the tokenizer's mask token; without one the padding token, the unknown token, or the end of
        text.
        """
        width = max(len(window) for _, window in windows)
        special = [
            [text.special[i] for i in window] + [True] * (width - len(window)) for text, window in windows
        ]
        tok = self.tokenizer
        found = (tok.mask_token_id, tok.pad_token_id, tok.unk_token_id, tok.eos_token_id)
        return {
            "special_tokens_mask": torch.tensor(special, device=self.model.device),
            "replacement": next((token for token in found if token is not None), None),
        }

    def _joined(self, text: Encoded, plan: Plan, rows: list[Row]) -> dict[str, Any]:
        windows, kind, logits = plan[1], self.method.target, [row.logits for row in rows]
        if kind == "class":
            target = rows[0].target
            name = self._name(target)
        else:
            of_text = [
                None if row.target is None else window[row.target]
                for window, row in zip(windows, rows, strict=True)
            ]
            # Only the last window holds the last token of the text, which a causal model reads.
            kept = [i for i, one in enumerate(of_text) if one == of_text[-1]]
            windows, rows, target = [windows[i] for i in kept], [rows[i] for i in kept], of_text[-1]
            kind, target, name = (
                ("mean", 0, "mean") if target is None else (kind, target, text.tokens[target])
            )
            if self.options.target_span is not None:
                name = f"tokens {written(self.options.target_span)}"
        scores, log_scale = join(
            len(text.tokens), windows, [row.scores for row in rows], [row.log_scale for row in rows]
        )
        fields = dict(
            scores=scores, log_scale=log_scale, target=target, target_kind=kind, windows=text.spans(windows)
        )
        fields |= dict(target_name=name, error=_largest([row.error for row in rows]))
        if self.contrast is not None:
            fields |= dict(contrast=self.contrast, contrast_name=self._name(self.contrast))
        if logits[0] is None:
            return fields
        # The prediction comes from the mean of the windows' logits.
        return fields | predict(self.model.config, torch.stack(logits).mean(0))._asdict()

    def _name(self, index: int) -> str:
        """Return the name of a class, or of a predicted token."""
        if self.next_token or self.fills_mask:
            # The embedding table may have more rows than the tokenizer has tokens.
            return self.tokenizer.convert_ids_to_tokens(index) or str(index)
        return class_name(self.model.config, index)


def _largest(errors: list[float | None]) -> float | None:
    """Return the largest error; None if one isn't known (None, NaN or infinite)."""
    return max(errors) if all(error is not None and isfinite(error) for error in errors) else None
