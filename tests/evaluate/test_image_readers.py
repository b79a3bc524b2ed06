"""Readers of images with masks, and the command that evaluates them."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import pyglobenc
from pyglobenc.cli.main import main
from pyglobenc.evaluate.readers.images import read_gtsegs, read_image_folder

SIZE = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


@pytest.fixture
def folder(tmp_path):
    """Return a folder with images, masks and labels.csv, and the folder of a small ViT."""
    generator = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for index in range(3):
        pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
        mask = Image.fromarray((generator.random((20, 30)) > 0.6).astype(np.uint8) * 255)
        mask.save(tmp_path / "masks" / f"{index}.bmp")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    (tmp_path / "labels.csv").write_text("name,label\n0.png,owl\n1.png,cat\n2.png,1\n")
    torch.manual_seed(0)
    names = {0: "cat", 1: "dog", 2: "owl"}
    config = ViTConfig(
        image_size=16, patch_size=4, id2label=names, label2id={name: i for i, name in names.items()}, **SIZE
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    return tmp_path


def write_gtsegs(path, images, masks):
    """Write images (height, width, 3) and masks (height, width) as ImageNet-Segmentation's file has them."""
    h5py = pytest.importorskip("h5py", reason="h5py reads and writes .mat files")
    with h5py.File(path, "w") as file:
        references = [np.empty((len(images), 1), dtype=h5py.ref_dtype) for _ in range(2)]
        for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
            file[f"refs/image{index}"] = image.transpose(2, 1, 0)
            file[f"refs/mask{index}"] = mask.T
            cell = np.empty((1, 1), dtype=h5py.ref_dtype)
            cell[0, 0] = file[f"refs/mask{index}"].ref
            file[f"refs/cell{index}"] = cell
            references[0][index, 0] = file[f"refs/image{index}"].ref
            references[1][index, 0] = file[f"refs/cell{index}"].ref
        file["value/img"], file["value/gt"] = references


def some_images():
    generator = np.random.default_rng(1)
    shapes = [(20, 30), (25, 18), (22, 22)]
    images = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    return images, [generator.integers(0, 2, shape, dtype=np.uint8) for shape in shapes]


def test_imagenet_segmentation(tmp_path):
    images, masks = some_images()
    write_gtsegs(tmp_path / "gtsegs.mat", images, masks)
    data = read_gtsegs(tmp_path / "gtsegs.mat")
    assert data.names == ["1", "2", "3"] and data.labels is None
    for found, image in zip(data.images, images, strict=True):
        assert np.array_equal(np.asarray(found), image)
    for found, mask in zip(data.masks, masks, strict=True):
        assert np.array_equal(found, mask)
    assert len(read_gtsegs(tmp_path / "gtsegs.mat", limit=2).images) == 2


def test_other_files_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py reads and writes .mat files")
    path, (images, masks) = tmp_path / "gtsegs.mat", some_images()
    path.write_bytes(b"no HDF5 file")
    with pytest.raises(ValueError, match="can't read .*gtsegs.mat' as ImageNet-Segmentation"):
        read_gtsegs(path)
    with h5py.File(path, "w") as file:
        file["value/other"] = np.zeros(3)
    with pytest.raises(ValueError, match="as ImageNet-Segmentation"):
        read_gtsegs(path)
    write_gtsegs(path, images, [*masks[:2], masks[0]])
    with pytest.raises(ValueError, match=r"image 3 must be \(3, width, height\) of uint8 with a mask"):
        read_gtsegs(path)
    write_gtsegs(path, images, [masks[0] * 7, *masks[1:]])
    with pytest.raises(ValueError, match="mask 1 must hold 0, 1 and -1 alone"):
        read_gtsegs(path)
    with pytest.raises(FileNotFoundError):
        read_gtsegs(tmp_path / "none.mat")


def test_folders(folder):
    data = read_image_folder(folder / "images", folder / "masks", folder / "labels.csv")
    assert data.names == ["0.png", "1.png", "2.png"] and data.labels == ["owl", "cat", "1"]
    assert [path.name for path in data.masks] == ["0.bmp", "1.bmp", "2.bmp"]
    assert read_image_folder(folder / "images").masks is None

    def fails(message, *args):
        with pytest.raises(ValueError, match=message):
            read_image_folder(*args)

    (folder / "masks" / "1.bmp").rename(folder / "masks" / "one.bmp")
    fails("holds no mask for the image 1.png", folder / "images", folder / "masks")
    for name in ("1.bmp", "1.png"):
        Image.new("L", (30, 20)).save(folder / "masks" / name)
    fails("holds 2 masks for the image 1.png", folder / "images", folder / "masks")
    fails("holds no image", folder / "model")
    for text, message in (
        ("name,label\n0.png,owl\n", "has no label for 2 images, the first one is 1.png"),
        ("name,label\n0.png,owl\n0.png,cat\n", "line 3: must hold a label of a name that is new"),
        ("name,label\n0.png,\n", "line 2"),
        ("file,class\n0.png,owl\n", "must have the columns name and label"),
    ):
        (folder / "labels.csv").write_text(text)
        fails(message, folder / "images", None, folder / "labels.csv")


def command(folder, *extra):
    args = [
        "evaluate",
        "--images",
        folder / "images",
        "--masks",
        folder / "masks",
        "--model",
        folder / "model",
    ]
    args += ["--output", folder / "out", "--quiet", "--methods", "globenc,random", *extra]
    return main([str(arg) for arg in args])


def rows(folder):
    with open(folder / "out" / "table.csv", newline="") as file:
        return {(row["method"], row["metric"]): float(row["mean"]) for row in csv.DictReader(file)}


def test_the_command(folder):
    assert command(folder, "--metrics", "miou,comprehensiveness", "--labels", folder / "labels.csv") == 0
    model = ViTForImageClassification.from_pretrained(folder / "model").eval()
    data = read_image_folder(folder / "images", folder / "masks")
    table = pyglobenc.evaluate(
        model,
        processor=ViTImageProcessor.from_pretrained(folder / "model"),
        images=data.images,
        masks=data.masks,
        labels=["owl", "cat", 1],
        methods=("globenc", "random"),
        metrics=("miou", "comprehensiveness"),
        progress=False,
    )
    found = rows(folder)
    assert found == {(row["method"], row["metric"]): pytest.approx(row["mean"]) for row in table.rows}
    for name in ("per_text.parquet", "curves.png", "index.html"):
        assert (folder / "out" / name).stat().st_size


def test_the_command_reads_imagenet_segmentation(folder):
    images, masks = some_images()
    write_gtsegs(folder / "gtsegs.mat", images, masks)
    args = [
        "evaluate",
        "--images",
        folder / "gtsegs.mat",
        "--model",
        folder / "model",
        "--limit",
        2,
        "--quiet",
    ]
    args += ["--output", folder / "out", "--methods", "globenc", "--metrics", "pixel-accuracy,miou,map"]
    assert main([str(arg) for arg in [*args, "--protocol", "chefer-segmentation"]]) == 0
    table = pyglobenc.evaluate(
        ViTForImageClassification.from_pretrained(folder / "model").eval(),
        processor=ViTImageProcessor.from_pretrained(folder / "model"),
        images=[Image.fromarray(image) for image in images[:2]],
        masks=masks[:2],
        methods="globenc",
        metrics=("pixel-accuracy", "miou", "map"),
        protocol="chefer-segmentation",
        progress=False,
    )
    assert rows(folder) == {(row["method"], row["metric"]): pytest.approx(row["mean"]) for row in table.rows}


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--input", "a.txt"], "either texts with --input or images with --images"),
        (["--column", "text"], "--column belongs to texts"),
        (["--label-names", "a,b"], "--label-names belongs to texts"),
        (["--model", "minilm-sst2"], "name an image model"),
    ],
)
def test_wrong_usage(folder, capsys, extra, message):
    with pytest.raises(SystemExit) as error:
        command(folder, *extra)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_wrong_input(folder, capsys):
    assert command(folder, "--words") == 1 and "words can't be given with images" in capsys.readouterr().err
    Image.new("L", (30, 21)).save(folder / "masks" / "1.bmp")
    assert command(folder, "--metrics", "miou") == 1
    assert "mask 2 must have the size of its image, 20 x 30" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", "--input", "a.txt", "--masks", "b", "--output", str(folder / "other")])
    assert "--masks belongs to --images" in capsys.readouterr().err
