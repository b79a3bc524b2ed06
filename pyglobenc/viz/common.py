"""Colours, the scale of scores, and captions, which the pictures share."""

from collections.abc import Sequence

from pyglobenc.common.characters import printable
from pyglobenc.viz.units import Scored, Unit

RGB = tuple[int, int, int]

# Positive scores are orange and negative ones blue, which people with any common colour blindness can tell
# apart. Both colours darken evenly, so they also work in grey print.
RAMPS: dict[bool, tuple[RGB, ...]] = {
    True: ((255, 255, 255), (254, 232, 200), (253, 190, 120), (241, 134, 51), (166, 72, 5)),
    False: ((255, 255, 255), (214, 230, 244), (146, 195, 223), (66, 139, 196), (8, 72, 140)),
}
# On every background, black or white text has a contrast of at least 4.5.
DARK, LIGHT = (0, 0, 0), (255, 255, 255)


def color(value: float) -> RGB:
    """Return the background colour of a score that was divided by the scale; it is clamped to [-1, 1]."""
    ramp = RAMPS[value >= 0]
    place = min(abs(value), 1.0) * (len(ramp) - 1)
    low = min(int(place), len(ramp) - 2)
    return tuple(round(a + (b - a) * (place - low)) for a, b in zip(ramp[low], ramp[low + 1], strict=True))


def ink(background: RGB) -> RGB:
    """Return the text colour, dark or light, that contrasts more with a background."""
    return max((DARK, LIGHT), key=lambda text: contrast(text, background))


def contrast(a: RGB, b: RGB) -> float:
    """Return the contrast ratio of two colours, from 1 to 21 (WCAG 2.2, relative luminance)."""
    luminance = []
    for rgb in (a, b):
        channels = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        luminance.append(0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2])
    return (max(luminance) + 0.05) / (min(luminance) + 0.05)


def scale_of(units: Sequence[Unit]) -> float:
    """Return the largest absolute score of the text's units, which gets the full colour.

    Special tokens often have larger scores, so they count only if there is no other unit.
    """
    scores = [abs(unit.score) for unit in units if not unit.special] or [abs(unit.score) for unit in units]
    return max(scores, default=0.0) or 1.0


def top_units(units: Sequence[Unit], count: int) -> list[Unit]:
    """Return the `count` units of the text with the largest absolute scores, the largest first."""
    return sorted((unit for unit in units if not unit.special), key=lambda unit: -abs(unit.score))[:count]


def check_columns(who: str, columns: int) -> None:
    """Raise TypeError or ValueError unless a number of columns is an integer of at least 1."""
    if not isinstance(columns, int) or isinstance(columns, bool):
        raise TypeError(f"{who}: columns must be an integer, got {columns!r}")
    if columns < 1:
        raise ValueError(f"{who}: columns must be at least 1, got {columns}")


def remainder(attribution: Scored, limit: int = 200) -> str:
    """Return the beginning of the text that truncation removed; "" if there is none or it isn't known."""
    if not attribution.cut or attribution.offsets is None or attribution.text_pair is not None:
        return ""
    end = max(stop for _, stop in attribution.offsets)
    rest = attribution.text[end:]
    return rest if len(rest) <= limit else rest[:limit] + "..."


def _predicted(attribution: Scored) -> str:
    """Return a classifier's labels with their probabilities, or a regression's outputs, as text."""
    named = [(name, f"{number:.4g}") for name, number in attribution.predictions]
    if attribution.label is not None:
        named = [(name, f"{number:.1%}") for name, number in attribution.predictions]
    return ", ".join(f"{name} ({number})" for name, number in named)


def caption(attribution: Scored) -> list[tuple[str, str]]:
    """Return what a reader must know besides the colours, as pairs of a name and a value."""
    kind = "target class" if attribution.target_kind == "class" else "target"
    name = (
        attribution.target_name
        if attribution.target_kind == "mean"
        else f"{attribution.target_name} ({attribution.target})"
    )
    out = [("method", attribution.method), (kind, name), ("model", attribution.model)]
    if attribution.contrast is not None:
        out.insert(2, ("against", f"{attribution.contrast_name} ({attribution.contrast})"))
    if attribution.predictions is not None:
        out.append(("predicted", _predicted(attribution) or "no label above 50%"))
    elif attribution.label is not None:
        chance = "" if attribution.probability is None else f" ({attribution.probability:.1%})"
        out.append(("predicted", f"{attribution.label}{chance}"))
    if "layer" in attribution.settings:
        out.append(("layer", str(attribution.settings["layer"])))
    if attribution.windows:
        out.append(("windows", f"{len(attribution.windows)} overlapping, scores joined"))
    if attribution.cut:
        where = (
            "last {} tokens of the text"
            if attribution.text_pair is None
            else "last tokens of both texts, {} in all"
        )
        out.append(("left out", f"the {where.format(attribution.cut)}"))
    return [(name, printable(value)) for name, value in out]
