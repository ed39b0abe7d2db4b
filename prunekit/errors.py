"""Errors that users see, each with a message of one line; `cli` maps them to exit codes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


class UserError(Exception):
    """Something the user can fix. The message says what is wrong and what to do instead.

    `code` is the exit status: 2 for usage, recipe and name errors, 1 for a run that failed.
    """

    code = 2


class RunError(UserError):
    """A run failed although its recipe is valid."""

    code = 1


class PluginError(RunError):
    """A plugin is broken: what it declares cannot be loaded or built."""


class EscapeError(Exception):
    """A plugin raised what is no `Exception`, such as `SystemExit`. The message is that one's."""


class DataMissingError(UserError):
    """The files of a data set are missing and cannot be downloaded (`--smoke` works without)."""


class OptionError(ValueError):
    """Raised in `__post_init__` of an options dataclass: the value of `field` is not allowed."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Interrupted(Exception):
    """The user stopped the run; everything computed so far is saved."""


MOST_SHOWN = 20
"""Most problems of a recipe that its error lists."""
LONGEST_VALUE = 200
"""Most characters of a value in the message of a problem."""
VALUE = re.compile(r"""'[^']*'|"[^"]*"|[^\s'"]{200,}""")


@dataclass(frozen=True, order=True)
class Place:
    """Where a recipe says something: a file and its line, or a command-line option."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        file = shorten(printable(self.file, keep=""))
        return f"{file}:{self.line}" if self.line else file


@dataclass(frozen=True, order=True)
class Problem:
    """One mistake in a recipe; `path` has the keys of what is wrong, where they are known."""

    place: Place
    message: str
    path: tuple[str | int, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{self.place}: {shorten(printable(self.message, keep=''))}"


def in_order(keys: Mapping[str, Place]) -> Iterator[tuple[str, bool]]:
    """Wrong keys in the order of the file, and whether the error shows them: advice for thousands
    takes long."""
    ordered = sorted(keys, key=keys.__getitem__)
    return ((key, n < MOST_SHOWN) for n, key in enumerate(ordered))


class RecipeError(UserError):
    """All mistakes of a recipe at once, in the order of the file."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = sorted(dict.fromkeys(problems))
        more = len(self.problems) - MOST_SHOWN
        rest = [f"and {more:,} more"] if more > 0 else []
        super().__init__("\n".join([*map(str, self.problems[:MOST_SHOWN]), *rest]))


def shorten(message: str) -> str:
    """The message without the middle of quoted values and of words that nobody would read."""
    return VALUE.sub(lambda found: shorten_value(found[0]), message)


def shorten_value(text: str, most: int = LONGEST_VALUE) -> str:
    """The text, without its middle where it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def explain_briefly(error: BaseException) -> str:
    r"""The type and the message of an exception, in one line.

    >>> explain_briefly(ValueError("no\n  luck")), explain_briefly(KeyboardInterrupt())
    ('ValueError: no luck', 'KeyboardInterrupt')
    """
    if isinstance(error, EscapeError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {describe(error)}".split()).removesuffix(":")


def describe(error: BaseException) -> str:
    """The message of an exception; that of a plugin may fail itself."""
    try:
        return str(error)
    except BaseException as failure:
        return f"(its message cannot be shown: {type(failure).__name__})"


def lacks_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whatever device: that says nothing about what was tried.

    >>> lacks_memory(MemoryError()), lacks_memory(RuntimeError("mat1 and mat2 do not fit"))
    (True, False)
    """
    words = ("not enough memory", "can't allocate memory", "out of memory", "_alloc_failed")
    # On a CPU torch raises what it raises for everything.
    told = isinstance(error, RuntimeError) and any(w in describe(error).lower() for w in words)
    return told or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def printable(text: str, keep: str = "\n\t") -> str:
    r"""The text with control characters, and those that change its direction, written as escapes.

    What comes from files and plugins may otherwise drive the terminal, or show something else than
    it says. `keep` are control characters that stay.

    >>> printable("a\x1b[2Jb\u202ec"), printable("a\nb", keep="")
    ('a\\u001b[2Jb\\u202ec', 'a\\nb')
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escape(c) for c in text)


def _escape(character: str) -> str:
    # As TOML and JSON write them, for a recipe may be what is printed.
    known = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    number = ord(character)
    return known.get(character) or (f"\\u{number:04x}" if number < 2**16 else f"\\U{number:08x}")


KEPT = ("density", "keep", "keep_ratio", "keep_rate", "kept")
"""Words for one minus the sparsity."""
SYNONYMS = {
    "learning_rate": "lr", "epsilon": "eps", "radius": "eps", "wd": "weight_decay",
    "decay": "weight_decay", "l2": "weight_decay", "bs": "batch_size", "num_epochs": "epochs",
    "n_epochs": "epochs", "epoch": "epochs", "iterations": "steps", "num_steps": "steps",
    "iters": "steps", "num_restarts": "restarts", "model": "architecture",
    "network": "architecture", "arch": "architecture", "data": "dataset", "loss": "objective",
    "criterion": "objective", "attack": "threat", "optim": "optimizer", "optimiser": "optimizer",
    "scheduler": "schedule", "lr_schedule": "schedule", "lr_scheduler": "schedule",
    "method": "pruner", "device": "compute", "stages": "stage", "evaluators": "with",
    "prune_ratio": "sparsity", "pruning_ratio": "sparsity", "ratio": "sparsity",
    "amount": "sparsity", "rate": "sparsity", "target_sparsity": "sparsity",
    "prune_rate": "sparsity", "type": "use", "magnitude": "lwm", "l1": "lwm",
    "l1_unstructured": "lwm", "popup": "score", "hydra": "score", "madry": "pgd-at",
    "adversarial": "pgd-at", "at": "pgd-at", "natural": "benign", "standard": "benign",
    "erm": "benign", "auto-attack": "autoattack", "aa": "autoattack", "train": "pretrain",
    "training": "pretrain", "pruning": "prune", "fine_tune": "finetune", "retrain": "finetune",
    "test": "evaluate", "eval": "evaluate", "linf_norm": "linf", "inf": "linf", "l_inf": "linf",
    "euclidean": "l2", "filter": "channel", "filters": "channel", "structured": "channel",
    "channels": "channel", "unstructured": "element", "weight": "element", "weights": "element",
    "horizontal_flip": "flip", "cosine_annealing": "cosine", "cosine_annealing_lr": "cosine",
    "step_lr": "step", "multi_step": "step", "multi_step_lr": "step", "constant_lr": "constant",
    "uniform": "layer", "layerwise": "layer",
    **dict.fromkeys(KEPT, "sparsity"),
}  # fmt: skip
"""Other words of the field -> what recipes call it."""


def _plain(word: str) -> str:
    """The word without what people write differently: case, dashes, underscores, spaces."""
    return re.sub(r"[\W_]", "", word.casefold())


_MEANT = {_plain(other): meant for other, meant in SYNONYMS.items()}


def translate(word: str, words: Iterable[str]) -> str:
    """The one of the words that is the same but for its spelling, or means the same; "" if none.

    >>> translate("CIFAR-10", ["cifar10"]), translate("learning_rate", ["lr"]), translate("x", "y")
    ('cifar10', 'lr', '')
    """
    plain = {_plain(known): known for known in sorted(words, reverse=True)}
    return plain.get(_plain(word)) or plain.get(_plain(_MEANT.get(_plain(word), "")), "")


def suggest(word: str, words: Iterable[str]) -> str:
    """Advice for a wrong word: the one that means the same or is most like it, or all there are.

    >>> suggest("trads", ["trades", "mart"]), suggest("x", ["trades", "mart"])
    ("did you mean 'trades'?", 'there are: mart, trades')
    >>> suggest("density", ["sparsity"])
    'write sparsity, which is 1 - density'
    """
    words = sorted(words)
    meant = translate(word, words)
    if meant == "sparsity" and _plain(word) in map(_plain, KEPT):
        return f"write sparsity, which is 1 - {word}"
    plain = {_plain(known): known for known in reversed(words)}
    close = [] if meant else difflib.get_close_matches(_plain(word), plain, n=1)
    if meant or close:
        return f"did you mean {meant or plain[close[0]]!r}?"
    return f"there are: {', '.join(words)}" if words else "it takes none"


def relative(path: Path) -> str:
    """The path for a message: relative to the current folder if it lies below it, in one line."""
    return printable(nearest(path), keep="")


def nearest(path: Path) -> str:
    """The path relative to the current folder if it lies below it, otherwise unchanged."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    # It lies elsewhere, or the current folder is gone.
    except (ValueError, OSError):
        return str(path)
