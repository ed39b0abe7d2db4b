"""The vision data sets, on made-up files in the three places where they may be. No network."""

from __future__ import annotations

import hashlib
import pickle
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import URLError

import numpy as np
import pytest
import torch
from prunekit_vision import VisionOptions, prunekit_datasets

from prunekit.catalog.component import Use
from prunekit.contexts import DatasetContext
from prunekit.contracts import Data
from prunekit.data.batches import Arrays
from prunekit.errors import DataMissingError, UserError
from prunekit.testing import example_context

COMPONENTS = {component.name: component for component in prunekit_datasets()}
RANDOM = np.random.default_rng(0)

Parts = dict[str, np.ndarray]


def build(name: str, root: Path | None, *, download: bool = False) -> Data:
    options = VisionOptions(root=root, download=download)
    use: Use[Data] = Use(COMPONENTS[name], options, "vision")
    return use.build(example_context(DatasetContext))


def images_of(split: object) -> torch.Tensor:
    assert isinstance(split, Arrays)
    return split.images


def make_arrays(*shape: int, train: int = 20, test: int = 10) -> Parts:
    return {
        "x_train": RANDOM.integers(2, 256, (train, *shape), dtype=np.uint8),
        "y_train": np.arange(train) % 10,
        "x_test": RANDOM.integers(2, 256, (test, *shape), dtype=np.uint8),
        "y_test": np.arange(test)[::-1] % 10,
    }


def check_same(data: Data, arrays: Parts) -> None:
    for split, part in ((data.train, "train"), (data.test, "test")):
        images = arrays[f"x_{part}"]
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        assert np.array_equal(images_of(split).numpy(), images)
        assert np.array_equal(split.labels.numpy(), arrays[f"y_{part}"])


def write_idx(folder: Path, arrays: Parts) -> None:
    """MNIST's files: two zeros, the type (8: bytes) and number of axes, the sizes, the data."""
    folder.mkdir(parents=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        for key, suffix in (("x", "images-idx3-ubyte"), ("y", "labels-idx1-ubyte")):
            array = arrays[f"{key}_{part}"].astype(np.uint8)
            sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
            header = bytes([0, 0, 8, array.ndim]) + sizes
            (folder / f"{prefix}-{suffix}").write_bytes(header + array.tobytes())


@pytest.fixture(autouse=True)
def _forbid_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        pytest.fail("a download was tried")

    for module in (datasets.cifar, datasets.mnist):
        monkeypatch.setattr(module, "download_and_extract_archive", refuse)
    monkeypatch.setattr(datasets.svhn, "download_url", refuse)


@pytest.fixture
def write_cifar(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Parts], None]:
    """Writes CIFAR's pickles, and tells torchvision their MD5 in place of the real ones."""
    from torchvision import datasets

    def write(folder: Path, arrays: Parts) -> None:
        of_100 = folder.name == "cifar-100-python"
        known = datasets.CIFAR100 if of_100 else datasets.CIFAR10
        label_key = "fine_labels" if of_100 else "labels"
        folder.mkdir(parents=True)
        for part in ("train", "test"):
            images = arrays[f"x_{part}"].transpose(0, 3, 1, 2)
            rows = images.reshape(len(images), -1)
            names = [name for name, _ in getattr(known, f"{part}_list")]
            chunks = np.array_split(np.arange(len(rows)), len(names))
            files = []
            for name, chunk in zip(names, chunks, strict=True):
                labels = arrays[f"y_{part}"][chunk].tolist()
                content = pickle.dumps({"data": rows[chunk], label_key: labels})
                (folder / name).write_bytes(content)
                files.append([name, hashlib.md5(content).hexdigest()])
            monkeypatch.setattr(known, f"{part}_list", files)
        content = pickle.dumps({known.meta["key"]: [str(k) for k in range(100 if of_100 else 10)]})
        (folder / known.meta["filename"]).write_bytes(content)
        meta = {**known.meta, "md5": hashlib.md5(content).hexdigest()}
        monkeypatch.setattr(known, "meta", meta)

    return write


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "mnist", "fashion-mnist"])
def test_npz_in_the_root(name: str, tmp_path: Path) -> None:
    arrays = make_arrays(*((28, 28) if "mnist" in name else (32, 32, 3)))
    np.savez(tmp_path / f"{name}.npz", **arrays)
    data = build(name, tmp_path)
    tell = COMPONENTS[name].facts
    assert tell is not None
    facts = tell(VisionOptions())
    assert (data.shape, data.classes, data.augment) == (facts.shape, facts.classes, facts.augment)
    check_same(data, arrays)


def test_facts_of_the_real_sets() -> None:
    told = {}
    for name, component in COMPONENTS.items():
        if component.options is not VisionOptions:
            continue
        assert component.facts is not None
        facts = component.facts(VisionOptions())
        told[name] = (facts.shape, facts.classes, facts.train, facts.test, facts.augment)
    assert told == {
        "cifar10": ((3, 32, 32), 10, 50_000, 10_000, ("crop", "flip")),
        "cifar100": ((3, 32, 32), 100, 50_000, 10_000, ("crop", "flip")),
        "svhn": ((3, 32, 32), 10, 73_257, 26_032, ("crop",)),
        "mnist": ((1, 28, 28), 10, 60_000, 10_000, ()),
        "fashion-mnist": ((1, 28, 28), 10, 60_000, 10_000, ()),
    }


@pytest.mark.parametrize("below", ["", "torchvision"])
@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_mnist_as_torchvision_keeps_it(name: str, folder: str, below: str, tmp_path: Path) -> None:
    arrays = make_arrays(28, 28)
    write_idx(tmp_path / below / folder / "raw", arrays)
    data = build(name, tmp_path)
    check_same(data, arrays)
    assert (data.shape, data.classes) == ((1, 28, 28), 10)


def write_svhn(folder: Path, arrays: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """SVHN's .mat files: images last, zero is class 10. torchvision is told their MD5."""
    from scipy.io import savemat
    from torchvision import datasets

    folder.mkdir(parents=True, exist_ok=True)
    known = dict(datasets.SVHN.split_list)
    for part in ("train", "test"):
        labels = arrays[f"y_{part}"].astype(np.uint8)
        labels[labels == 0] = 10
        file = folder / f"{part}_32x32.mat"
        savemat(file, {"X": arrays[f"x_{part}"].transpose(1, 2, 3, 0), "y": labels[:, None]})
        known[part] = ["", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", known)


@pytest.mark.parametrize("below", ["", "torchvision"])
def test_svhn_as_torchvision_keeps_it(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy")
    arrays = make_arrays(32, 32, 3)
    write_svhn(tmp_path / below, arrays, monkeypatch)
    data = build("svhn", tmp_path)
    check_same(data, arrays)
    assert (data.shape, data.classes, data.augment) == ((3, 32, 32), 10, ("crop",))


def test_svhn_with_a_file_missing_or_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy")
    monkeypatch.chdir(tmp_path)
    write_svhn(tmp_path, make_arrays(32, 32, 3), monkeypatch)
    test = tmp_path / "test_32x32.mat"
    for damage in (lambda: test.write_bytes(test.read_bytes()[:-1]), test.unlink):
        damage()
        with pytest.raises(UserError) as error:
            build("svhn", tmp_path)
        assert str(error.value).startswith(
            "train_32x32.mat and test_32x32.mat: incomplete or damaged (torchvision: "
        )
        assert "\n" not in str(error.value)


def test_svhn_is_downloaded_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    from torchvision.datasets import svhn

    arrays = make_arrays(32, 32, 3)
    write_svhn(tmp_path / "server", arrays, monkeypatch)

    def fetch(url: str, root: Path, filename: str, md5: str) -> None:
        (Path(root) / filename).write_bytes((tmp_path / "server" / filename).read_bytes())

    monkeypatch.setattr(svhn, "download_url", fetch)
    check_same(build("svhn", tmp_path / "data", download=True), arrays)
    names = sorted(path.name for path in (tmp_path / "data").iterdir())
    assert names == ["test_32x32.mat", "train_32x32.mat"]
    check_same(build("svhn", tmp_path / "data"), arrays)


@pytest.mark.parametrize("below", ["", "torchvision"])
@pytest.mark.parametrize(
    ("name", "folder", "classes"),
    [("cifar10", "cifar-10-batches-py", 10), ("cifar100", "cifar-100-python", 100)],
)
def test_cifar_as_torchvision_keeps_it(
    name: str,
    folder: str,
    classes: int,
    below: str,
    tmp_path: Path,
    write_cifar: Callable[[Path, Parts], None],
) -> None:
    arrays = make_arrays(32, 32, 3)
    arrays["y_train"][3] = classes - 1
    write_cifar(tmp_path / below / folder, arrays)
    data = build(name, tmp_path)
    check_same(data, arrays)
    assert (data.classes, data.augment) == (classes, ("crop", "flip"))


def test_npz_comes_before_torchvisions_files(tmp_path: Path) -> None:
    arrays = make_arrays(28, 28)
    np.savez(tmp_path / "mnist.npz", **arrays)
    write_idx(tmp_path / "MNIST" / "raw", make_arrays(28, 28))
    check_same(build("mnist", tmp_path), arrays)


def test_root_is_the_environments_then_the_folder_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = make_arrays(28, 28), make_arrays(28, 28)
    for folder, arrays in ((".data", here), ("elsewhere", there)):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "mnist.npz", **arrays)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRUNEKIT_DATA", raising=False)
    check_same(build("mnist", None), here)
    monkeypatch.setenv("PRUNEKIT_DATA", str(tmp_path / "elsewhere"))
    check_same(build("mnist", None), there)
    check_same(build("mnist", tmp_path / ".data"), here)


def test_npz_of_another_set_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("cifar10.npz", **make_arrays(28, 28))
    with pytest.raises(UserError) as error:
        build("cifar10", tmp_path)
    assert str(error.value) == (
        "cifar10.npz has images (1, 28, 28), but cifar10 has (3, 32, 32) (channels, height, "
        'width); for your own arrays, write use = "npz"'
    )
    arrays = make_arrays(28, 28)
    arrays["y_test"] = arrays["y_test"] + 1
    np.savez("mnist.npz", **arrays)
    message = "mnist.npz: there is a label 10, but 10 classes have the labels 0 to 9"
    with pytest.raises(UserError, match=message):
        build("mnist", tmp_path)


def set_off() -> NoReturn:
    pytest.fail("a pickle was opened that nobody had verified")


class Bomb:
    """Goes off when it is unpickled."""

    def __reduce__(self) -> Any:
        return (set_off, ())


def test_pickles_of_another_checksum_are_never_opened(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_cifar: Callable[[Path, Parts], None],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data_batch_2", "test_batch", "batches.meta"):
        root = tmp_path / name
        write_cifar(root / "cifar-10-batches-py", make_arrays(32, 32, 3))
        (root / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(UserError) as error:
            build("cifar10", root, download=True)
        assert not isinstance(error.value, DataMissingError)
        text = str(error.value)
        assert text.startswith(f"{name}/cifar-10-batches-py: incomplete or damaged (torchvision:")
        assert text.endswith("; delete it, and the next run downloads it again")


@pytest.mark.parametrize("keep", [0, 4, 700, 15_000])
def test_mnist_cut_off(keep: int, tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST" / "raw", make_arrays(28, 28))
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="MNIST: incomplete or damaged") as error:
        build("mnist", tmp_path)
    assert "\n" not in str(error.value)


def test_mnist_with_a_file_missing(tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST" / "raw", make_arrays(28, 28))
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="MNIST: incomplete or damaged"):
        build("mnist", tmp_path)


def test_nothing_there_and_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataMissingError) as error:
        build("cifar10", tmp_path / "data")
    assert str(error.value) == (
        "cifar10 was not found: there is no data/cifar10.npz, no cifar-10-batches-py in data or "
        "its folder torchvision, and download = false; put one of them there, or set root or "
        "PRUNEKIT_DATA to the folder that has it"
    )
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "module"), [("cifar10", "cifar"), ("mnist", "mnist"), ("fashion-mnist", "mnist")]
)
def test_failed_download_is_told_in_one_line(
    name: str,
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from torchvision import datasets

    def fail(*args: object, **kwargs: object) -> NoReturn:
        print("Downloading ...")
        raise URLError("no network\nat all")

    monkeypatch.setattr(getattr(datasets, module), "download_and_extract_archive", fail)
    with pytest.raises(DataMissingError) as error:
        build(name, tmp_path / "data", download=True)
    text = str(error.value)
    assert text.startswith(f"{name} was not found: there is no ")
    assert "the download failed: " in text
    assert "<urlopen error no network at all>" in text
    assert "\n" not in text
    assert capfd.readouterr().out == ""
    # Nothing is left behind that a later run could take for the data.
    assert list((tmp_path / "data").iterdir()) == []


def test_download_lands_in_the_root_and_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from torchvision.datasets import mnist

    arrays, patience = make_arrays(28, 28), []

    def fetch(url: str, download_root: str, **kwargs: object) -> None:
        print("Downloading", url)
        print("50 %", file=sys.stderr)
        patience.append(socket.getdefaulttimeout())
        folder = Path(download_root)
        if not (folder / "train-images-idx3-ubyte").exists():
            folder.rmdir()
            write_idx(folder, arrays)

    monkeypatch.setattr(mnist, "download_and_extract_archive", fetch)
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(7.5)
        data = build("mnist", tmp_path / "data", download=True)
        assert socket.getdefaulttimeout() == 7.5
    finally:
        socket.setdefaulttimeout(before)
    check_same(data, arrays)
    assert capfd.readouterr() == ("", "")
    # A silent server is given up on.
    assert patience
    assert set(patience) == {20}
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]
    check_same(build("mnist", tmp_path / "data", download=False), arrays)
