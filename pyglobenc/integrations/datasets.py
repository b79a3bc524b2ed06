"""Attribution of batches of texts, for `datasets.Dataset.map` and for `ray.data.Dataset.map_batches`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyglobenc.common.arguments import refuse_unknown
from pyglobenc.scale.corpus.job import (
    attribute_records,
    check_facts,
    default_batch_tokens,
    load_runner,
    make_runner,
    runner_facts,
    score_dtype,
    try_settings,
)
from pyglobenc.scale.corpus.records import check_texts, choose_column, load_arrow, make_record
from pyglobenc.scale.corpus.shards import table_of

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The options of `pyglobenc.explain` that `pyglobenc attribute` has too.
OPTIONS = ("method", "target", "start_layer", "long", "max_length", "stride", "backend", "dtype", "packed")


class Attributor:
    """Function of a batch that attributes its texts and returns the columns of `pyglobenc attribute`.

    It is given to `datasets.Dataset.map(..., batched=True)`, or its class to
    `ray.data.Dataset.map_batches(Attributor, fn_constructor_kwargs=...)`. A copy in another process loads the
    model again, and checks that it is the same one.

    Args:
        model: name of a model as for `pyglobenc attribute --model`, or a loaded model.
        tokenizer: tokenizer of a loaded model; None for a name.
        column: the column that holds the texts. None means "text", "sentence" or the only column.
        keep: columns whose values the column `input` of the result keeps, as strings.
        batch_tokens: the most tokens, with padding, that the model gets at once. None: 1,024 on a CPU and
            16,384 on a GPU.
        loading: for a name: model_dtype, device and trust_remote_code, as for `load_pretrained`; and options
            of `pyglobenc.explain`: method, target, start_layer, long, max_length, stride, backend and dtype;
            and packed, as for `pyglobenc attribute`.

    Raises:
        TypeError, ValueError: an option is unknown or doesn't fit, or the method refuses the model.
        ImportError: pyarrow isn't installed.
    """

    def __init__(
        self,
        model: str | PreTrainedModel = "minilm",
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        column: str | None = None,
        keep: Sequence[str] = (),
        batch_tokens: int | None = None,
        **loading: Any,
    ):
        named = isinstance(model, str)
        known = (*OPTIONS, "model_dtype", "device", "trust_remote_code") if named else OPTIONS
        refuse_unknown("Attributor", loading.keys() - set(known), known)
        if named != (tokenizer is None):
            raise TypeError("Attributor: a loaded model needs its tokenizer, and a name takes none")
        load_arrow()
        settings = {"packed": None} | loading
        self.runner = load_runner(model, **settings) if named else make_runner(model, tokenizer, **settings)
        try_settings(self.runner)
        self.column, self.keep = column, tuple(keep)
        self._facts = runner_facts(self.runner)
        found = self._facts["settings"]
        self.batch_tokens = batch_tokens or default_batch_tokens(found["device"])
        dtype = score_dtype(self.runner.options.record()["dtype"], found["model_dtype"])
        self._common = {"method": self.runner.options.method, "model": self._facts["model"]["sha256"]}
        self._common |= {"dtype": dtype, "keep": self.keep}
        self._arguments = (
            (model, tokenizer),
            loading
            | {
                "column": column,
                "keep": self.keep,
                "batch_tokens": batch_tokens,
            },
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # `datasets` finds cached results by the SHA of this, so it holds the fingerprint of the weights.
        return _copy, (*self._arguments, self._facts)

    def __call__(
        self, batch: pyarrow.Table | Mapping[str, Any], indices: Sequence[int] | None = None
    ) -> pyarrow.Table:
        """Attribute the texts of a batch.

        Args:
            batch: B rows: a table, or the values of each column by name.
            indices: numbers of the rows, as `datasets` gives them. None: the values of the column `index`, if
                there is one.

        Returns:
            Table of B rows in the same order: the columns of `pyglobenc attribute`, with `index` if the
            numbers are known; and `reason`, which says why a row was left out, and is null for the others.

        Raises:
            TypeError, ValueError: the batch is no table, or there is no such column of texts.
        """
        arrow = load_arrow()
        if not isinstance(batch, arrow.Table):
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"Attributor: the batch must be a table of pyarrow or map names to columns, got "
                    f"{type(batch).__name__}"
                )
            batch = arrow.table(dict(batch.items()))
        name = choose_column("Attributor", batch.column_names, self.column)
        check_texts("Attributor", batch.schema.field(name))
        for one in self.keep:
            choose_column("Attributor", batch.column_names, one)
        if indices is None and "index" in batch.column_names:
            indices = batch["index"].to_pylist()
        kept = [{one: row[one] for one in self.keep} for row in batch.select(self.keep).to_pylist()]
        texts = batch[name].to_pylist()
        records = [
            make_record(number, text, kept[number] if kept else {}, self._facts["most"])
            for number, text in enumerate(texts)
        ]
        rows, rejected = attribute_records(self.runner, records, self.batch_tokens)
        found: list[dict[str, Any]] = [{} for _ in texts]
        for row in rows:
            found[row["index"]] = row | {"reason": None}
        for entry in rejected:
            number = entry["index"]
            found[number] = {"text": texts[number], "input": records[number].kept, "reason": entry["reason"]}
        for number, row in enumerate(found):
            row["index"] = None if indices is None else indices[number]
        table = table_of(found, self._common)
        table = table.append_column("reason", arrow.array([row["reason"] for row in found], arrow.string()))
        return table.drop_columns(["index"]) if indices is None else table


def _copy(arguments: tuple[Any, ...], options: dict[str, Any], facts: dict[str, Any]) -> Attributor:
    copy = Attributor(*arguments, **options)
    check_facts(copy.runner, facts)
    return copy
