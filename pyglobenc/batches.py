"""Tokenized texts through a method: their windows in padded batches, the windows' rows joined again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyglobenc.hf.limits import max_tokens
from pyglobenc.methods.registry import find_method
from pyglobenc.windows import Encoded, join

if TYPE_CHECKING:
    from pyglobenc.explain import Options

# tokenizers without a limit say so with a huge number
NO_LIMIT = 10**9


def longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: int | None) -> int | None:
    """Tokens that fit, special tokens included: what is asked for, else all that the model and the tokenizer take; None: no limit.

    Raises:
        ValueError: more asked for than the model takes.
    """
    limit = max_tokens(model)
    if asked is None:
        limits = [length for length in (limit, tokenizer.model_max_length) if length is not None and length < NO_LIMIT]
        return min(limits, default=None)
    if limit is not None and asked > limit:
        raise ValueError(f"explain: max_length must be at most {limit}, which the model takes, got {asked}")
    return asked


def check_target(runner: Runner, encoded: Encoded, name: str) -> None:
    """Raise ValueError, naming the text, if the target asked for isn't among its n tokens, or the model's classes."""
    target, kind = runner.options.target, runner.method.target
    classes = runner.model.config.num_labels
    if kind == "class" and target is not None and not 0 <= target < classes:
        raise ValueError(f"explain: target must be a class in [0, {classes}), got {target}")
    n = len(encoded.tokens)
    if kind == "token" and target is not None and not -n <= target < n:
        raise ValueError(f"explain: target must lie in [0, {n}), the tokens of {name}, or [-{n}, -1] from the end, got {target}")
    vocabulary, largest = runner.model.get_input_embeddings().num_embeddings, max(encoded.inputs["input_ids"])
    if largest >= vocabulary:
        raise ValueError(f"explain: the tokenizer isn't the model's: token id {largest}, and the model has {vocabulary} embeddings")


class Runner:
    """A method ready to run on a model.

    Raises:
        TypeError, ValueError: unknown method, or whatever the method refuses; a tokenizer that is none.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: Options):
        self.method = find_method(options.method)
        self._run = self.method.build(model, options.backend, options.dtype)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"explain: tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
        if options.merge_words and not tokenizer.is_fast:
            raise ValueError(f"explain: merge_words needs a fast tokenizer, which knows its words; got {type(tokenizer).__name__}")
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.model_name = model.name_or_path or type(model).__name__
        self.versions = {"model_dtype": str(model.dtype).split(".")[-1], "device": str(model.device)}
        self.versions |= {"torch": torch.__version__, "transformers": transformers.__version__}

    def run(self, texts: list[Encoded]) -> Iterator[dict[str, Any]]:
        """Of each text, as fields of `Attribution`: scores (n,), log_scale, target and what the model predicts."""
        jobs, waiting, done = [], 0, {}
        plans = [self._plan(text) for text in texts]
        for index, (_, windows) in enumerate(plans):
            jobs += [(index, window) for window in windows]
        for start in range(0, len(jobs), self.options.batch_size):
            batch = jobs[start : start + self.options.batch_size]
            for (index, _), row in zip(batch, self._rows(texts, plans, batch), strict=True):
                done.setdefault(index, []).append(row)
            while waiting < len(texts) and len(done.get(waiting, ())) == len(plans[waiting][1]):
                yield self._joined(texts[waiting], *plans[waiting], done.pop(waiting))
                waiting += 1

    def _plan(self, text: Encoded) -> tuple[int, list[list[int]]]:
        """The text's target, and its windows that hold it."""
        target = self.options.target
        if self.method.target == "class":
            return self._predicted_class(text) if target is None else target, text.windows
        target = (target or 0) % len(text.tokens)
        return target, [window for window in text.windows if target in window]

    def _predicted_class(self, text: Encoded) -> int:
        with torch.no_grad():
            logits = [self.model(**self._batch([text], [window])).logits[0] for window in text.windows]
        return int(torch.stack(logits).mean(0).argmax())

    def _rows(self, texts: list[Encoded], plans: list, jobs: list[tuple[int, list[int]]]) -> list[tuple]:
        """Scores of each job's window, their log_scale, and the classifier's logits or None."""
        of_class = self.method.target == "class"
        targets = [plans[index][0] if of_class else window.index(plans[index][0]) for index, window in jobs]
        batch = self._batch([texts[index] for index, _ in jobs], [window for _, window in jobs])
        rows = self._run(batch, torch.tensor(targets, device=self.model.device))
        scores, log_scale = rows.scores.detach().cpu().numpy(), rows.log_scale.tolist()
        logits = self._logits(rows.output)
        return [(scores[b, : len(window)], log_scale[b], None if logits is None else logits[b]) for b, (_, window) in enumerate(jobs)]

    def _batch(self, texts: list[Encoded], windows: list[list[int]]) -> Mapping[str, Tensor]:
        """The model's inputs (B, n), padded on the right whatever the tokenizer's side, so that a window's positions start at 0."""
        width = max(len(window) for window in windows)
        fill = {"input_ids": self.tokenizer.pad_token_id or 0}
        batch = {}
        for key in texts[0].inputs:
            columns = [[text.inputs[key][i] for i in window] for text, window in zip(texts, windows, strict=True)]
            batch[key] = torch.tensor([column + [fill.get(key, 0)] * (width - len(column)) for column in columns], device=self.model.device)
        mask = [[1] * len(window) + [0] * (width - len(window)) for window in windows]
        return batch | {"attention_mask": torch.tensor(mask, device=self.model.device)}

    def _logits(self, output: Any) -> Tensor | None:
        """Logits (B, classes) of a classifier that picks one of several classes; None for any other model."""
        config = self.model.config
        one_of_many = config.num_labels > 1 and config.problem_type in (None, "single_label_classification")
        if not type(self.model).__name__.endswith("ForSequenceClassification") or not one_of_many or output is None:
            return None
        return output.logits.detach().double().cpu()

    def _joined(self, text: Encoded, target: int, windows: list[list[int]], rows: list[tuple]) -> dict[str, Any]:
        scores, log_scale = join(len(text.tokens), windows, [row[0] for row in rows], [row[1] for row in rows])
        classes = self.model.config.id2label
        name = classes[target] if self.method.target == "class" else text.tokens[target]
        fields = dict(scores=scores, log_scale=log_scale, target=target, target_name=name, target_kind=self.method.target)
        fields["windows"] = text.spans(windows)
        if rows[0][2] is None:
            return fields
        probabilities = torch.stack([row[2] for row in rows]).mean(0).softmax(0)
        best = int(probabilities.argmax())
        return fields | {"label": classes[best], "probability": float(probabilities[best])}
