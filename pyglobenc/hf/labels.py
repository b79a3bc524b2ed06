"""What a classifier's logits say: classes with probabilities, labels that don't exclude one another, or plain
numbers.
"""

from typing import Any, NamedTuple

from torch import Tensor

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
# a label of a multi-label classifier is predicted above this probability
THRESHOLD = 0.5


class Prediction(NamedTuple):
    """What a classifier predicts for one example.

    Attributes:
        label, probability: the class predicted, or the most probable label of those predicted; None where
            there is none.
        predictions: name and probability of every class or label predicted, most probable first; of a
            regression the name and the plain number of every output.
    """

    label: str | None
    probability: float | None
    predictions: list[tuple[str, float]]


def class_name(config: Any, index: int) -> str:
    """Return the name that a config's id2label gives a class; the index as a string where it gives none."""
    names = getattr(config, "id2label", None)
    # a config that was read from JSON has strings for keys
    found = [names[key] for key in (index, str(index)) if key in names] if isinstance(names, dict) else []
    return str(found[0] if found and found[0] is not None else index)


def classifies(model: Any) -> bool:
    """Whether the model's head classifies sequences."""
    return any(cls.__name__.endswith("ForSequenceClassification") for cls in type(model).__mro__)


def class_count(model: Any) -> int:
    """Return how many outputs the head of a classifier was built with; a config's id2label, which may have
    holes, can say less.
    """
    built = getattr(model, "num_labels", None)
    return built if isinstance(built, int) else model.config.num_labels


def problem_type(config: Any, classes: int) -> str:
    """Return the kind of a head with so many outputs: SINGLE, MULTI or REGRESSION, by transformers' own rule.

    Raises:
        ValueError: config.problem_type is none of them.
    """
    kind = getattr(config, "problem_type", None)
    if kind not in (None, SINGLE, MULTI, REGRESSION):
        raise ValueError(
            f"config.problem_type must be one of {SINGLE}, {MULTI}, {REGRESSION} or None, got {kind!r}"
        )
    # a softmax over one number is 1, whatever the number
    if kind in (None, SINGLE):
        return SINGLE if classes > 1 else REGRESSION
    return kind


def probabilities(config: Any, logits: Tensor) -> Tensor | None:
    """Return the probability of every class from logits (..., classes): softmax, or sigmoid of labels that
    don't exclude one another.

    Returns:
        (..., classes), the logits' dtype; None for a regression, whose outputs are plain numbers.
    """
    kind = problem_type(config, logits.shape[-1])
    if kind == REGRESSION:
        return None
    return logits.softmax(-1) if kind == SINGLE else logits.sigmoid()


def predict(config: Any, logits: Tensor) -> Prediction:
    """Return what logits (classes,) predict; see `Prediction`."""
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
