"""What the three pictures share: colours, the scale of scores, and captions."""

from collections.abc import Sequence

from pyglobenc.common.characters import printable
from pyglobenc.viz.units import Scored, Unit

RGB = tuple[int, int, int]

# orange for and blue against, which every common colour blindness tells apart; both darken evenly, so they
# survive grey print
RAMPS: dict[bool, tuple[RGB, ...]] = {
    True: ((255, 255, 255), (254, 232, 200), (253, 190, 120), (241, 134, 51), (166, 72, 5)),
    False: ((255, 255, 255), (214, 230, 244), (146, 195, 223), (66, 139, 196), (8, 72, 140)),
}
# black or white leaves no background below a contrast of 4.5
DARK, LIGHT = (0, 0, 0), (255, 255, 255)


def color(value: float) -> RGB:
    """Background of a score divided by the scale; beyond [-1, 1] as at its end."""
    ramp = RAMPS[value >= 0]
    place = min(abs(value), 1.0) * (len(ramp) - 1)
    low = min(int(place), len(ramp) - 2)
    return tuple(round(a + (b - a) * (place - low)) for a, b in zip(ramp[low], ramp[low + 1], strict=True))


def ink(background: RGB) -> RGB:
    """Dark or light, whichever contrasts more with a background."""
    return max((DARK, LIGHT), key=lambda text: contrast(text, background))


def contrast(a: RGB, b: RGB) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2, relative luminance)."""
    luminance = []
    for rgb in (a, b):
        channels = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        luminance.append(0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2])
    return (max(luminance) + 0.05) / (min(luminance) + 0.05)


def scale_of(units: Sequence[Unit]) -> float:
    """Largest absolute score of text, which gets the full colour; special tokens, which often top it, count
    only if there is no other.
    """
    scores = [abs(unit.score) for unit in units if not unit.special] or [abs(unit.score) for unit in units]
    return max(scores, default=0.0) or 1.0


def top_units(units: Sequence[Unit], count: int) -> list[Unit]:
    """The units of text with the largest absolute scores, largest first."""
    return sorted((unit for unit in units if not unit.special), key=lambda unit: -abs(unit.score))[:count]


def remainder(attribution: Scored, limit: int = 200) -> str:
    """Beginning of the text that truncation left out; empty where nothing was or where it isn't known."""
    if not attribution.cut or attribution.offsets is None or attribution.text_pair is not None:
        return ""
    end = max(stop for _, stop in attribution.offsets)
    rest = attribution.text[end:]
    return rest if len(rest) <= limit else rest[:limit] + "..."


def _predicted(attribution: Scored) -> str:
    """What a classifier predicts: labels with their probabilities, or a regression's outputs."""
    named = [(name, f"{number:.4g}") for name, number in attribution.predictions]
    if attribution.label is not None:
        named = [(name, f"{number:.1%}") for name, number in attribution.predictions]
    return ", ".join(f"{name} ({number})" for name, number in named)


def caption(attribution: Scored) -> list[tuple[str, str]]:
    """What a reader must know beside the colours, as names and values."""
    kind = "target class" if attribution.target_kind == "class" else "target"
    name = (
        attribution.target_name
        if attribution.target_kind == "mean"
        else f"{attribution.target_name} ({attribution.target})"
    )
    out = [("method", attribution.method), (kind, name), ("model", attribution.model)]
    if attribution.predictions is not None:
        out.append(("predicted", _predicted(attribution) or "no label above 50%"))
    elif attribution.label is not None:
        chance = "" if attribution.probability is None else f" ({attribution.probability:.1%})"
        out.append(("predicted", f"{attribution.label}{chance}"))
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
