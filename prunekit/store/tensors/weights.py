"""Weights from files of other programs, under the names that they have in a network."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from prunekit.contracts import Masks
from prunekit.errors import UserError, relative
from prunekit.store.tensors.checkpoint import (
    PRUNED,
    find_misfit,
    load_weights,
    read_header,
    read_model,
)
from prunekit.store.tensors.states import read_states

Tensors = dict[str, Tensor]

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that wrappers add: DataParallel and averages, torch.compile, FSDP, checkpoints."""
SYNONYMS = {"downsample": "shortcut", "feature": "features"}
"""Parts of names that other code spells differently, such as timm and torchvision."""
HEADS = ("head.fc", "fc", "linear", "classifier", "head", "last_linear")
"""Names of the last layer."""
AVERAGES = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|shadow|teacher)(?![a-z])")
"""In the place of a state dict: averaged weights, beside those that were trained."""
CONSTANT = 4
"""A buffer of at most so many numbers that a file lacks, a mean of colors, is the network's own."""
SCORES = [end for end in PRUNED if end.startswith(".")]
"""What HYDRA and HARP write beside each `.weight`."""


@dataclass(frozen=True)
class Found:
    """Tensors of a file, by the names that they have in the network.

    Those that the network does not have keep their names; scores and masks of pruned weights follow
    their weights.
    """

    tensors: Tensors
    notes: tuple[str, ...] = ()
    """What someone who judges the network has to know."""


def find_weights(path: Path, model: nn.Module, entry: str | None = None) -> Found:
    """The weights for a network in any file: safetensors, or what `torch.save` wrote of tensors.

    They may lie inside dicts, and wrappers may have lengthened their names; names that differ
    otherwise are matched only where all shapes agree. `entry` says which state dict, if there are
    several. Where none fits, the likeliest is returned, for `load_weights` to say why.

    Raises `UserError` for a damaged file, a pickle that holds more than tensors and plain values,
    one without a state dict of numbers, and one with several that fit.
    """
    states = read_states(path)
    fits = [fit for where, state in states.items() for fit in _fit(where, state, model)]
    if entry is not None:
        places = dict.fromkeys([*states, *(fit.place for fit in fits)])
        fits = [fit for fit in fits if entry in (fit.where, fit.place)]
        states = {where: state for where, state in states.items() if where == entry}
        if not states and not fits:
            there = ", ".join(place or "one at the top (leave --entry out)" for place in places)
            raise UserError(f"{relative(path)} has no state dict {entry!r}; there is {there}")
    own = model.state_dict()
    fits = [fit for fit in fits if not fit.foreign] or fits[:1]
    if not fits:
        likeliest = max(map(_strip, states.values()), key=lambda state: len(own.keys() & state))
        _check_numbers(path, likeliest)
        return Found(likeliest)
    for fit in fits:
        _check_numbers(path, fit.tensors())
    chosen, others = _choose(path, fits)
    notes = []
    if others:
        named = ", ".join(fit.place for fit in others)
        notes.append(f"took {chosen.place or 'the weights at the top'}; there is also {named}")
    missing = [name for name in own if name not in chosen.names]
    filled = {n: torch.zeros_like(own[n]) if _counts_batches(n) else own[n] for n in missing}
    if constants := [name for name in missing if not _counts_batches(name)]:
        notes.append(f"does not hold {', '.join(constants)}: left as the network has them")
    return Found({**chosen.tensors(), **filled}, tuple(notes))


def start_from(path: Path, model: nn.Module) -> Masks | None:
    """Load the file of `init` into the network. Only files of prunekit say which masks they have.

    Raises `UserError` if the file is damaged, does not fit the network, or leaves doubts.
    """
    if path.suffix == ".safetensors" and "masked" in read_header(path):
        return read_model(path, model)
    found = find_weights(path, model)
    if found.notes:
        raise UserError(f"{relative(path)}: {found.notes[0]}; begin with: prunekit import dense")
    load_weights(model, found.tensors, path)
    return None


@dataclass(frozen=True)
class _Fit:
    """One way in which a state dict of a file is that of the network."""

    where: str
    """Where the state dict lies in the file."""
    start: str
    """What its names begin with, before those of the network."""
    names: dict[str, str]
    """Name in the network -> name in the file, without what pruning adds."""
    state: Tensors
    foreign: tuple[str, ...] = ()
    """Names in the file that are not the network's, and may decide something."""

    @property
    def place(self) -> str:
        return ".".join(part for part in (self.where, self.start.strip(".")) if part)

    def sources(self) -> dict[str, str]:
        """Name in the network, or what pruning makes of it -> name in the file."""
        found: dict[str, str] = {}
        for own, name in self.names.items():
            ends = [""] if name in self.state else ["_orig", "_mask"]
            if name.endswith("weight"):
                layer, owner = name.removesuffix(".weight"), own.removesuffix(".weight")
                found |= {owner + e: layer + e for e in SCORES if layer + e in self.state}
            found |= {own + end: name + end for end in ends}
        return found

    def tensors(self) -> Tensors:
        found = {own: self.state[name] for own, name in self.sources().items()}
        foreign = {n if n not in found else f"another {n}": self.state[n] for n in self.foreign}
        return foreign | found

    def equals(self, other: _Fit) -> bool:
        ours, theirs = self.tensors(), other.tensors()
        return ours.keys() == theirs.keys() and all(
            value.dtype == theirs[n].dtype and torch.equal(value, theirs[n])
            for n, value in ours.items()
        )


def _choose(path: Path, fits: list[_Fit]) -> tuple[_Fit, list[_Fit]]:
    """(the one to take, others with other values): trained weights rather than averaged ones."""
    distinct: list[_Fit] = []
    for fit in fits:
        if not any(fit.equals(other) for other in distinct):
            distinct.append(fit)
    trained = [fit for fit in distinct if not AVERAGES.search(fit.place.lower())]
    if len(distinct) > 1 and len(trained) != 1:
        named = ", ".join(fit.place or "the one at the top" for fit in distinct)
        raise UserError(
            f"{relative(path)} holds several state dicts that fit: {named}; take one with: "
            "prunekit import --entry"
        )
    chosen = (trained or distinct)[0]
    return chosen, [fit for fit in distinct if fit is not chosen]


def _fit(where: str, state: Tensors, model: nn.Module) -> list[_Fit]:
    """The ways in which a state dict fits the network, by the first view that finds any."""
    own = model.state_dict()
    small = {n for n, b in model.named_buffers() if b.numel() <= CONSTANT and "running_" not in n}
    needed = {name for name in own if name not in small and not _counts_batches(name)}
    found: list[_Fit] = []
    for plain in (state, _merge_pairs(state)):
        for view in (str, _unwrap, _unify):
            fits = [_Fit(where, *match, state) for match in _match(own, needed, plain, view)]
            used = {name for fit in fits for name in fit.sources().values()}
            starts = tuple(fit.start for fit in fits)
            rest = [
                name
                for name in state.keys() - used
                if not _is_idle(name, state[name], own, inside=view(name).startswith(starts))
            ]
            fits = [_Fit(where, fit.start, fit.names, state, tuple(sorted(rest))) for fit in fits]
            if fits and not rest:
                return fits
            found = found or fits
    return found


def _match(
    own: Mapping[str, Tensor], needed: set[str], state: Tensors, view: Callable[[str], str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """(what names in the file begin with, name in the network -> name in the file) of each match.

    Names are compared as `view` shows them, which must keep them apart on either side.
    """
    inside = [""]
    outer = {name.partition(".")[0] for name in needed}
    if len(outer) == 1 and all("." in name for name in needed):
        inside.append(f"{outer.pop()}.")  # the file may hold what the network wraps
    theirs = {view(name): name for name in state}
    for front in inside:
        known = [name for name in own if name.startswith(front)]
        ours = {view(name.removeprefix(front)): name for name in known}
        if len(ours) < len(known) or len(theirs) < len(state) or not needed:
            return
        anchor = max((short for short, name in ours.items() if name in needed), key=len)
        starts = {t.removesuffix(anchor) for t in theirs if f".{t}".endswith(f".{anchor}")}
        matched = False
        for start in sorted(starts):
            names = {
                name: theirs[start + short]
                for short, name in ours.items()
                if start + short in theirs and state[theirs[start + short]].shape == own[name].shape
            }
            if needed <= names.keys():
                matched = True
                yield start, names
        if matched:
            return


def _unwrap(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _unify(name: str) -> str:
    unified = ".".join(SYNONYMS.get(part, part) for part in _unwrap(name).split("."))
    layer, _, last = unified.rpartition(".")
    for head in HEADS:
        if f".{layer}".endswith(f".{head}"):
            return f"{layer.removesuffix(head)}head.{last}"
    return unified


def _merge_pairs(state: Tensors) -> Tensors:
    """NAME for each pair NAME_orig and NAME_mask of torch.nn.utils.prune."""
    pairs = {n[:-5] for n in state if n.endswith("_orig") and f"{n[:-5]}_mask" in state}
    merged = {f"{name}_orig": name for name in pairs}
    masks = {f"{name}_mask" for name in pairs}
    return {merged.get(name, name): value for name, value in state.items() if name not in masks}


def _counts_batches(name: str) -> bool:
    """Whether it is a counter that files from before torch 0.4.1 lack."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def _is_idle(name: str, value: Tensor, own: Mapping[str, Tensor], *, inside: bool) -> bool:
    """Whether a tensor decides nothing of a network that it may lie `inside` of.

    It is a counter, or belongs to the block that HYDRA's networks never use.
    """
    unused = ".sub_block1." in f".{name}" and not any(".sub_block1." in f".{n}" for n in own)
    counts = not (value.is_floating_point() or value.is_complex())
    return unused or (counts and (value.numel() == 1 or not inside))


def _strip(state: Tensors) -> Tensors:
    """Without `module.` and the like, where all names have it."""
    for wrapper in WRAPPERS:
        if all(name.startswith(f"{wrapper}.") for name in state):
            return _strip({name.partition(".")[2]: value for name, value in state.items()})
    return state


def _check_numbers(path: Path, tensors: Tensors) -> None:
    """Raise `UserError` for a tensor that is no plain array of numbers."""
    for name, value in tensors.items():
        if reason := find_misfit(value):
            raise UserError(f"{relative(path)} holds no plain weights: {name} is {reason}")
