"""Reads images with true segmentations: pairs of folders, and the file of ImageNet-Segmentation."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyglobenc.common.files import decode, read_at_most
from pyglobenc.inputs.images import MAX_PIXELS

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# The largest file with labels, and the file's columns.
MAX_BYTES, COLUMNS = 1 << 26, ("name", "label")


@dataclass(frozen=True)
class ImageData:
    """Images with what is known of them.

    Attributes:
        names: N names.
        images: N images or names of files, as `pyglobenc.evaluate` takes them.
        masks: N masks or names of files, or None.
        labels: N classes as names or numbers in text, or None.
    """

    names: list[str]
    images: list[Any]
    masks: list[Any] | None = None
    labels: list[str] | None = None


def read_image_folder(
    images: str | Path, masks: str | Path | None = None, labels: str | Path | None = None
) -> ImageData:
    """Read the names of images in a folder, with the masks in another one.

    Args:
        images: folder of images. Files with other suffixes than SUFFIXES are left out.
        masks: folder with a mask for each image, whose name is the same but for the suffix.
        labels: CSV file with the columns name (of an image's file) and label.

    Returns:
        ImageData in the order of the names. The files themselves are read by `pyglobenc.evaluate`.

    Raises:
        ValueError: there is no image, an image has no mask or no label, or several.
        OSError: a folder or file can't be read.
    """
    files = _images_in(Path(images))
    if not files:
        raise ValueError(f"{images}: holds no image ({', '.join(SUFFIXES)})")
    found = None if masks is None else _by_stem(Path(masks))
    if found is not None:
        for file in files:
            if len(of_image := found.get(file.stem, [])) != 1:
                what = f"{len(of_image)} masks" if of_image else "no mask"
                raise ValueError(f"{masks}: holds {what} for the image {file.name}")
    known = None if labels is None else _labels(Path(labels))
    if known is not None and (without := [file.name for file in files if file.name not in known]):
        raise ValueError(f"{labels}: has no label for {len(without)} images, the first one is {without[0]}")
    return ImageData(
        [file.name for file in files],
        list(files),
        None if found is None else [found[file.stem][0] for file in files],
        None if known is None else [known[file.name] for file in files],
    )


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in _images_in(folder):
        found.setdefault(path.stem, []).append(path)
    return found


def _labels(path: Path) -> dict[str, str]:
    """Return the label of each name in a CSV file."""
    with path.open("rb") as file:
        text = decode(read_at_most(file, str(path), MAX_BYTES), str(path))
    table, labels = csv.DictReader(io.StringIO(text)), {}
    if not set(COLUMNS) <= set(table.fieldnames or ()):
        raise ValueError(f"{path}: must have the columns {' and '.join(COLUMNS)}, got {table.fieldnames}")
    for row in table:
        name, label = (row[column] for column in COLUMNS)
        if not name or not label or name in labels:
            raise ValueError(f"{path}: line {table.line_num}: must hold a label of a name that is new")
        labels[name] = label
    return labels


def read_gtsegs(path: str | Path, limit: int | None = None) -> ImageData:
    """Read the file of ImageNet-Segmentation, gtsegs_ijcv.mat (Guillaumin et al., IJCV 2014).

    It is an HDF5 file. `/value/img` and `/value/gt` hold references to N images and to N cells, each of which
    refers to a mask. All arrays are transposed: images are (3, width, height) and masks (width, height).

    Args:
        path: the file.
        limit: read the first `limit` images alone.

    Returns:
        ImageData with PIL images, and masks (height, width) int8: 1 for the object, 0 for the rest, -1 for
        pixels that don't count. All of them are in memory at once.

    Raises:
        ValueError: h5py isn't installed, or the file isn't made like this.
        OSError: the file can't be read.
    """
    try:
        import h5py
    except ImportError:
        raise ValueError(
            f"{path}: reading .mat files needs h5py: pip install pyglobenc[segmentation]"
        ) from None
    from PIL import Image

    with open(path, "rb"):
        pass
    try:
        with h5py.File(path, "r") as file:
            pairs = list(_gtsegs(file, limit))
    # A file of unknown origin may cause an error of any kind.
    except Exception as error:
        raise ValueError(f"can't read {str(path)!r} as ImageNet-Segmentation: {error}") from error
    names = [str(number) for number in range(1, len(pairs) + 1)]
    return ImageData(names, [Image.fromarray(image) for image, _ in pairs], [mask for _, mask in pairs])


def _gtsegs(file: Any, limit: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield images (height, width, 3) uint8 and masks (height, width) int8."""
    images, masks = file["value/img"], file["value/gt"]
    if not len(images) or images.shape != masks.shape:
        raise ValueError(
            f"/value/img and /value/gt must hold as many references, got {images.shape}, {masks.shape}"
        )
    for number in range(min(len(images), limit or len(images))):
        image, mask = file[images[number, 0]], file[file[masks[number, 0]][0, 0]]
        if image.ndim != 3 or len(image) != 3 or image.dtype != np.uint8 or image.shape[1:] != mask.shape:
            raise ValueError(
                f"image {number + 1} must be (3, width, height) of uint8 with a mask (width, height), got "
                f"{image.shape} of {image.dtype} and {mask.shape}"
            )
        if mask.size > MAX_PIXELS:
            raise ValueError(f"image {number + 1} has {mask.size} pixels, and at most {MAX_PIXELS} are taken")
        values = np.asarray(mask).T
        if not np.isin(values, (0, 1, -1)).all():
            raise ValueError(f"mask {number + 1} must hold 0, 1 and -1 alone")
        yield np.ascontiguousarray(np.asarray(image).transpose(2, 1, 0)), values.astype(np.int8)
