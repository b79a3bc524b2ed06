"""`pyglobenc evaluate` measures attribution methods on a model and data, and can be resumed."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyglobenc.cli.options import add_arithmetic, add_model, dtype_named, listed, natural, positive
from pyglobenc.common.characters import printable
from pyglobenc.common.files import write_file
from pyglobenc.evaluate.choices import ALL, FRACTIONS, LABEL, PROTOCOLS
from pyglobenc.evaluate.examples import REMOVALS
from pyglobenc.evaluate.metrics import METRICS
from pyglobenc.evaluate.readers.highlights import FORMATS
from pyglobenc.evaluate.readers.images import ImageData, read_gtsegs, read_image_folder
from pyglobenc.evaluate.table import EvaluationTable

NAME = "evaluate"
HELP = "measure which attribution method is faithful to a model, on your data; a stopped job can be resumed"
# Enough for a GPU; on a CPU the size matters little.
BATCH_TOKENS = 4096
DEFAULT_MODEL = "minilm-sst2"
# The files that are written into the output folder.
TABLE, PER_TEXT, CURVES, PAGE = "table.csv", "per_text.parquet", "curves.png", "index.html"


def names(text: str) -> str | list[str]:
    """Return the names in an option's text, which are separated by commas; "all" stays as it is."""
    return text if text == ALL else listed(text)


def shares(text: str) -> list[float]:
    """Return the numbers in an option's text, which are separated by commas."""
    return [float(part) for part in text.split(",")]


def class_or_label(text: str) -> int | str:
    """Return the target in an option's text: an index, or a name."""
    return int(text) if text.isdecimal() else text


def words_or_share(text: str) -> int | float:
    """Return the number of words in an option's text, or a share of them."""
    return int(text) if text.isdecimal() else float(text)


# argparse names the type in its error messages.
names.__name__, shares.__name__, class_or_label.__name__ = "list of names", "list of numbers", "class"
words_or_share.__name__ = "number of words, or share of them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.epilog = (
        f"The folder gets {TABLE}, {PER_TEXT}, {CURVES} and {PAGE}. Run the same command again to resume a "
        "stopped job. The definitions of the metrics are in docs/evaluate.md."
    )
    _add_images(parser)
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="the texts: .txt, .csv, .tsv, .jsonl, .parquet, or a folder saved by datasets; or a data set "
        "with human highlights, see --format",
    )
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        help="the input is a data set with human highlights: the folder of ERASER's annotations and "
        "documents, or HateXplain's dataset.json",
    )
    parser.add_argument(
        "--split", help="train, val or test of such a data set (default: test for eraser, else all posts)"
    )
    parser.add_argument(
        "--label-names",
        type=names,
        help="what the data calls the model's classes, in their order, separated by commas (default: as the "
        "model does)",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for the results; created if missing"
    )
    parser.add_argument(
        "--column", help="column or key that holds the text (default: text, sentence, or the only one)"
    )
    parser.add_argument("--label-column", help="column or key that holds the true class, as index or name")
    parser.add_argument(
        "--answer-column",
        help="for a language model: column or key that holds the text whose probability after the prompt is "
        "explained (default: the next token)",
    )
    parser.add_argument(
        "--no-header",
        action="store_true",
        help="the .csv or .tsv file has no column names; --column is a number that starts at 0",
    )
    parser.add_argument("--limit", type=positive, help="use the first LIMIT texts alone")
    add_model(parser, DEFAULT_MODEL, "which is a PyPI package with a sentiment head")
    parser.add_argument(
        "--methods",
        type=names,
        default="globenc,transformer-attribution,random",
        help="methods, separated by commas, or all (default: %(default)s); `pyglobenc methods` lists them",
    )
    parser.add_argument(
        "--metrics",
        type=names,
        default="comprehensiveness,sufficiency",
        help="metrics, separated by commas, or all (default: %(default)s); 'help' lists them",
    )
    parser.add_argument(
        "--top-k",
        type=words_or_share,
        help="words that are compared with the highlights: a number, or a share of the text below 1 "
        "(default: as many as are highlighted)",
    )
    _add_settings(parser)
    add_arithmetic(parser, dtype=": float64 for methods that propagate relevance, else float32")
    parser.add_argument("--quiet", action="store_true", help="print no table and no progress")


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="evaluate images instead of texts: a folder of images, or ImageNet-Segmentation's file "
        "gtsegs_ijcv.mat, which holds masks too; --model must be an image model",
    )
    parser.add_argument(
        "--masks",
        metavar="DIR",
        help="folder with the true segmentation of each image, under the same name but for the suffix; every "
        "value but 0 is the object",
    )
    parser.add_argument(
        "--labels", metavar="FILE", help="CSV file with the columns name (of an image's file) and label"
    )
    parser.add_argument(
        "--start-layer",
        type=natural,
        help="lowest layer of transformer-attribution's rollout, for images (default 0, or as the protocol "
        "says)",
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fractions",
        type=shares,
        default=list(FRACTIONS),
        help=f"fractions of a text that are removed, separated by commas (default {_listed(FRACTIONS)})",
    )
    parser.add_argument(
        "--remove",
        choices=REMOVALS,
        default="mask",
        help="replace removed tokens by the mask token (default), delete them, or hide them by the attention "
        "mask",
    )
    parser.add_argument("--words", action="store_true", help="remove whole words instead of tokens")
    parser.add_argument(
        "--target",
        type=class_or_label,
        help="class that is explained: an index, a name, or label for the true class (default: the "
        "predicted class)",
    )
    parser.add_argument(
        "--protocol", choices=list(PROTOCOLS), help="require the settings of a published protocol"
    )
    parser.add_argument(
        "--sanity",
        action="store_true",
        help="also make the weights random, layer by layer from the top, and correlate the scores",
    )
    parser.add_argument(
        "--long",
        choices=("error", "truncate"),
        default="error",
        help="what to do with a text that is too long: refuse it (default), or cut it",
    )
    parser.add_argument(
        "--max-length",
        type=positive,
        help="largest number of tokens, special tokens included (default: the model's limit)",
    )
    parser.add_argument(
        "--bootstrap",
        type=natural,
        default=1000,
        help="resamples for the intervals (default 1000; 0: none)",
    )
    parser.add_argument(
        "--seed", type=natural, default=0, help="seed of everything that is random (default 0)"
    )
    parser.add_argument(
        "--batch-tokens",
        type=positive,
        default=BATCH_TOKENS,
        help=f"tokens in a batch, padding included (default {BATCH_TOKENS})",
    )


def _listed(numbers: tuple[float, ...]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def run(options: argparse.Namespace) -> int:
    """Run the evaluation, write its files, and return the exit status."""
    from pyglobenc.cli.outputs import check_output_folder
    from pyglobenc.scale.corpus.records import load_arrow, open_source

    if options.metrics == ["help"]:
        for name, metric in METRICS.items():
            print(f"{name}: {metric.summary}")
        return 0
    # Without Arrow the numbers of each text couldn't be written.
    load_arrow()
    if (options.input is None) == (options.images is None):
        options.error("give either texts with --input or images with --images")
    if options.images is not None:
        data = _read_images(options)
        indices, table = list(range(len(data.names))), _evaluate_images(options, data)
    elif wrong := [name for name in ("masks", "labels", "start_layer") if getattr(options, name) is not None]:
        options.error(f"--{wrong[0].replace('_', '-')} belongs to --images")
    elif options.format is None:
        if options.split is not None:
            raise ValueError("--split belongs to --format")
        source = open_source(options.input, options.column, not options.no_header)
        check_output_folder(options.output, options.model, source.places())
        indices, given = _read(options, source)
    else:
        check_output_folder(options.output, options.model, (options.input,))
        given = _read_highlights(options)
        indices = list(range(len(given["texts"])))
    if options.images is None:
        table = _evaluate(options, given)
    folder = Path(options.output)
    table.to_csv(folder / TABLE)
    write_file(folder / PER_TEXT, _parquet(table, indices))
    table.to_png(folder / CURVES)
    table.to_html(folder / PAGE)
    if not options.quiet:
        table.show()
        passes = table.info["forward_passes"]
        if passes["seconds"]:
            rate = (
                f"{passes['per_second']:.4g} a second, {passes['share_of_plain_rate']:.0%} of the model's own"
            )
            counts = f"{passes['done']:.0f} forward passes for {passes['asked']:.0f} masked copies"
            print(f"{counts}, {rate} rate", file=sys.stderr)
    return 0


def _read(options: argparse.Namespace, source: Any) -> tuple[list[int], dict[str, list[Any]]]:
    """Return the numbers of the records that hold a text, and their texts, labels and answers by name.

    Labels and answers are there if the options name their columns.
    """
    from pyglobenc.scale.corpus.records import open_source

    columns = {"labels": options.label_column, "answers": options.answer_column}
    readers: dict[str, Iterator[Any]] = {
        name: open_source(options.input, column, not options.no_header, texts=name == "answers").values()
        for name, column in columns.items()
        if column is not None
    }
    indices, texts, reasons = [], [], []
    found: dict[str, list[Any]] = {"texts": texts} | {name: [] for name in readers}
    for record in source.records():
        values = {name: next(reader, None) for name, reader in readers.items()}
        if record.text is None:
            reasons.append(f"record {record.index}: {record.reason}")
            continue
        for name, value in values.items():
            if value is None or isinstance(value, Exception):
                raise ValueError(f"{options.input}: record {record.index} has no {name[:-1]}: {value}")
            found[name].append(value)
        indices.append(record.index)
        texts.append(record.text)
        if options.limit is not None and len(texts) == options.limit:
            break
    if not texts:
        raise ValueError(f"{options.input}: holds no text" + "".join(f" ({r})" for r in reasons[:1]))
    if reasons:
        said = f"{len(reasons)} records are left out, the first one: {reasons[0]}"
        print(printable(f"pyglobenc: {said}"), file=sys.stderr)
    return indices, found


def _read_images(options: argparse.Namespace) -> ImageData:
    """Return the images, masks and labels that the options name, and check the output."""
    from pyglobenc.cli.outputs import check_output_folder

    names = ("format", "split", "label_names", "column", "label_column")
    names += ("answer_column", "no_header", "model_dtype")
    if wrong := [name for name in names if getattr(options, name)]:
        options.error(f"--{wrong[0].replace('_', '-')} belongs to texts, not to --images")
    if options.model == DEFAULT_MODEL:
        options.error("--images: name an image model with --model")
    read = [path for path in (options.images, options.masks, options.labels) if path is not None]
    check_output_folder(options.output, options.model, read)
    if not options.images.endswith(".mat"):
        data = read_image_folder(options.images, options.masks, options.labels)
    elif options.masks is None and options.labels is None:
        data = read_gtsegs(options.images, options.limit)
    else:
        options.error("--masks and --labels belong to a folder of images; the .mat file holds its masks")
    parts = (data.names, data.images, data.masks, data.labels)
    return ImageData(*(None if part is None else part[: options.limit] for part in parts))


def _evaluate_images(options: argparse.Namespace, data: ImageData) -> EvaluationTable:
    # These imports take seconds.

    from pyglobenc.evaluate import evaluate
    from pyglobenc.models.pretrained import load_image_model

    model, processor = load_image_model(options.model, options.device, None, options.trust_remote_code)
    return evaluate(
        model,
        processor=processor,
        images=data.images,
        masks=data.masks,
        labels=data.labels,
        start_layer=options.start_layer,
        dtype=dtype_named(options.dtype),
        progress=not options.quiet,
        **_given(options),
    )


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `evaluate` that options of the same name give."""
    names = ("methods", "metrics", "top_k", "fractions", "remove", "words", "target", "protocol", "sanity")
    names += ("long", "max_length", "bootstrap", "seed", "batch_tokens", "backend", "output")
    return {name: getattr(options, name) for name in names}


def _read_highlights(options: argparse.Namespace) -> dict[str, list[Any]]:
    """Return the texts, rationales and labels of a data set by name; no labels if nothing reads them."""
    for name in ("column", "label_column", "answer_column", "no_header"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} doesn't belong to --format")
    split = {} if options.split is None else {"split": options.split}
    found = FORMATS[options.format](options.input, **split)
    for reason, count in found.left_out.items():
        print(f"pyglobenc: {count} records are left out: {reason}", file=sys.stderr)
    given = {"texts": found.texts[: options.limit], "rationales": found.rationales[: options.limit]}
    # The data may name its classes otherwise than the model, which matters only if they are explained.
    gold = PROTOCOLS.get(options.protocol, {}).get("target") == LABEL
    if options.target == LABEL or gold or options.label_names:
        given["labels"] = found.labels[: options.limit]
    return given


def _class_indices(labels: list[Any], label_names: list[str]) -> list[int]:
    """Return the index of each label among the names."""
    for number, label in enumerate(labels):
        if label not in label_names:
            raise ValueError(f"label {label!r} of text {number} isn't one of {', '.join(label_names)}")
    return [label_names.index(label) for label in labels]


def _evaluate(options: argparse.Namespace, given: dict[str, list[Any]]) -> EvaluationTable:
    """Evaluate texts, with the labels, answers and highlights that are given by name."""
    # These imports take seconds.
    from pyglobenc.evaluate import evaluate
    from pyglobenc.models.pretrained import load_pretrained

    model, tokenizer = load_pretrained(
        options.model, dtype_named(options.model_dtype), options.device, options.trust_remote_code
    )
    if options.label_names and "labels" in given:
        given["labels"] = _class_indices(given["labels"], options.label_names)
    return evaluate(
        model,
        tokenizer,
        **given,
        dtype=dtype_named(options.dtype),
        progress=not options.quiet,
        **_given(options),
    )


def _parquet(table: EvaluationTable, indices: list[int]) -> bytes:
    """Return a Parquet file with the columns index, method, metric and value, null for a text left out."""
    import io

    from pyglobenc.scale.corpus.records import load_arrow

    arrow = load_arrow()
    columns: dict[str, list[Any]] = {"index": [], "method": [], "metric": [], "value": []}
    for (method, metric), values in table.per_text.items():
        columns["index"] += indices
        columns["method"] += [method] * len(indices)
        columns["metric"] += [metric] * len(indices)
        columns["value"] += [None if value != value else value for value in values.tolist()]
    types = {"index": arrow.int64(), "method": arrow.string(), "metric": arrow.string()}
    schema = arrow.schema([*types.items(), ("value", arrow.float64())])
    buffer = io.BytesIO()
    arrow.parquet.write_table(arrow.table(columns, schema=schema), buffer)
    return buffer.getvalue()
