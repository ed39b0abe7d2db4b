"""Folders of images: what is listed, how images are decoded and augmented, what can be wrong."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from prunekit_vision import FolderOptions, ImageNetOptions, prunekit_datasets
from prunekit_vision.folders import Folder
from prunekit_vision.listing import _natural

from prunekit.catalog.component import Use
from prunekit.contexts import DatasetContext
from prunekit.contracts import Data
from prunekit.data.batches import eval_batches, fingerprint, hold_out
from prunekit.errors import DataMissingError, RunError, UserError
from prunekit.testing import check_component, example_context

COMPONENTS = {component.name: component for component in prunekit_datasets()}
CLASSES = ("ant", "bee", "cat")


def build(name: str, options: Any) -> Data:
    use: Use[Data] = Use(COMPONENTS[name], options, "vision")
    return use.build(example_context(DatasetContext))


def colours(number: int, width: int, height: int) -> Image.Image:
    """An image whose pixels tell where they are: no two of them are alike."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 3, columns * 3, np.full_like(rows, number * 20)], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five training and two validation images a class, lossless, of several sizes."""
    for part, count in (("train", 5), ("val", 2)):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                colours(label, 40 + number, 48 - number).save(folder / f"{number}.PNG")
            (folder / "notes.txt").write_text("no image")
    return tmp_path / "data"


def folder_of(split: object) -> Folder:
    assert isinstance(split, Folder)
    return split


def test_classes_are_the_folders_in_order(root: Path) -> None:
    data = build("image-folder", FolderOptions(root=root, size=16, workers=0))
    assert (data.shape, data.classes, data.augment) == ((3, 16, 16), 3, ("resized-crop", "flip"))
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert folder_of(data.train).paths[6] == b"bee/1.PNG"
    (images,) = data.train.batches([torch.tensor([14, 0])])
    assert images.dtype == torch.uint8
    assert images[0, 2].unique().tolist() == [40]
    assert images[1, 2].unique().tolist() == [0]


def test_shorter_side_is_resized_and_the_middle_cut_out(root: Path) -> None:
    # 35 of 40 columns and 35 of 48 rows would be kept at the full size: 40 is 8/7 of 35.
    data = build("image-folder", FolderOptions(root=root, size=35, workers=0))
    (images,) = data.train.batches([torch.tensor([0])])
    # 48 - 35 = 13 rows, 6 of them above (the half is rounded to even); 40 - 35 = 5 columns, 2.
    assert images[0, 0, :, 0].tolist() == [3 * row for row in range(6, 41)]
    assert images[0, 1, 0].tolist() == [3 * column for column in range(2, 37)]


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_change_nothing(root: Path, workers: int) -> None:
    here = folder_of(build("image-folder", FolderOptions(root=root, size=16, workers=0)).train)
    there = folder_of(
        build("image-folder", FolderOptions(root=root, size=16, workers=workers)).train
    )
    indices = [torch.tensor([3, 1, 14]), torch.tensor([0]), torch.tensor([7, 8])]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    plain = [list(split.batches(indices)) for split in (here, there)]
    names = ("resized-crop", "flip")
    varied = [list(split.augmented_batches(indices, names, [5, 6, 7])) for split in (here, there)]
    for a, b in (plain, varied):
        assert [len(batch) for batch in a] == [3, 1, 2]
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    # The training step's generator is left alone.
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_follows_the_seed_of_the_batch_alone(root: Path) -> None:
    split = folder_of(build("image-folder", FolderOptions(root=root, size=16, workers=0)).train)

    def draw(index: list[int], seed: int, *names: str) -> torch.Tensor:
        (images,) = split.augmented_batches([torch.tensor(index)], names, [seed])
        return images

    both = ("resized-crop", "flip")
    images = draw([3, 4], 1, *both)
    # Neither the batches before nor the place in the batch matter.
    later = list(split.augmented_batches([torch.tensor([0]), torch.tensor([4, 3])], both, [9, 1]))
    assert torch.equal(images.flip(0), later[1])
    assert not torch.equal(images, draw([3, 4], 2, *both))
    (plain,) = split.batches([torch.tensor([3])])
    assert torch.equal(draw([3], 1)[0], plain[0])
    flipped = [not torch.equal(draw([3], seed, "flip")[0], plain[0]) for seed in range(20)]
    assert 3 < sum(flipped) < 17
    for seed in range(20):
        image = draw([3], seed, "flip")[0]
        assert torch.equal(image, plain[0].flip(2) if flipped[seed] else plain[0])
    # A part of the image is spread over all pixels: neighbours are closer in colour.
    steps = [int(draw([3], seed, "resized-crop")[0, 1, 8].int().diff().sum()) for seed in range(20)]
    assert len(set(steps)) > 10
    assert all(0 < step <= 3 * 43 for step in steps)


def test_held_out_images_and_the_contract(root: Path) -> None:
    options = {"root": str(root), "size": 16, "workers": 0}
    check_component(COMPONENTS["image-folder"], options)
    data = build("image-folder", FolderOptions(root=root, size=16, workers=0))
    train, validation = hold_out(data.train, 1.0, 0.2, seed=0)
    assert len(train.labels) == 12
    batches = list(eval_batches(validation, 2, torch.device("cpu")))
    assert [len(x) for x, _ in batches] == [2, 1]
    for x, y in batches:
        assert torch.equal((x[:, 2, 0, 0] * 255 / 20).round().long(), y)


def test_fingerprint_is_of_paths_and_content(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(at: Path) -> str:
        return fingerprint(build("image-folder", FolderOptions(root=at, size=16, workers=0)))

    first = look(root)
    moved = root.rename(root.with_name("moved"))
    file = moved / "val" / "bee" / "1.PNG"
    os.utime(file, ns=(0, 0))
    assert look(moved) == first
    file.rename(file.with_name("2.PNG"))
    file = file.with_name("2.PNG")
    renamed = look(moved)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
    os.utime(file, ns=(0, 0))
    assert len({first, renamed, look(moved)}) == 3
    # What is too large to be read is known again by sizes and times, and says so.
    monkeypatch.setattr("prunekit_vision.listing.READ_BYTES", 100)
    with pytest.warns(UserWarning, match="by their names, sizes and times of change, not by their"):
        large = look(moved)
    os.utime(file, ns=(0, 1))
    with pytest.warns(UserWarning, match="not by their content"):
        assert look(moved) != large


def test_what_systems_leave_behind_is_no_class_and_no_image(root: Path) -> None:
    before = fingerprint(build("image-folder", FolderOptions(root=root, size=16, workers=0)))
    for place in ("train", "train/bee"):
        for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git"):
            (root / place / name).mkdir()
            colours(0, 40, 40).save(root / place / name / "0.png")
    (root / "train" / "bee" / "._0.png").write_bytes(b"no image")
    (root / "train" / ".DS_Store").write_bytes(b"")
    data = build("image-folder", FolderOptions(root=root, size=16, workers=0))
    assert (data.classes, len(data.train.labels)) == (3, 15)
    assert fingerprint(data) == before


def test_other_endings_are_read_or_told(root: Path) -> None:
    bee = root / "train" / "bee"
    colours(1, 40, 40).save(bee / "7.jfif", format="jpeg")
    (bee / "8.heic").write_bytes(b"x")
    (bee / "9").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"left out: 1 \.heic, 1 without an ending$"):
        data = build("image-folder", FolderOptions(root=root, size=16, workers=0))
    assert len(data.train.labels) == 16


@pytest.mark.parametrize("prefix", ["", "class"])
def test_numbers_in_the_names_of_classes_are_numbers(tmp_path: Path, prefix: str) -> None:
    names = [f"{prefix}{number}" for number in range(12)]
    for part in ("train", "val"):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            colours(0, 16, 16).save(tmp_path / part / name / "0.png")
    told = rf"runs of digits in .*points: {prefix}2 is class 2 \(in text order, .*, class 4\)"
    with pytest.warns(UserWarning, match=told):
        data = build("image-folder", FolderOptions(root=tmp_path, size=16, workers=0))
    paths = folder_of(data.train).paths.tolist()
    assert [paths.index(f"{name}/0.png".encode()) for name in names] == list(range(12))
    assert data.train.labels.tolist() == list(range(12))


def test_names_without_numbers_keep_the_order_of_text() -> None:
    names = ["Zebra", "ant", "bee", "n01440764", "n02", "2", "02", "x10", "x9", "x"]
    order = ["02", "2", "Zebra", "ant", "bee", "n02", "n01440764", "x", "x9", "x10"]
    assert sorted(names, key=_natural) == order


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda at: (at / "9.png").symlink_to("nowhere"), r"9\.png is a link .*leads nowhere"),
        (lambda at: (at / "more").symlink_to("nowhere"), r"more is a link that cannot be followed"),
        (lambda at: (at / "me").symlink_to("me"), r"me is a link that cannot be followed"),
        (lambda at: (at / "up").symlink_to(".."), "links to a folder that it is in; delete the li"),
        (lambda at: (at.parent / "dog").symlink_to("nowhere"), r"train/dog is a link that cannot"),
        (lambda at: (at / "0.png").write_bytes(b""), r"0\.png is empty; delete or replace it"),
        (lambda at: os.mkfifo(at / "0.png"), r"0\.png is not a file; delete or replace it"),
    ],
    ids=["image", "folder", "itself", "above", "class", "empty", "pipe"],
)
def test_links_and_files_that_are_none(
    root: Path, make: Callable[[Path], object], told: str
) -> None:
    make(root / "train" / "bee")
    with pytest.raises(UserError, match=told):
        build("image-folder", FolderOptions(root=root, size=16, workers=0))


def test_a_linked_folder_is_a_class(root: Path) -> None:
    (root / "train" / "bee").rename(root / "bees")
    (root / "train" / "bee").symlink_to(root / "bees")
    data = build("image-folder", FolderOptions(root=root, size=16, workers=0))
    assert len(data.train.labels) == 15


@pytest.mark.parametrize(
    ("pixels", "name"),
    [
        (np.linspace(0, 65535, 256).astype(np.uint16), "16.png"),
        (np.linspace(0, 65535, 256).astype(">u2"), "16.tif"),
        (np.linspace(0, 255, 256).astype(np.uint8), "8.png"),
    ],
)
def test_shades_of_grey_are_kept(root: Path, pixels: np.ndarray, name: str) -> None:
    """A ramp from black to white, with 1/257 of 16 bits."""
    file = root / "train" / "cat" / name
    Image.fromarray(np.tile(pixels, (256, 1))).save(file)
    data = build("image-folder", FolderOptions(root=root, size=224, workers=0))
    number = folder_of(data.train).paths.tolist().index(f"cat/{name}".encode())
    (images,) = data.train.batches([torch.tensor([number])])
    # The middle 224 of 256 columns.
    assert images[0, 0, 0].tolist() == list(range(16, 240))
    assert torch.equal(images[0, 0], images[0, 2])


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_without_a_white_are_refused(root: Path, kind: type) -> None:
    Image.fromarray(np.full((40, 40), 3, kind)).save(root / "train" / "cat" / "0.tif")
    data = build("image-folder", FolderOptions(root=root, size=16, workers=0))
    with pytest.raises(
        RunError, match=r"0\.tif cannot be read .*mode pixels means white\); delete"
    ):
        list(data.train.batches([torch.arange(15)]))


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_is_told_in_one_line(
    root: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root.parent)
    file = root / "train" / "bee" / "1.PNG"
    file.write_bytes(file.read_bytes()[:60])
    data = build("image-folder", FolderOptions(root=root, size=16, workers=workers))
    batches = data.train.batches([torch.tensor([0, 1]), torch.tensor([5, 6])])
    assert len(next(batches)) == 2
    with pytest.raises(RunError) as error:
        next(batches)
    text = str(error.value)
    assert text.startswith("data/train/bee/1.PNG cannot be read as an image (")
    assert text.endswith("); delete or replace it")
    assert "\n" not in text


def test_grey_and_nested_images(root: Path) -> None:
    deep = root / "train" / "cat" / "more"
    deep.mkdir()
    colours(2, 40, 40).convert("L").save(deep / "grey.jpeg")
    data = build("image-folder", FolderOptions(root=root, size=16, workers=0))
    assert data.train.labels.tolist()[-1] == 2
    (images,) = data.train.batches([torch.tensor([15])])
    assert images.shape == (1, 3, 16, 16)
    assert torch.equal(images[0, 0], images[0, 2])


def test_missing_folders_and_other_classes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    options = FolderOptions(root=root, size=16, workers=0)
    (root / "val").rename(root / "test")
    assert build("image-folder", options).classes == 3
    (root / "test" / "cat").rename(root / "test" / "cow")
    with pytest.raises(UserError) as error:
        build("image-folder", options)
    assert str(error.value) == (
        "data/train and data/test have different classes: 'cat' is only in one of them "
        "(2 such); both need the same folders"
    )
    for file in (root / "test" / "cow").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="data/test/cow has no images"):
        build("image-folder", options)
    (root / "test").rename(root / "other")
    with pytest.raises(DataMissingError) as missing:
        build("image-folder", options)
    assert str(missing.value) == (
        "image-folder was not found: data needs the folders train and val (or test), each "
        "with a folder for each class; if the data is elsewhere, set root"
    )
    # As ImageNet's validation images are handed out.
    (root / "val").mkdir()
    colours(0, 40, 40).save(root / "val" / "flat.png")
    with pytest.raises(UserError, match="data/val has 0 folders; put the images of each class in"):
        build("image-folder", options)


def test_imagenet(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell = COMPONENTS["imagenet"].facts
    assert tell is not None
    facts = tell(ImageNetOptions())
    assert (facts.shape, facts.classes) == ((3, 224, 224), 1000)
    assert (facts.train, facts.test) == (1_281_167, 50_000)
    monkeypatch.setenv("PRUNEKIT_DATA", str(root.parent))
    with pytest.raises(DataMissingError, match="imagenet was not found: "):
        build("imagenet", ImageNetOptions())
    root.rename(root.with_name("imagenet"))
    with pytest.raises(UserError, match="but imagenet has 1000; for your own images"):
        build("imagenet", ImageNetOptions())


@pytest.mark.parametrize(
    ("names", "told"),
    [(("-1", "0", "1"), "0 is class 0"), (("0.25", "0.5"), "0.5 is class 0")],
)
def test_no_order_is_claimed_that_is_not(root: Path, names: tuple[str, ...], told: str) -> None:
    for part in ("train", "val"):
        for old, new in zip(CLASSES, (*names, "z"), strict=False):
            (root / part / old).rename(root / part / new)
    with pytest.warns(UserWarning, match=f"runs of digits in .*, not of signs and points: {told}"):
        build("image-folder", FolderOptions(root=root, size=16, workers=0))


def test_images_beside_the_class_folders_are_told(root: Path) -> None:
    colours(0, 40, 40).save(root / "train" / "loose.png")
    (root / "train" / "readme.txt").write_text("no image")
    with pytest.warns(UserWarning, match=r"train itself, in no class's folder: 1, such as loose"):
        build("image-folder", FolderOptions(root=root, size=16, workers=0))


def test_names_that_look_the_same_are_told(root: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for part, name in (("train", composed), ("val", decomposed)):
        (root / part / "ant").rename(root / part / name)
    with pytest.raises(UserError, match=r"look alike .Unicode NFC and NFD.*'caf"):
        build("image-folder", FolderOptions(root=root, size=16, workers=0))
    (root / "train" / "bee").rename(root / "train" / decomposed)
    with pytest.raises(UserError, match=r"two folders that look the same, 'cafe.u0301' and 'caf.x"):
        build("image-folder", FolderOptions(root=root, size=16, workers=0))


@pytest.mark.parametrize("white", [65535, 1000])
def test_grey_of_16_bits_in_pgm_is_scaled(root: Path, white: int) -> None:
    pixels = np.full((20, 20), white // 5, ">u2")
    file = root / "train" / "ant" / "0.pgm"
    file.write_bytes(b"P5\n20 20\n%d\n" % white + pixels.tobytes())
    data = build("image-folder", FolderOptions(root=root, size=16, workers=0))
    index = folder_of(data.train).paths.tolist().index(b"ant/0.pgm")
    (image,) = data.train.batches([torch.tensor([index])])
    assert image.unique().tolist() == [51]


def open_image(root: Path, path: str) -> torch.Tensor:
    """The pixels (3, 16, 16) of a training image."""
    data = build("image-folder", FolderOptions(root=root, size=16, workers=0))
    number = folder_of(data.train).paths.tolist().index(path.encode())
    (images,) = data.train.batches([torch.tensor([number])])
    return images[0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white_and_told(root: Path, mode: str) -> None:
    """The left half is opaque and black, the right half transparent."""
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[:, :10, 3] = 255
    image, more = Image.fromarray(pixels), {}
    if mode in ("P", "RGB"):  # one color is transparent
        pixels[:, 10:, 0] = 9
        image = Image.fromarray(pixels[:, :, :3])
        image = image.quantize(2) if mode == "P" else image
        more = {"transparency": image.getpixel((19, 0))}
    else:
        image = image.convert(mode)
    image.save(root / "train" / "ant" / "0.png", **more)
    with pytest.warns(UserWarning, match=r"1 of 16 .*in parts, which are shown on white, .*0\.png"):
        seen = open_image(root, "ant/0.png")
    assert seen[:, :, 0].unique().tolist() == [0]
    assert seen[:, :, -1].unique().tolist() == [255]


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_of_several_frames_the_first_is_taken_and_told(root: Path, kind: str) -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ("black", "white")]
    frames[0].save(root / "train" / "ant" / f"0.{kind}", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=rf"several frames, of which .*ant/0\.{kind}"):
        assert open_image(root, f"ant/0.{kind}").max() < 5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("white", [0, 1])
def test_grey_whose_zero_is_white(root: Path, dtype: type, white: int) -> None:
    """A file as scanners write it: one strip of stored values, 64 / 255 of the largest."""
    stored = 64 * (257 if dtype == np.uint16 else 1)
    pixels = np.full((20, 20), stored, dtype)
    file = root / "train" / "ant" / "0.tif"
    tags = [(256, 20), (257, 20), (258, 8 * pixels.itemsize), (259, 1), (262, white)]
    tags += [(273, 200), (277, 1), (278, 20), (279, pixels.nbytes)]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    file.write_bytes(head.ljust(200, b"\0") + pixels.tobytes())
    assert open_image(root, "ant/0.tif").unique().tolist() == [64 if white else 191]


def test_photographs_are_turned_as_they_say(root: Path) -> None:
    """Orientation 6: the first row is the right side of what was seen."""
    pixels = np.zeros((20, 20), np.uint8)
    pixels[:10] = 255
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(root / "train" / "ant" / "0.png", exif=exif)
    seen = open_image(root, "ant/0.png")
    assert (seen[0, :, 0].max(), seen[0, :, -1].min()) == (0, 255)


def test_test_is_the_test_set_where_there_is_val_too(root: Path) -> None:
    for name in CLASSES:
        (root / "test" / name).mkdir(parents=True)
        colours(9, 40, 40).save(root / "test" / name / "0.png")
    with pytest.warns(UserWarning, match=r"val is not used: .*test is the test set, and images to"):
        data = build("image-folder", FolderOptions(root=root, size=16, workers=0))
    assert len(data.test.labels) == 3
    # Images without labels are no test set.
    for name in CLASSES:
        (root / "test" / name / "0.png").rename(root / "test" / f"{name}.png")
        (root / "test" / name).rmdir()
    with pytest.warns(UserWarning, match=r"test is not used: .*val is the test set"):
        data = build("image-folder", FolderOptions(root=root, size=16, workers=0))
    assert len(data.test.labels) == 6


@pytest.mark.parametrize("name", ["dog", "bee/more"])
def test_a_folder_in_two_classes_is_refused(root: Path, name: str) -> None:
    (root / "train" / name).symlink_to(root / "train" / "ant")
    with pytest.raises(UserError, match=r"a folder of class 'ant' as well .*two labels; delete"):
        build("image-folder", FolderOptions(root=root, size=16, workers=0))
