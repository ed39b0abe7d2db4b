"""Splits, augmentation and batches on images small enough to know by heart."""

import pytest
import torch

from prunekit.contracts import Data
from prunekit.data import batches as module
from prunekit.data.batches import (
    Arrays,
    Extra,
    Feed,
    Subset,
    augment,
    eval_batches,
    fingerprint,
    hold_out,
    subset,
    to_pixels,
)
from prunekit.data.seeds import generator
from prunekit.errors import UserError

CPU = torch.device("cpu")


def make_split(n=10):
    """Image i is 2x2 of value i, its label i."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2).contiguous()
    return Arrays(images, torch.arange(n))


class Streamed:
    """A split that is not in memory."""

    def __init__(self, split):
        self.split = split

    @property
    def labels(self):
        return self.split.labels

    def batches(self, indices):
        return self.split.batches(indices)


@pytest.mark.parametrize("wrap", [lambda split: split, Streamed], ids=["arrays", "streamed"])
def test_hold_out_is_disjoint_and_complete(wrap):
    train, held = hold_out(wrap(make_split(20)), 1.0, 0.25, 7)
    assert (len(train.labels), len(held.labels)) == (15, 5)
    assert sorted([*train.labels.tolist(), *held.labels.tolist()]) == list(range(20))
    assert train.labels.tolist() == sorted(train.labels.tolist())
    (images,) = held.batches([torch.arange(5)])
    assert images[:, 0, 0, 0].tolist() == held.labels.tolist()


def test_hold_out_follows_its_own_seed_alone():
    torch.manual_seed(1)
    first = hold_out(make_split(50), 1.0, 0.2, 0)[1].labels
    torch.manual_seed(2)
    assert torch.equal(first, hold_out(make_split(50), 1.0, 0.2, 0)[1].labels)
    assert not torch.equal(first, hold_out(make_split(50), 1.0, 0.2, 1)[1].labels)


def test_hold_out_of_a_fraction_and_of_nothing():
    train, held = hold_out(make_split(20), 0.5, 0.2, 0)
    assert (len(train.labels), len(held.labels)) == (8, 2)
    train, held = hold_out(make_split(20), 1.0, 0.0, 0)
    assert (len(train.labels), len(held.labels)) == (20, 0)


@pytest.mark.parametrize(("fraction", "part"), [(1.0, 0.01), (0.05, 0.5), (0.05, 0.9)])
def test_an_empty_part_is_an_error(fraction, part):
    with pytest.raises(UserError, match="leaves some of each"):
        hold_out(make_split(20), fraction, part, 0)


def test_subsets_of_streams_follow_the_index():
    part = subset(Streamed(make_split()), torch.tensor([7, 2, 5]))
    assert isinstance(part, Subset)
    assert part.labels.tolist() == [7, 2, 5]
    first, second = part.batches([torch.tensor([2]), torch.tensor([0, 1])])
    assert first.flatten().unique().tolist() == [5]
    assert second[:, 0, 0, 0].tolist() == [7, 2]


def test_pixels_are_in_the_unit_interval():
    images = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    pixels = to_pixels(images, CPU)
    assert pixels.dtype == torch.float32
    assert pixels.flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert images.flatten().tolist() == [0, 51, 255]


def test_fingerprints_follow_the_content():
    data = Data(make_split(), make_split(3), (1, 2, 2), 10)
    first = fingerprint(data)
    assert first == fingerprint(Data(make_split(), make_split(3), (1, 2, 2), 10))
    data.test.images[0, 0, 0, 0] += 1
    assert first != fingerprint(data)
    data.test.images[0, 0, 0, 0] -= 1
    data.train.labels[0] += 1
    assert first != fingerprint(data)
    assert fingerprint(Data(make_split(), make_split(), (1, 2, 2), 10, fingerprint="x")) == "x"
    with pytest.raises(UserError, match="fingerprint"):
        fingerprint(Data(Streamed(make_split()), make_split(), (1, 2, 2), 10))


# Augmentation


def numbered(b=1, c=1, size=8):
    """Pixels 1, 2, 3, ...: no two of an image are equal, none is the padding's 0."""
    count = c * size * size
    return (torch.arange(count, dtype=torch.uint8) + 1).view(1, c, size, size).repeat(b, 1, 1, 1)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 1), (2, 0), (0, 2)])
def test_crop_at_given_offsets(monkeypatch, row, column):
    """8 pixels: padded by 1 to 10, so offset (1, 1) is the image itself, (0, 0) moves it down."""
    offsets = iter([torch.tensor([row]), torch.tensor([column])])
    monkeypatch.setattr(module.torch, "randint", lambda *_, **__: next(offsets))
    image = numbered()
    got = augment(image, ["crop"], generator(0))[0, 0]
    expected = torch.zeros(10, 10, dtype=torch.uint8)
    expected[1:9, 1:9] = image[0, 0]
    assert torch.equal(got, expected[row : row + 8, column : column + 8])


def test_crops_are_windows_of_the_padded_image_each_its_own():
    images = numbered(64, 3)
    images[:, 1:] = 0
    images[:, 2] = images[:, 0]
    got = augment(images, ["crop"], generator(1))
    assert got.dtype == torch.uint8
    assert got.shape == images.shape
    assert got.is_contiguous()
    padded = torch.nn.functional.pad(images[0], (1, 1, 1, 1))
    windows = [padded[:, r : r + 8, c : c + 8] for r in range(3) for c in range(3)]
    hits = [[i for i, w in enumerate(windows) if torch.equal(image, w)] for image in got]
    assert all(len(hit) == 1 for hit in hits)
    assert {hit[0] for hit in hits} == set(range(9))


def test_crop_of_images_that_are_not_square():
    images = torch.ones(4, 1, 16, 8, dtype=torch.uint8)
    assert augment(images, ["crop", "flip"], generator(0)).shape == images.shape


def test_flip_mirrors_about_half_of_the_images():
    images = numbered(200)
    got = augment(images, ["flip"], generator(0))
    same = [torch.equal(a, b) for a, b in zip(got, images, strict=True)]
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(got, images, strict=True)]
    assert all(s != m for s, m in zip(same, mirrored, strict=True))
    assert 70 < sum(mirrored) < 130


def test_augmentation_leaves_the_original_alone():
    images = numbered(4)
    augment(images, ["crop", "flip"], generator(0))
    assert torch.equal(images, numbered(4))
    assert torch.equal(augment(images, [], generator(0)), images)


# Batches


def epoch(split, size, names, seed, skip=0, **options):
    feed = Feed(split, split, size, CPU, tuple(names), **options)
    batches = list(feed.epoch(seed, skip))
    assert feed.count() == len(batches) + skip
    return batches


def collect(split=None, size=4, names=(), seed=5, skip=0, most=None):
    return epoch(split or make_split(), size, names, seed, skip, limit=most)


def test_an_epoch_has_every_image_once_in_an_order_the_seed_decides():
    batches = collect()
    order = torch.cat([y for _, y in batches]).tolist()
    assert [len(y) for _, y in batches] == [4, 4, 2]
    assert sorted(order) == list(range(10))
    assert order != list(range(10))
    for x, y in batches:
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), y)
    torch.manual_seed(123)
    assert torch.cat([y for _, y in collect()]).tolist() == order
    assert torch.cat([y for _, y in collect(seed=6)]).tolist() != order


@pytest.mark.parametrize("skip", [0, 1, 2, 3])
def test_skipping_changes_nothing_in_the_others(skip):
    split = Arrays(torch.randint(256, (10, 1, 8, 8), dtype=torch.uint8), torch.arange(10))
    names = ("crop", "flip")
    everything = collect(split=split, names=names)
    rest = collect(split=split, names=names, skip=skip)
    assert len(rest) == 3 - skip
    for (x, y), (a, b) in zip(everything[skip:], rest, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)


def test_batches_of_an_epoch_are_augmented_differently():
    split = Arrays(numbered(1).repeat(8, 1, 1, 1), torch.zeros(8, dtype=torch.int64))
    (first, _), (second, _) = collect(split=split, names=("crop", "flip"))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("n", "size", "most", "sizes"),
    [(10, 4, None, [4, 4, 2]), (9, 4, None, [4, 4]), (9, 4, 1, [4]), (3, 1, None, [1, 1, 1]),
     (4, 4, 9, [4]), (1, 4, None, []), (2, 4, None, [2])],
)  # fmt: skip
def test_batch_counts(n, size, most, sizes):
    """A last image by itself is left out: batch normalisation cannot use it."""
    got = [len(y) for _, y in collect(split=make_split(n), size=size, most=most)]
    assert got == sizes
    assert Feed(make_split(n), make_split(n), size, CPU, limit=most).count() == len(sizes)


@pytest.mark.parametrize(("images", "sizes"), [(None, [4, 4, 2]), (5, [4, 1])])
def test_evaluation_goes_in_order(images, sizes):
    index = None if images is None else torch.arange(images)
    batches = list(eval_batches(make_split(), 4, CPU, index))
    assert [len(y) for _, y in batches] == sizes
    assert torch.cat([y for _, y in batches]).tolist() == list(range(sum(sizes)))
    assert (batches[0][0][:, 0, 0, 0] * 255).round().tolist() == [0, 1, 2, 3]


def test_a_fraction_of_every_batch_is_extra():
    """70 % of 10 images, and of the last 2 all but one; an epoch is as long as without."""
    labelled = make_split(32)
    extra = Extra(
        Arrays(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(50, 55)), fraction=0.7
    )
    batches = epoch(labelled, 10, (), 0, extra=extra)
    made = [((y < 50).sum().item(), (y >= 50).sum().item()) for _, y in batches]
    assert made == [(3, 7), (3, 7), (3, 7), (1, 1)]
    own = torch.cat([y[y < 50] for _, y in batches]).tolist()
    assert len(set(own)) == len(own)
    later = torch.cat([y[y < 50] for _, y in epoch(labelled, 10, (), 1, extra=extra)])
    assert set(later.tolist()) != set(own)
    for (x, y), (a, b) in zip(batches[2:], epoch(labelled, 10, (), 0, 2, extra=extra), strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)


def test_extra_images_join_every_batch_in_their_ratio():
    labelled = Arrays(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64))
    images = torch.arange(1, 4, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    extra = Extra(Arrays(images.contiguous(), torch.tensor([1, 2, 3])), ratio=1.5)
    batches = epoch(labelled, 2, (), 0, extra=extra)
    # The last batch of one image is left out; of the others each has round(1.5 * 2) = 3 more.
    assert [len(y) for _, y in batches] == [5, 5]
    for x, y in batches:
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), y)
        # 3 of 3: a round of the extra images is complete before the next begins.
        assert sorted(y.tolist()) == [0, 0, 1, 2, 3]
    resumed = epoch(labelled, 2, (), 0, skip=1, extra=extra)
    assert torch.equal(resumed[0][0], batches[1][0])
    alone = epoch(labelled, 2, (), 0)
    assert [len(y) for _, y in alone] == [2, 2]


def test_a_split_that_augments_is_asked_to():
    class Stream:
        labels = torch.arange(6)

        def batches(self, indices):
            raise AssertionError("would not be augmented")

        def augmented_batches(self, indices, names, batch_seeds):
            for index, seed in zip(indices, batch_seeds, strict=True):
                asked.append((index.tolist(), names, seed))
                yield index.to(torch.uint8).view(-1, 1, 1, 1)

    asked = []
    part = subset(Stream(), torch.tensor([5, 4, 3, 2]))
    batches = epoch(part, 2, ("resized-crop",), 0)
    assert sorted(y for _, labels in batches for y in labels.tolist()) == [2, 3, 4, 5]
    for (x, y), (index, names, _) in zip(batches, asked, strict=True):
        assert y.tolist() == index
        assert names == ("resized-crop",)
        assert (x[:, 0, 0, 0] * 255).round().tolist() == y.tolist()
    assert len({seed for *_, seed in asked}) == 2


def test_resized_crop_is_for_streams():
    with pytest.raises(UserError, match="resized-crop"):
        augment(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), ("resized-crop",), torch.Generator())
