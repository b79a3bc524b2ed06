"""Readers of published data sets that hold highlights of words, or segmentations of images."""

from pyglobenc.evaluate.readers.highlights import read_eraser, read_hatexplain
from pyglobenc.evaluate.readers.images import read_gtsegs, read_image_folder

__all__ = ["read_eraser", "read_gtsegs", "read_hatexplain", "read_image_folder"]
