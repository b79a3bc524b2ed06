"""The published data sets, each with the function that `extract_attentions` encodes its examples by."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

# repository, configuration and split of the `datasets` library, and the columns encoded
TASKS = {
    "mnli": ("glue", "mnli", "validation_mismatched", ("premise", "hypothesis")),
    "sst2": ("glue", "sst2", "validation", ("sentence",)),
    "hatexplain": ("hatexplain", None, "validation", ("text",)),
}


class TaskLoader:
    """Data sets by name, encoded by one tokenizer.

    Args:
        tokenizer: of the model.
        count: first examples taken, None for all.
        max_length: tokens kept of an example.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, count: int | None = None, max_length: int = 128):
        self.tokenizer = tokenizer
        self.count = "" if count is None else count
        self.max_length = max_length

    def load_task(self, task: str) -> tuple[Sequence[dict[str, Any]], Callable[[int], BatchEncoding]]:
        """Data set, downloaded by the `datasets` library, and the function from an example's number to its
        tokens, a batch of 1.

        Args:
            task: "mnli", "sst2" or "hatexplain".

        Raises:
            ImportError: the `datasets` library isn't installed.
            ValueError: another task.
        """
        if task not in TASKS:
            raise ValueError(f"TaskLoader: task must be one of {', '.join(TASKS)}, got {task!r}")
        from datasets import load_dataset

        path, name, split, columns = TASKS[task]
        dataset = load_dataset(path, name, split=f"{split}[:{self.count}]")
        if task == "hatexplain":
            dataset = dataset.map(_join_posts)

        def encode(index: int) -> BatchEncoding:
            texts = [dataset[index][column] for column in columns]
            return self.tokenizer(*texts, return_tensors="pt", max_length=self.max_length, truncation=True)

        return dataset, encode


def _join_posts(example: dict[str, Any]) -> dict[str, Any]:
    """The words as one text, and the label that most annotators gave."""
    labels = example["annotators"]["label"]
    return {**example, "text": " ".join(example["post_tokens"]), "label": max(set(labels), key=labels.count)}
