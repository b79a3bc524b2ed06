"""Loads the published data sets, each with the function that encodes its examples."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

# Each task has a repository, a configuration and a split of the `datasets` library, and the encoded columns.
TASKS = {
    "mnli": ("glue", "mnli", "validation_mismatched", ("premise", "hypothesis")),
    "sst2": ("glue", "sst2", "validation", ("sentence",)),
    "hatexplain": ("hatexplain", None, "validation", ("text",)),
}


class TaskLoader:
    """Loads data sets by name and encodes them with one tokenizer.

    Args:
        tokenizer: the tokenizer of the model.
        count: number of examples to take from the start; None for all.
        max_length: examples with more tokens are truncated to this number.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, count: int | None = None, max_length: int = 128):
        self.tokenizer = tokenizer
        self.count = "" if count is None else count
        self.max_length = max_length

    def load_task(self, task: str) -> tuple[Sequence[dict[str, Any]], Callable[[int], BatchEncoding]]:
        """Load a data set with the `datasets` library, which may download it.

        Args:
            task: "mnli", "sst2" or "hatexplain".

        Returns:
            The data set, and a function that maps the number of an example to its tokens, for a batch of 1.

        Raises:
            ImportError: the `datasets` library is not installed.
            ValueError: the task is unknown.
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
    """Return the example with its words joined to one text, and the label that most annotators gave."""
    labels = example["annotators"]["label"]
    return {**example, "text": " ".join(example["post_tokens"]), "label": max(set(labels), key=labels.count)}
