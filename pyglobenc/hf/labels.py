"""Interprets a classifier's logits as exclusive classes, as independent labels, or as a regression."""

from typing import Any, NamedTuple

from torch import Tensor

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
# A multi-label classifier predicts each label whose probability is above this value.
THRESHOLD = 0.5


class Prediction(NamedTuple):
    """The prediction of a classifier for one example.

    Attributes:
        label, probability: the predicted class, or the most probable of the predicted labels; None for a
            regression, or if no label is predicted.
        predictions: name and probability of each predicted class or label, most probable first. For a
            regression, name and value of each output.
    """

    label: str | None
    probability: float | None
    predictions: list[tuple[str, float]]


def class_name(config: Any, index: int) -> str:
    """Return the name of a class in a config's id2label, or its index as a string if it has no name there."""
    names = getattr(config, "id2label", None)
    # A config that was read from JSON may have strings as keys.
    found = [names[key] for key in (index, str(index)) if key in names] if isinstance(names, dict) else []
    return str(found[0] if found and found[0] is not None else index)


def classifies(model: Any) -> bool:
    """Return whether the model's head classifies sequences, with logits (B, classes)."""
    return any(cls.__name__.endswith("ForSequenceClassification") for cls in type(model).__mro__)


def class_count(model: Any) -> int:
    """Return the number of outputs of a classifier's head, whose logits are (B, classes).

    The config's id2label may name fewer classes, so the model's own `num_labels` is preferred.
    """
    built = getattr(model, "num_labels", None)
    return built if isinstance(built, int) else model.config.num_labels


def problem_type(config: Any, classes: int) -> str:
    """Return SINGLE, MULTI or REGRESSION for a head with logits (B, classes), as transformers decides it.

    Args:
        config: the model's config; its problem_type decides if it is set.
        classes: number of the head's outputs. A single-label head with one output is a regression.

    Raises:
        ValueError: config.problem_type is none of the three and not None.
    """
    kind = getattr(config, "problem_type", None)
    if kind not in (None, SINGLE, MULTI, REGRESSION):
        raise ValueError(
            f"config.problem_type must be one of {SINGLE}, {MULTI}, {REGRESSION} or None, got {kind!r}"
        )
    # A softmax over a single number is always 1, so such a head can't be a classifier.
    if kind in (None, SINGLE):
        return SINGLE if classes > 1 else REGRESSION
    return kind


def probabilities(config: Any, logits: Tensor) -> Tensor | None:
    """Return the probability of every class: a softmax, or a sigmoid for a multi-label classifier.

    Args:
        config: the model's config; its problem_type decides between the two.
        logits: (B, classes) or (classes,), floating point.

    Returns:
        The same shape and dtype; None for a regression, whose outputs aren't probabilities.

    Raises:
        ValueError: config.problem_type is unknown.
    """
    kind = problem_type(config, logits.shape[-1])
    if kind == REGRESSION:
        return None
    return logits.softmax(-1) if kind == SINGLE else logits.sigmoid()


def predict(config: Any, logits: Tensor) -> Prediction:
    """Return the prediction for one example, given its logits (classes,) of a floating-point dtype.

    Raises:
        ValueError: config.problem_type is unknown.
    """
    chances = probabilities(config, logits)
    names = [class_name(config, index) for index in range(len(logits))]
    if chances is None:
        return Prediction(None, None, list(zip(names, logits.tolist(), strict=True)))
    order = chances.argsort(descending=True, stable=True).tolist()
    ranked = [(names[index], float(chances[index])) for index in order]
    if problem_type(config, len(logits)) == SINGLE:
        predicted = ranked[:1]
    else:
        predicted = [(name, chance) for name, chance in ranked if chance > THRESHOLD]
    return Prediction(*(predicted[0] if predicted else (None, None)), predicted)
