"""What the stages of a run work with: its data, keys, network, and where they write."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from prunekit.catalog.component import Use
from prunekit.catalog.containment import ask
from prunekit.catalog.kinds import Facts
from prunekit.contexts import Context, DatasetContext, NetworkContext
from prunekit.contracts import Data, Metric, Split
from prunekit.data.batches import Arrays, Extra, Feed, fingerprint, hold_out, to_device
from prunekit.errors import DataMissingError, UserError
from prunekit.models.building import build_network, open_dataset
from prunekit.models.contract import check_start
from prunekit.pruning.masks import (
    State,
    count_weights,
    drop_changed,
    hash_masks,
    measure_sparsity,
    take_zeros,
)
from prunekit.reading import hash_file
from prunekit.recipe import reduction
from prunekit.recipe.describing import describe
from prunekit.recipe.plan import Plan, Run
from prunekit.recipe.stages import Stage
from prunekit.recipe.toml.sections import DataOptions
from prunekit.report import Note, Report, Stop
from prunekit.store.stages import StageFolder
from prunekit.store.tensors.checkpoint import read_model
from prunekit.store.tensors.weights import start_from
from prunekit.training.compute import Compute, open_compute


def open_place(plan: Plan) -> Compute:
    """Where a plan computes, on this machine. Raises `UserError` as `open_compute`."""
    place = plan.compute
    return open_compute(place.device, place.threads, place.sparse, plan.backend)


@dataclass(frozen=True)
class Loaded:
    """A data set ready for training, its parts on the device: `data.train` without validation."""

    data: Data
    validation: Split
    extra: Extra | None = None
    fingerprints: tuple[str, ...] = ()
    """What identifies the content of the data set and of the extra images."""


@dataclass(frozen=True)
class Unread:
    """A split whose files are missing: its size is known, its images cannot be read."""

    labels: torch.Tensor

    def batches(self, indices: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        raise RuntimeError("a preview reads no images")


@dataclass
class Inputs:
    """Loads the data of runs, once for all runs that share it.

    Where files are missing, a `smoke` run gets random images. A `preview` downloads nothing and
    gets the size that the data set declares.
    """

    compute: Compute
    report: Report
    smoke: bool = False
    preview: bool = False
    _loaded: dict[str, Loaded] = field(default_factory=dict)

    def load(self, run: Run) -> Loaded:
        """Raises `DataMissingError`, or `UserError` where the data is not what it should be."""
        chosen = run.data
        shared = replace(chosen, batch_size=1, augment=None)
        name = str([describe(run.dataset), describe(shared)])
        if name not in self._loaded:
            data = self._build(run.dataset, run, open_dataset(run))
            if not len(data.test.labels):
                way = "use it as the extra of another data set"
                raise UserError(f"{run.dataset.name} has no test images; {way}")
            extra = self._load_extra(chosen.extra, run, data) if chosen.extra else None
            prints = [fingerprint(part) for part in (data, extra) if part]
            train, validation = hold_out(
                data.train, chosen.fraction, chosen.validation, chosen.validation_seed
            )
            train, validation, test = (
                to_device(part, self.compute.device) for part in (train, validation, data.test)
            )
            # Let go of the whole training set: a large one would fill memory twice.
            data = replace(data, train=train, test=test)
            more = None
            if extra is not None:
                part = to_device(extra.train, self.compute.device)
                more = Extra(part, chosen.extra_ratio, chosen.extra_fraction)
            self._loaded[name] = Loaded(data, validation, more, tuple(prints))
        return self._loaded[name]

    def _build(self, use: Use[Data], run: Run, context: DatasetContext) -> Data:
        if self.preview and hasattr(use.options, "download"):
            use = replace(use, options=replace(use.options, download=False))
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                data = use.build(context)
            for text in dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning):
                self.report(Note(f"{use.name}: {text}", warning=True))
            return data
        except DataMissingError:
            facts = use.component.facts and ask(use, "facts")
            if not facts or not (self.smoke or self.preview):
                raise
            if self.smoke:
                self.report(Note(f"{use.name} is not here: random images instead", True))
                return random_data(facts, run.data)
            self.report(Note(f"{use.name} is not here; sizes are those it should have"))
            train, test = (
                Unread(torch.zeros(n, dtype=torch.int64)) for n in (facts.train, facts.test)
            )
            return Data(train, test, facts.shape, facts.classes, facts.augment, "missing")

    def _load_extra(self, use: Use[Data], run: Run, data: Data) -> Data:
        found = self._build(use, run, open_dataset(run, extra_of=data))
        if not len(found.train.labels):
            raise UserError(f"extra {use.name} has no training images")
        if found.shape != data.shape:
            raise UserError(
                f"extra {use.name} holds images {found.shape}, the data set has {data.shape} "
                "(channels, height, width); extra images must have the same size"
            )
        if (largest := int(found.train.labels.max())) >= data.classes:
            raise UserError(
                f"extra {use.name}: there is a label {largest}, but the data set's {data.classes} "
                f"classes have the labels 0 to {data.classes - 1}; number the classes alike"
            )
        return found

    def identify(self, run: Run) -> list[str]:
        """Hashes of all that a run reads: its data, the weights it starts from, other files."""
        files = [path for use in run.uses() for path in ask(use, "files")]
        files += [run.init] if run.init else []
        return [*self.load(run).fingerprints, *map(hash_file, files)]


def random_data(facts: Facts, chosen: DataOptions) -> Data:
    """Random images of the data set's shape, just enough of them for a smoke run."""
    generator = torch.Generator().manual_seed(0)

    def part(n: int) -> Arrays:
        images = torch.randint(256, (n, *facts.shape), generator=generator, dtype=torch.uint8)
        return Arrays(images, torch.randint(facts.classes, (n,), generator=generator))

    # Validation and `fraction` are parts of this: both must stay above nothing.
    share = chosen.fraction * min(chosen.validation or 1, 1 - chosen.validation)
    needed = reduction.SMOKE_BATCHES * reduction.SMOKE_BATCH_SIZE
    train, test = part(round(needed / share) + 2), part(needed)
    # Images in memory are cropped as they are, not at another size.
    names = tuple("crop" if name == "resized-crop" else name for name in facts.augment)
    return Data(train, test, facts.shape, facts.classes, names)


def build_state(
    run: Run,
    data: Data,
    compute: Compute,
    latest: StageFolder | None = None,
    *,
    weights: bool = True,
) -> State:
    """The network of a run: fresh, from the file of `init`, or as a stored stage left it.

    Zeros of a file without masks, or of a network from Python, are taken for removed weights.
    Without `weights` only its shapes matter, and nothing is fetched for a fresh one. Raises
    `UserError` for weights that nothing can start from.
    """
    fresh = weights and latest is None and run.init is None
    model = build_network(run, data.shape, data.classes, compute.device, fresh=fresh)
    state = State(model)
    if latest is not None:
        state.masks = read_model(latest.model, model)
    elif run.starts_given:
        masks = start_from(run.init, model) if run.init else None
        check_start(model, run.init, trained=run.trains_first)
        if masks is not None:
            state.masks = masks
            drop_changed(state)
        else:
            take_zeros(state, trained=run.trains_first)
    state.masks = {name: mask.to(compute.device) for name, mask in state.masks.items()}
    return state


@dataclass
class Place:
    """Where a run is: the network after its latest stage, built when it is first needed."""

    run: Run
    loaded: Loaded
    compute: Compute
    dense: StageFolder | None = None
    """What the first pretrain stage that removed nothing ended with."""
    _latest: StageFolder | None = None
    _state: State | None = None

    def open(self) -> State:
        """The network; a stage that trains changes it in place."""
        if self._state is None:
            self._state = build_state(self.run, self.loaded.data, self.compute, self._latest)
        return self._state

    def tell(self) -> list[str]:
        """What there is to say of how it was loaded, once."""
        notes = self.open().notes
        told, notes[:] = list(notes), []
        return told

    def move(self, stage: Stage, latest: StageFolder, reused: bool) -> None:
        """Note that a stage is done, whose network is in that folder."""
        if self.dense is None and stage.kind == "pretrain" and not stage.sparsity:
            self.dense = latest
        self._latest = latest
        self._state = None if reused else self._state


@dataclass(frozen=True)
class Work:
    """What a stage works with: its run, the data, and where it writes and reports."""

    run: Run
    loaded: Loaded
    compute: Compute
    folder: StageFolder
    key: str
    report: Report
    stop: Stop
    dense: StageFolder | None = None

    @property
    def device(self) -> torch.device:
        return self.compute.device

    def plain_context(self) -> Context:
        """What components without a network of their own are built with."""
        return Context(seed=self.run.seed, folder=self.run.folder)

    def context(self, stage: Stage, state: State) -> NetworkContext:
        return NetworkContext(
            seed=self.run.seed,
            folder=self.run.folder,
            shape=self.loaded.data.shape,
            classes=self.loaded.data.classes,
            device=self.device,
            stage=stage.kind,
            sparsity=stage.sparsity,
            model=state.model,
        )

    def feed(self, stage: Stage) -> Feed:
        loaded, chosen = self.loaded, self.run.data
        augment = loaded.data.augment if chosen.augment is None else chosen.augment
        return Feed(
            loaded.data.train,
            loaded.validation,
            chosen.batch_size,
            self.device,
            augment,
            loaded.extra,
            stage.limit,
            stage.options.validation_images,
        )


@dataclass(frozen=True)
class Outcome:
    """What a stage found."""

    metrics: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    records: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Warnings that belong to the result."""


def describe_masks(state: State) -> dict[str, Any]:
    """Metrics of a stage about its masks: the sparsity of the network, and their hash."""
    counts = count_weights(state.model, state.masks)
    sparsity = Metric(measure_sparsity(counts), unit="sparsity")
    return {"sparsity": sparsity, "masks": hash_masks(state.masks)}
