"""Tokenized texts through a method: their windows in padded batches, the windows' rows joined again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyglobenc.backends.shared.launch import HALF
from pyglobenc.hf.labels import class_count, class_name, predict
from pyglobenc.hf.limits import max_tokens, padding_id, vocabulary
from pyglobenc.hf.unwrap import called_module, stock_model
from pyglobenc.inputs.batching import fitting_batch, in_batches
from pyglobenc.inputs.windows import Encoded, join
from pyglobenc.methods.arguments import accepts, run_model
from pyglobenc.methods.head import find_logits
from pyglobenc.methods.inputs import require_finite
from pyglobenc.methods.packing import check_packable
from pyglobenc.methods.registry import find_method

if TYPE_CHECKING:
    from pyglobenc.inputs.options import Options

# ends of the names of models whose logits are not of classes of the whole text
OTHER_HEADS = (
    "TokenClassification",
    "QuestionAnswering",
    "MultipleChoice",
    "MaskedLM",
    "CausalLM",
    "LMHeadModel",
)
# tokenizers without a limit say so with a huge number
NO_LIMIT = 10**9


def longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: int | None) -> int | None:
    """Tokens that fit, special tokens included: what is asked for, else all that the model and the tokenizer
    take; None: no limit.

    Raises:
        ValueError: more asked for than the model takes.
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


def check_target(runner: Runner, encoded: Encoded, name: str) -> None:
    """Raise ValueError, naming the text, if the target asked for isn't among its n tokens, or the model's
    classes.
    """
    target, kind = runner.options.target, runner.method.target
    # how many classes a user's module has is known from its logits alone, and a base model has none
    known_head = isinstance(runner.called, PreTrainedModel) and runner.called is not runner.called.base_model
    classes = class_count(runner.model) if known_head else None
    if kind == "class" and target is not None and classes is not None and not 0 <= target < classes:
        raise ValueError(f"explain: target must be a class in [0, {classes}), got {target}")
    n = len(encoded.tokens)
    if kind == "token" and isinstance(target, int) and not -n <= target < n:
        raise ValueError(
            f"explain: target must lie in [0, {n}), the tokens of {name}, or [-{n}, -1] from the end, got "
            f"{target}"
        )
    known, largest = vocabulary(runner.model), max(encoded.inputs["input_ids"])
    if largest >= known:
        raise ValueError(
            f"explain: the tokenizer isn't the model's: token id {largest}, and the model has {known} "
            f"embeddings"
        )


# the target of one text (None: what the method itself takes), followed by the windows that contain it
Plan = tuple[int | str | None, list[list[int]]]


class Row(NamedTuple):
    """What a window's computation gave."""

    scores: np.ndarray  # as long as the window
    log_scale: float
    target: int | None  # class, or position in the window; None for a mean over tokens
    logits: Tensor | None  # (classes,) of a classifier


class Runner:
    """A method ready to run on a model.

    Raises:
        TypeError, ValueError: unknown method, or whatever the method refuses; a tokenizer that is none.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Options):
        self.method = find_method(options.method)
        self._run = self.method.build(model, options.backend, options.dtype)
        self.called = called_module(model)
        model = stock_model(self.called)
        if model.main_input_name != "input_ids":
            raise ValueError(f"explain: {type(model).__name__} takes {model.main_input_name}, not text")
        if self.method.target == "class" and options.target == "mean":
            raise TypeError(
                f"explain: {options.method} explains a class; target must be its index, got 'mean'"
            )
        if (
            self.method.target == "class"
            and self.called is model
            and type(model).__name__.endswith(OTHER_HEADS)
        ):
            raise ValueError(
                f"explain: {options.method} explains a class of the whole text, and {type(model).__name__} "
                f"has logits for every token "
                "or choice; TransformerAttribution explains them (target=, position=), and methods with a "
                f"token target, such as globenc, "
                "explain its tokens"
            )
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(
                f"explain: tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}"
            )
        # what transformers makes where the tokenizer's files are missing
        special = set(tokenizer.all_special_tokens)
        # the whole vocabulary takes longer than a short text's forward pass
        if len(tokenizer) <= len(special) and special.issuperset(tokenizer.get_vocab()):
            raise ValueError("explain: the tokenizer has no vocabulary; were its files saved with the model?")
        if options.merge_words and not tokenizer.is_fast:
            raise ValueError(
                f"explain: merge_words needs a fast tokenizer, which knows its words; got "
                f"{type(tokenizer).__name__}"
            )
        self.model, self.tokenizer, self.options = model, tokenizer, options
        # inspected only where packing is wanted: that takes a part of a short text's forward pass
        why_padded = None if options.packed is False else self._why_padded()
        if options.packed and why_padded:
            raise ValueError(why_padded)
        # of torch's attention for packed sequences a GPU has half precision alone; without it each length
        # takes a call of its own. A class is explained in padded batches, whose error is estimated and warned
        # of, unless asked otherwise
        pays = (self.model.device.type == "cpu" or self.model.dtype in HALF) and self.method.target == "token"
        self.packed = why_padded is None and (pays if options.packed is None else options.packed)
        # without a padding id, or a mask that tells padding, texts of different lengths have no batch
        self.batches = self.packed or (
            padding_id(self.model) is not None and accepts(self.called, "attention_mask")
        )
        self.model_name = model.name_or_path or type(model).__name__
        self.versions = {"model_dtype": str(model.dtype).split(".")[-1], "device": str(model.device)}
        self.versions |= {"torch": torch.__version__, "transformers": transformers.__version__}

    def _why_padded(self) -> str | None:
        """Why texts can't be packed, or None."""
        if not self.method.supports_packing:
            return f"explain: {self.method.name} takes no packed texts"
        try:
            check_packable("explain", self.called)
        except ValueError as error:
            return str(error)
        return None

    def run(self, texts: list[Encoded]) -> Iterator[dict[str, Any]]:
        """Of each text, as fields of `Attribution`: scores (n,), log_scale, target, windows and what the
        model predicts.
        """
        jobs, waiting, done = [], 0, defaultdict(list)
        plans = [self._plan(text) for text in texts]
        for index, (_, windows) in enumerate(plans):
            jobs += [(index, window) for window in windows]
        width, options = max((len(window) for _, window in jobs), default=0), self.options
        most = min(options.batch_size, len(jobs)) if self.batches else 1
        size = fitting_batch(self.model, width, most, options.method, options.dtype)
        for (index, _), row in in_batches(lambda batch: self._rows(texts, plans, batch), jobs, size):
            done[index].append(row)
            while waiting < len(texts) and len(done[waiting]) == len(plans[waiting][1]):
                yield self._joined(texts[waiting], plans[waiting], done.pop(waiting))
                waiting += 1

    def _plan(self, text: Encoded) -> Plan:
        target = self.options.target
        if self.method.target == "token":
            if isinstance(target, int):
                target %= len(text.tokens)
            return target, [
                window for window in text.windows if not isinstance(target, int) or target in window
            ]
        if target is None and len(text.windows) > 1:
            # all windows explain one class
            target = self._predict(text)
        return target, text.windows

    @torch.no_grad()
    def _predict(self, text: Encoded) -> int:
        """The class with the largest logit, averaged over windows."""
        logits = []
        for window in text.windows:
            found = find_logits(run_model(self.called, self._batch([text], [window])))
            if found is None or found.dim() != 2:
                raise ValueError(f"explain: {type(self.called).__name__} has no head that classifies texts")
            logits.append(found[0])
        return int(torch.stack(logits).mean(0).argmax())

    def _rows(self, texts: list[Encoded], plans: list[Plan], jobs: list[tuple[int, list[int]]]) -> list[Row]:
        """One for each job, a text's index and a window."""
        arrange = self._columns if self.packed else self._batch
        batch = arrange([texts[index] for index, _ in jobs], [window for _, window in jobs])
        rows = self._run(batch, self._targets(texts, plans, jobs))
        scores, log_scale = rows.scores.detach().cpu().numpy(), rows.log_scale.tolist()
        logits, targets = (
            [None] * len(jobs),
            [None] * len(jobs) if rows.targets is None else rows.targets.tolist(),
        )
        if rows.logits is not None and rows.logits.shape[:-1] == (len(jobs),):
            # a weight that is NaN may reach the class and not the scores
            require_finite("explain", self.called, (rows.logits,))
            logits = list(rows.logits.detach().double().cpu())
        return [
            Row(scores[b, : len(window)], log_scale[b], targets[b], logits[b])
            for b, (_, window) in enumerate(jobs)
        ]

    def _targets(
        self, texts: list[Encoded], plans: list[Plan], jobs: list[tuple[int, list[int]]]
    ) -> Tensor | str | None:
        """(B,) int64, "mean", or None where the method itself takes every target."""
        targets = [plans[index][0] for index, _ in jobs]
        if self.options.target == "mean":
            return "mean"
        if self.method.target == "token" and self.options.target is not None:
            targets = [window.index(target) for target, (_, window) in zip(targets, jobs, strict=True)]
        elif all(target is None for target in targets):
            return None
        else:
            targets = [
                self._predict(texts[index]) if target is None else target
                for target, (index, _) in zip(targets, jobs, strict=True)
            ]
        return torch.tensor(targets, device=self.model.device)

    def _columns(self, texts: list[Encoded], windows: list[list[int]]) -> dict[str, list[list[int]]]:
        """The model's inputs, a list for each window."""
        pairs = list(zip(texts, windows, strict=True))
        keys = [key for key in texts[0].inputs if accepts(self.called, key)]
        return {key: [[text.inputs[key][i] for i in window] for text, window in pairs] for key in keys}

    def _batch(self, texts: list[Encoded], windows: list[list[int]]) -> dict[str, Tensor]:
        """The model's inputs (B, n), padded on the right whatever the tokenizer's side, so that a window's
        positions start at 0.
        """
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

    def _joined(self, text: Encoded, plan: Plan, rows: list[Row]) -> dict[str, Any]:
        windows, kind, logits = plan[1], self.method.target, [row.logits for row in rows]
        if kind == "class":
            target, name = rows[0].target, class_name(self.model.config, rows[0].target)
        else:
            of_text = [
                None if row.target is None else window[row.target]
                for window, row in zip(windows, rows, strict=True)
            ]
            # a causal model reads the text's last token in the last window alone
            kept = [i for i, one in enumerate(of_text) if one == of_text[-1]]
            windows, rows, target = [windows[i] for i in kept], [rows[i] for i in kept], of_text[-1]
            kind, target, name = (
                ("mean", 0, "mean") if target is None else (kind, target, text.tokens[target])
            )
        scores, log_scale = join(
            len(text.tokens), windows, [row.scores for row in rows], [row.log_scale for row in rows]
        )
        fields = dict(
            scores=scores, log_scale=log_scale, target=target, target_kind=kind, windows=text.spans(windows)
        )
        fields["target_name"] = name
        if logits[0] is None:
            return fields
        # windows vote with their logits
        return fields | predict(self.model.config, torch.stack(logits).mean(0))._asdict()
