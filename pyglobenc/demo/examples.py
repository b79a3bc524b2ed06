"""The texts and images that the page offers as examples."""

from importlib.resources import as_file, files

# A text, and the second text of a pair or "".
TEXTS = [
    ["A deep and meaningful film, although the first hour drags.", ""],
    ["The acting is so bad that even the popcorn felt ashamed.", ""],
    ["A man is playing a guitar on stage.", "Somebody makes music."],
    ["The keys to the old cabinet in the hall are missing.", ""],
]


def _images() -> list[str]:
    """Return photographs that matplotlib brings along; some distributions leave them out."""
    photo = files("matplotlib").joinpath("mpl-data", "sample_data", "grace_hopper.jpg")
    with as_file(photo) as path:
        return [str(path)] if path.is_file() else []


IMAGES = _images()
