"""The data set `digits`, which ships with prunekit and is small enough to prune in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prunekit import NoOptions
from prunekit.contexts import DatasetContext
from prunekit.contracts import Data
from prunekit_arrays.reading import to_data

TEST_IMAGES_PER_CLASS = 36


def build(options: NoOptions, context: DatasetContext) -> Data:
    """1,437 training and 360 test images; the file's counts 0 to 16 are scaled to 0 to 255.

    The test images are the last 36 of each class. The file is ordered by writer, so a random split
    would test on handwriting that was trained on (the nearest training image has the right class
    for 98 % of random test images, but for 96 % of these).
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as archive:
        counts, labels = archive["images"], archive["labels"]
    images = (counts.astype(np.uint16) * 255 + 8) // 16
    test = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        test[np.flatnonzero(labels == digit)[-TEST_IMAGES_PER_CLASS:]] = True
    arrays = {
        "x_train": images[~test],
        "y_train": labels[~test],
        "x_test": images[test],
        "y_test": labels[test],
    }
    return to_data(arrays, "digits", classes=10)
