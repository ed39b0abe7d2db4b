"""What lies in folders of images: which files are images, of which class, and their hash."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from prunekit.errors import UserError, relative

ENDINGS = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".pnm"),
        *(".tif", ".tiff", ".gif", ".jp2", ".tga"),
    )
)
NOTES = frozenset((".txt", ".md", ".csv", ".json", ".xml", ".yaml", ".html", ".ini", ".db"))
"""Endings of files that may lie beside images; others are told."""
NO_CLASSES = frozenset(("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN"))
"""Folders that systems make, as they make those whose names begin with a dot."""
READ_BYTES = 2 * 2**30
"""Data sets up to this size are told apart by their content, larger ones by sizes and times."""


@dataclass(frozen=True)
class Listing:
    """The files of one split: sorted paths relative to its folder, with class numbers and sizes."""

    folder: Path
    classes: tuple[str, ...]
    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    stats: list[os.stat_result] = field(default_factory=list)


def list_images(folder: Path) -> Listing:
    """All images in the subfolders of `folder`, at any depth; their names are the classes.

    Runs of digits in names count as numbers: folder 2 comes before folder 10. Hidden files and
    folders are left out. Warns of files that look like no image, and of images outside the classes.
    Raises `UserError` if there are fewer than two classes, two whose names look the same, or one
    folder in two of them, and for a class without images, a link that leads nowhere or in a circle,
    and a file that is empty or none.
    """
    entries = _scan(folder)
    found = [name for name, entry in entries if entry.is_dir()]
    for one, other in pairwise(sorted(found, key=normalize)):
        if normalize(one) == normalize(other):
            raise UserError(
                f"{relative(folder)} has two folders that look the same, {one!a} and "
                f"{other!a} (Unicode can write such letters in two ways); merge them"
            )
    classes = tuple(sorted(found, key=_natural))
    if len(classes) < 2:
        raise UserError(
            f"{relative(folder)} has {len(classes)} folders; put the images of each class in its "
            "own folder there, named after the class"
        )
    listing = Listing(folder, classes)
    others: Counter[str] = Counter()
    owners: dict[str, str] = {}
    for label, name in enumerate(classes):
        before = len(listing.paths)
        for path, stat in _walk(folder / name, name, others, owners, (os.path.realpath(folder),)):
            listing.paths.append(os.path.relpath(path, folder))
            listing.labels.append(label)
            listing.stats.append(stat)
        if len(listing.paths) == before:
            raise UserError(
                f"{relative(folder / name)} has no images ({', '.join(sorted(ENDINGS))}); add "
                "some, or delete the folder"
            )
    if loose := [n for n, e in entries if not e.is_dir() and _find_ending(n) in ENDINGS]:
        warnings.warn(
            f"images left out because they lie in {relative(folder)} itself, in no class's folder: "
            f"{len(loose)}, such as {loose[0]}",
            stacklevel=2,
        )
    if others:
        named = ", ".join(f"{count} {ending}" for ending, count in sorted(others.items()))
        warnings.warn(f"files in {relative(folder)} left out: {named}", stacklevel=2)
    return listing


def normalize(name: str) -> str:
    """The one way of writing a name, where Unicode has several of the same look."""
    return unicodedata.normalize("NFC", name)


def _find_ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    parts = re.findall("([0-9]+)|([^0-9]+)", name)
    # Text comes after numbers, as in ASCII.
    return [(int(digits), "") if digits else (sys.maxsize, text) for digits, text in parts], name


def _scan(folder: Path) -> list[tuple[str, os.DirEntry[str]]]:
    """(name, entry) of what a folder holds, sorted by name; what systems hide there is left out."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry) for entry in entries)
    except OSError as error:
        raise UserError(f"{relative(folder)} cannot be read ({error.strerror})") from error
    found = [(name, e) for name, e in found if name[0] != "." and name not in NO_CLASSES]
    for _, entry in found:
        try:
            entry.stat()
        except OSError as error:
            reason = "leads nowhere" if error.errno == errno.ENOENT else error.strerror
            raise UserError(
                f"{relative(Path(entry.path))} is a link that cannot be followed ({reason}); "
                "delete or mend it"
            ) from error
    return found


def _walk(
    folder: Path,
    name: str,
    others: Counter[str],
    owners: dict[str, str],
    above: tuple[str, ...],
) -> Iterator[tuple[str, os.stat_result]]:
    """The images in a folder of a class and those below, sorted by path.

    Counts endings of other files in `others`, and notes the class of each real folder in `owners`.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{relative(folder)} links to a folder that it is in; delete the link")
    if (other := owners.setdefault(real, name)) != name:
        raise UserError(
            f"{relative(folder)} is a folder of class {other!r} as well (a link), and its images "
            "would have two labels; delete the link"
        )
    for file, entry in _scan(folder):
        ending = _find_ending(file)
        if entry.is_dir():
            yield from _walk(Path(entry.path), name, others, owners, (*above, real))
        elif ending in ENDINGS:
            if not entry.is_file() or not entry.stat().st_size:
                what = "is empty" if entry.is_file() else "is not a file"
                raise UserError(f"{relative(Path(entry.path))} {what}; delete or replace it")
            yield entry.path, entry.stat()
        elif ending not in NOTES:
            others[ending or "without an ending"] += 1


def tell_order(classes: Sequence[str]) -> None:
    """Warn where numbers in the names of classes decide their order (see `list_images`)."""
    plain = sorted(classes)
    if odd := [number for number, name in enumerate(classes) if plain[number] != name]:
        name = classes[odd[0]]
        warnings.warn(
            "class folders are in the order of the runs of digits in their names, not of signs and "
            f"points: {name} is class {odd[0]} (in text order, as torchvision has it, class "
            f"{plain.index(name)})",
            stacklevel=2,
        )


def hash_images(*parts: Listing) -> str:
    """A hash of all paths and images; where reading them takes too long, of sizes and times."""
    size = sum(stat.st_size for part in parts for stat in part.stats)
    if size > READ_BYTES:
        warnings.warn(
            f"{size / 1e9:.0f} GB of images are known again by their names, sizes and times of "
            "change, not by their content",
            stacklevel=2,
        )
    digest = hashlib.sha256()
    for part in parts:
        for path, stat in zip(part.paths, part.stats, strict=True):
            mark = f"{stat.st_size} {stat.st_mtime_ns}"
            if size <= READ_BYTES:
                mark = hashlib.sha256((part.folder / path).read_bytes()).hexdigest()
            named = f"{part.folder.name}/{Path(path).as_posix()}\0{mark}\n"
            digest.update(named.encode(errors="surrogateescape"))
    return digest.hexdigest()
