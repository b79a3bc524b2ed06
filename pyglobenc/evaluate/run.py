"""The function `evaluate`: it attributes texts by several methods, and measures each method by metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyglobenc.common.arguments import known_arguments
from pyglobenc.evaluate.choices import (
    ALL,
    FRACTIONS,
    MAX_RESAMPLES,
    USUAL_METRICS,
    check_count,
    check_kind,
    check_lists,
    check_protocol,
    choose_metrics,
    make_settings,
    wanted_methods,
)
from pyglobenc.evaluate.examples import Example, Metric, Settings, Span
from pyglobenc.evaluate.kept import Arrays, Kept, kept_steps
from pyglobenc.evaluate.metrics.rationales import with_rationales
from pyglobenc.evaluate.table import EvaluationTable
from pyglobenc.inputs.pipelines import takes_pipelines
from pyglobenc.inputs.windows import Text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pyglobenc.evaluate.attributions import Attributed, Attributor
    from pyglobenc.evaluate.forwards import Forwards

# Masked copies of about this many tokens are in memory at a time.
PORTION = 1 << 22
# What is counted of the forward passes.
COUNTS = ("asked", "done", "seconds", "in_model")


@takes_pipelines
@known_arguments
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: Sequence[Text] | None = None,
    *,
    images: Sequence[Any] | None = None,
    processor: Any = None,
    masks: Sequence[Any] | None = None,
    methods: str | Sequence[str] = ("globenc", "transformer-attribution", "random"),
    metrics: str | Sequence[str] = USUAL_METRICS,
    fractions: Sequence[float] = FRACTIONS,
    remove: str = "mask",
    words: bool = False,
    target: int | str | None = None,
    labels: Sequence[int | str] | None = None,
    rationales: Sequence[Sequence[Span] | None] | None = None,
    top_k: int | float | None = None,
    answers: Sequence[str] | None = None,
    needles: Sequence[Sequence[Span] | None] | None = None,
    start_layer: int | None = None,
    protocol: str | None = None,
    sanity: bool = False,
    long: str = "error",
    max_length: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    batch_tokens: int = 4096,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    output: str | Path | None = None,
    progress: bool = True,
) -> EvaluationTable:
    """Measure how faithful attribution methods are to a model, on data.

    Args:
        model: a transformers model or a pipeline, as for `pyglobenc.explain`.
        tokenizer: the model's tokenizer.
        texts: texts, or pairs of texts as tuples.
        images: instead of texts, a list of what `pyglobenc.explain_image` takes, or of names of files. All of
            what is said of texts holds for images. Their units are the pixels of the model's input. A
            removed pixel is black. Scores of patches are interpolated to the pixels (bilinearly).
        processor: the model's image processor; None if the images are the model's input, in which a removed
            pixel is 0.
        masks: the true segmentation of each image, of the image's size: a file or a PIL image, in which every
            value but 0 is the object; or (height, width) with 1 for the object, 0 for the rest and -1 for
            pixels that don't count. They are resized to the nearest pixels.
        methods: names in `pyglobenc.methods.registry.METHODS`, "random" (the mean of 10 random rankings), or
            "all". "all" leaves out methods that refuse the model.
        metrics: names in METRICS, or "all". "all" leaves out metrics that lack what they need.
        fractions: the fractions of a text's units that are removed or kept. A fraction of m units is rounded
            up, and is at least 1 unit. Units are tokens or words. Special tokens are never removed, and
            neither is the unit of the token that the head reads.
        remove: how units are removed. "mask" replaces their tokens by the mask token; a tokenizer without one
            gets "delete" instead, with a note. "delete" takes the tokens out. "pad" hides them through the
            attention mask.
        words: units are words, with the sum of their tokens' scores.
        target: the class that is explained: its index, "label" for the text's own label, or None for the
            class predicted on the whole text.
        labels: the true class of each text, as an index or a name of the model's config.
        rationales: for each text, the characters that people marked as the reason for its label: a list of
            pairs (start, stop), or None. `pyglobenc.evaluate.readers` reads published data sets.
        top_k: how many words are compared with the rationale: a number of words; a share of the text's words
            as a float below 1; or None for as many words as the text's rationale holds.
        answers: for a language model, the text that follows each of the texts; the probability of all its
            tokens is explained. None: that of the next token, which is the most probable one, or the id that
            `target` names.
        needles: for each text, the characters that the answer is known to depend on: a list of pairs (start,
            stop), or None.
        start_layer: for images, the lowest layer of transformer attribution's rollout. None: 0, or 1 where
            the protocol says so.
        protocol: name of a published protocol in PROTOCOLS. It sets the arguments that are left at their
            defaults, and refuses other values of these.
        sanity: also make the weights of a copy of the model random, from the head downwards, and correlate
            the scores with the model's own. The rows sanity.1, sanity.2 and so on hold Spearman correlations.
        long: what happens to a text of more than max_length tokens: "error" or "truncate".
        max_length: largest number of tokens, special tokens included. None: the limit of model and tokenizer.
        bootstrap: number of resamples for the 95 % intervals; 0 for none.
        seed: makes the resamples, the random rankings and the order of equal scores the same in every call.
        batch_tokens: the most tokens, with padding, that the model gets at once. One text may have more. On a
            CPU batches have at most 512 tokens, because larger ones are slower there.
        backend: as for `GlobEnc`.
        dtype: dtype of the attributions. None: float64 for methods that propagate relevance (transformer
            attribution and its relatives), and of images for all that explain a class; else their default.
        output: folder where finished steps are kept. The same call goes on where it was stopped.
        progress: show progress bars on stderr.

    Returns:
        EvaluationTable, with a row for each method and metric, and (texts,) float64 numbers for each of them.

    Raises:
        TypeError, ValueError: an argument is invalid, a metric lacks what it needs, a method refuses the
            model or every text, or the output folder belongs to another evaluation.
    """
    # These imports take seconds.
    from pyglobenc.evaluate.kinds.answers import text_or_prompt_examples, with_needles, workers
    from pyglobenc.evaluate.kinds.images import ImageAttributor, ImageForwards, image_examples
    from pyglobenc.evaluate.kinds.texts import encode_texts
    from pyglobenc.evaluate.sanity import sanity_checks
    from pyglobenc.methods.inputs import check_dtype

    several = {"texts": texts, "images": images, "masks": masks, "labels": labels, "rationales": rationales}
    several |= {"answers": answers, "needles": needles}
    check_lists({name: value for name, value in several.items() if value is not None})
    check_lists({"methods": methods, "metrics": metrics, "fractions": fractions})
    check_dtype("evaluate", dtype)
    of_images = check_kind(
        {"tokenizer": tokenizer, "texts": texts, "words": words or None, "rationales": rationales}
        | {"remove": None if remove == "mask" else remove, "long": None if long == "error" else long}
        | {"top_k": top_k, "max_length": max_length, "answers": answers, "needles": needles},
        {"images": images, "processor": processor, "masks": masks, "start_layer": start_layer},
    )
    given = {"fractions": tuple(fractions), "target": target, "words": words, "start_layer": start_layer}
    given |= {"metrics": metrics if isinstance(metrics, str) else tuple(metrics)}
    given |= {"long": long, "max_length": max_length}
    given = check_protocol(protocol, given, of_images)
    target, long, max_length, metrics = (given[name] for name in ("target", "long", "max_length", "metrics"))
    start_layer = given["start_layer"] or 0
    check_count("bootstrap", bootstrap, 0, MAX_RESAMPLES)
    check_count("batch_tokens", batch_tokens, 1)
    settings, notes = make_settings(tokenizer, fractions, remove, words, seed, protocol, top_k)
    wanted = wanted_methods(methods, protocol)
    if of_images:
        forwards = ImageForwards(model, batch_tokens, processor)
        attributor = ImageAttributor(model, processor, batch_tokens, backend, dtype, start_layer)
        examples, note = image_examples(attributor, forwards, images, masks, labels, target)
    else:
        forwards, attributor = workers(model, tokenizer, batch_tokens, backend, dtype)
        forwards.check_removal(settings)
        encoded = encode_texts(attributor, texts, max_length, long)
        examples, note = text_or_prompt_examples(
            attributor, forwards, encoded, labels, target, answers, settings, max_length
        )
        examples = with_needles(examples, needles)
        examples = with_rationales(examples, rationales, tokenizer.unk_token_id)
    chosen, left_out = choose_metrics(metrics, examples, forwards.why_no_classes, protocol)
    described = {
        "settings": vars(settings)
        | {"target": target, "long": long, "max_length": max_length, "batch_tokens": batch_tokens}
        | {"start_layer": start_layer}
        | {"backend": backend, "dtype": None if dtype is None else str(dtype).split(".")[-1]},
        "methods": wanted,
        "metrics": [metric.name for metric in chosen],
        "sanity": sanity,
    }
    with kept_steps(output, attributor, examples, described) as kept:
        attributed, refused = attribute_all(
            attributor, wanted, methods == ALL, chosen, examples, kept, progress
        )
        shown = {method: attributed[method] for method in wanted if method in attributed}
        per_text, passes = measure_all(
            forwards, examples, shown, attributed, chosen, settings, kept, progress
        )
        if sanity:
            rows, more = sanity_checks(attributor, shown, examples, settings.seed, kept, progress)
            per_text, refused = per_text | rows, [*refused, *more]
    of_method = {name: one.summary(examples, settings.seed) for name, one in shown.items()}
    info = described | {"methods": list(shown), "texts": len(examples), "forward_passes": passes}
    notes = [*notes, note, *left_out, *refused]
    ratios = {metric.name: metric.ratios for metric in chosen if metric.ratios}
    return EvaluationTable(per_text, of_method, bootstrap, seed, notes, info, ratios)


def attribute_all(
    attributor: Attributor,
    wanted: Sequence[str],
    everything: bool,
    metrics: Sequence[Metric],
    examples: Sequence[Example],
    kept: Kept,
    progress: bool,
) -> tuple[dict[str, Attributed], list[str]]:
    """Attribute the examples by each method, and by those that metrics refer to.

    With `everything`, methods that refuse the model are left out, and a note says so.
    """
    from tqdm import tqdm

    from pyglobenc.evaluate.attributions import Attributed

    names = list(dict.fromkeys([*wanted, *(name for metric in metrics for name in metric.references)]))
    found, notes = {}, []
    with tqdm(total=len(names) * len(examples), desc="attribute", unit="text", disable=not progress) as bar:
        for number, name in enumerate(names, start=1):
            bar.set_postfix_str(name)

            def attribute(name: str = name) -> Arrays:
                return attributor.attribute(name, examples, bar.update).arrays()

            try:
                found[name] = Attributed(**kept.step(f"method-{name}", attribute))
            except (TypeError, ValueError) as error:
                if not everything:
                    raise
                notes.append(f"{name} is left out: {str(error).removeprefix('explain: ')}.")
            else:
                notes += found[name].notes(name)
            bar.update(number * len(examples) - bar.n)
    return found, notes


def measure_all(
    forwards: Forwards,
    examples: Sequence[Example],
    shown: Mapping[str, Attributed],
    attributed: Mapping[str, Attributed],
    metrics: Sequence[Metric],
    settings: Settings,
    kept: Kept,
    progress: bool,
) -> tuple[dict[tuple[str, str], np.ndarray], dict[str, float]]:
    """Compute the metrics of the methods in `shown`, portion by portion.

    Returns:
        (N,) float64 for each method and row, with NaN for examples that don't count; and the counts and rates
        of the forward passes.
    """
    from tqdm import tqdm

    from pyglobenc.inputs.batching import portions

    def size(example: Example) -> int:
        return _copied_tokens(example, shown, metrics, settings)

    columns = {
        (method, metric.name): np.full(len(examples), np.nan) for method in shown for metric in metrics
    }
    counts = np.zeros(len(COUNTS))
    with tqdm(total=0, desc="evaluate", unit=" passes", disable=not progress) as bar:
        for number, part in enumerate(portions(examples, size, PORTION)):
            begun, left = bar.n, len(examples) - part[0].index

            def report(count: int, total: int, begun: int = begun, share: float = left / len(part)) -> None:
                # The other portions are taken to need as many forward passes as this one.
                bar.total = begun + round(total * share)
                bar.update(count)

            def compute(part: Sequence[Example] = part, report: Any = report) -> Arrays:
                return _measure_portion(forwards, part, shown, attributed, metrics, settings, report)

            arrays = kept.step(f"part-{number:05d}", compute)
            counts += arrays["counts"]
            for (method, row), values in zip(arrays["rows"].tolist(), arrays["values"], strict=True):
                column = columns.setdefault((method, row), np.full(len(examples), np.nan))
                column[[one.index for one in part]] = values
    order = [(method, metric.name) for method in shown for metric in metrics]
    per_text = {
        key: columns[key]
        for key in sorted(columns, key=lambda key: order.index((key[0], key[1].partition(".")[0])))
    }
    passes = dict(zip(COUNTS, counts.tolist(), strict=True))
    if passes["seconds"]:
        passes["per_second"] = passes["done"] / passes["seconds"]
        passes["share_of_plain_rate"] = passes["in_model"] / passes["seconds"]
    return per_text, passes


def _measure_portion(
    forwards: Forwards,
    part: Sequence[Example],
    shown: Mapping[str, Attributed],
    attributed: Mapping[str, Attributed],
    metrics: Sequence[Metric],
    settings: Settings,
    report: Callable[[int, int], Any],
) -> Arrays:
    """Return the names of rows (R, 2), their values (R, examples of the portion), and counts as in COUNTS."""
    from pyglobenc.evaluate.forwards import measure

    before = np.array([getattr(forwards, name) for name in COUNTS])
    scores: dict[str, list[Any]] = {method: [] for method in shown}
    for one in part:
        references = {
            name: drawn[0]
            for metric in metrics
            for name in metric.references
            if (drawn := attributed[name].scores(one, settings.seed))
        }
        for method in shown:
            scores[method].append(shown[method].scores(one, settings.seed, references=references))
    values = measure(forwards, part, scores, metrics, settings, report)
    rows = list(dict.fromkeys((method, row) for method, row, _ in values))
    table = [[values.get((*row, one.index), np.nan) for one in part] for row in rows]
    return {
        "rows": np.array(rows, dtype=str).reshape(-1, 2),
        "values": np.array(table, dtype=np.float64).reshape(-1, len(part)),
        "counts": np.array([getattr(forwards, name) for name in COUNTS]) - before,
    }


def _copied_tokens(
    example: Example, shown: Mapping[str, Attributed], metrics: Sequence[Metric], settings: Settings
) -> int:
    """Return the number of tokens of all masked copies of an example, for every method and draw."""
    draws = [one_method.scores(example, settings.seed) for one_method in shown.values()]
    copies = sum(
        len(metric.queries(example, draw, settings))
        for some in draws
        for draw in some
        for metric in metrics
        if metric.queries
    )
    return copies * len(example.units)
