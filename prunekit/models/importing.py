"""Networks that other programs trained and pruned -> run folders like any other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor, nn

from prunekit.catalog.component import NoOptions
from prunekit.catalog.registry import load_registry
from prunekit.contracts import Masks
from prunekit.errors import UserError, relative
from prunekit.models.building import build_network, describe_model, find_shape
from prunekit.models.contract import find_no_weights
from prunekit.models.failures import explained
from prunekit.pruning.layers import describe_faults, find_faults, find_prunable
from prunekit.pruning.masks import (
    State,
    apply_masks,
    describe_counts,
    find_broken,
    find_zeros,
    hash_masks,
)
from prunekit.reading import check_file, hash_file
from prunekit.recipe.plan import make_plan
from prunekit.recipe.stages import Stage
from prunekit.recipe.toml.document import Recipe, locate_options, override
from prunekit.report import Tell
from prunekit.store.files import make_folder
from prunekit.store.layout import MODEL, RECIPE
from prunekit.store.runs import RunFolder
from prunekit.store.stages import StageResult
from prunekit.store.tensors.checkpoint import load_weights, write_model
from prunekit.store.tensors.weights import SCORES, find_weights

Tensors = dict[str, Tensor]

RECIPE_START = f"""\
# Imported from {{file}} ({{source.kind}}).
# To finetune it, write a recipe that extends this one:
#
#   extends = "{{out}}/{RECIPE}"
#   objective = "trades"
{{threat}}#   [[stage]]
#   kind = "finetune"
#   epochs = 100

"""
"""The first lines of the recipe of an imported network."""
THREAT_LINES = '#   [threat]\n#   eps = "8/255"\n'


@dataclass(frozen=True)
class Source:
    """A file of another program, and what it does not say itself."""

    path: Path
    kind: str
    """"hydra", "harp", "torch-prune" or "dense"."""
    sparsity: float | None = None
    alpha: float = 0.1
    """HARP: every layer keeps at least alpha times the keep ratio."""
    entry: str | None = None
    """Where the state dict lies in the file, if there are several that fit."""

    def error(self, message: str) -> UserError:
        """An error whose message starts with the name of the file."""
        return UserError(f"{relative(self.path)} {message}")


def count_imported(n: int, keep_ratio: float) -> int:
    """How many of n weights HYDRA keeps: n - int((1 - k) n), rounding of floats included.

    >>> count_imported(1000, 0.1), count_imported(10, 0.3), count_imported(10, 0.9)
    (100, 3, 10)
    """
    return n - int((1 - keep_ratio) * n)


def find_keep_ratio(sparsity: float) -> float:
    """The keep ratio that a user of HYDRA wrote: 0.1 for 0.9, where 1 - 0.9 is a little less.

    >>> find_keep_ratio(0.9), find_keep_ratio(0.95)
    (0.1, 0.05)
    """
    return round(1 - sparsity, 10)


def import_model(
    source: Source,
    sections: Mapping[str, Any],
    settings: Sequence[str],
    out: Path,
    tell: Tell,
) -> RunFolder:
    """Make a run folder of a file. `sections` are those of the recipe that the folder gets.

    Doubts about the network are told and recorded. Raises `UserError` if the file holds more than
    tensors or does not fit the network.
    """
    check_file(source.path)
    if source.kind in ("hydra", "harp") and source.sparsity is None:
        raise UserError(f"a {source.kind} file does not say its keep ratio; give --sparsity 0.9")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{relative(out)} exists already; choose another folder with --out")
    options = {
        ("dataset", "use"): ("--dataset", sections["dataset"]["use"]),
        ("architecture", "use"): ("--model", sections["architecture"]["use"]),
        ("threat", "eps"): ("--eps", sections.get("threat", {}).get("eps")),
    }
    recipe = Recipe(out / RECIPE, dict(sections), locate_options(options), written=False)
    override(recipe, settings)
    plan = make_plan(recipe, load_registry())
    (run,) = plan.runs
    with explained(run):
        shape, classes = find_shape(run)
        model = build_network(run, shape, classes, fresh=False)
    weights, masks, told = read_source(source, model)
    lost = {n: masks.pop(n) for n, fault in find_faults(model).items() if fault and n in masks}
    weights |= {name: weights[name].masked_fill(~mask, 0) for name, mask in lost.items()}
    load_weights(model, weights, source.path)
    if nothing := find_no_weights(model):
        raise source.error(f"holds {nothing}")
    apply_masks(model, masks)
    if broken := find_broken(model):
        raise source.error(f"holds {broken}")
    digest = hash_file(source.path)
    counts = describe_counts(State(model, masks))
    metrics = {
        "sparsity": 1 - counts["kept"] / counts["weights"],
        "masks": hash_masks(masks),
        "counts": counts,
    }
    header = {
        **describe_model(run, shape, classes),
        "stage": {
            "kind": "import",
            "format": source.kind,
            "file": source.path.name,
            "sha256": digest,
            "sparsity": source.sparsity,
        },
        "sparsity": metrics["sparsity"],
        "smoke": False,
    }
    doubts = [*told, *_find_doubts(source, model, masks)]
    if changed := describe_faults(model, list(lost)):
        doubts.append(f"left dense although they have masks: {changed}")
    for doubt in doubts:
        tell(f"{relative(source.path)}: {doubt}")
    notes = [f"{source.kind} file {source.path.name}, SHA-256 {digest}", *doubts]
    make_folder(out)
    try:
        write_model(out / MODEL, model, masks, header)
        document = plan.describe(run)
        document["architecture"]["init"] = MODEL
        threat = "" if run.threat else THREAT_LINES
        start = RECIPE_START.format(source=source, file=source.path.name, out=out, threat=threat)
        folder = RunFolder(out, plan, run)
        folder.start({"device": "cpu"}, start + tomli_w.dumps(document))
        stage = Stage("import", "import", 0, NoOptions())
        folder.add(stage, "", StageResult(metrics, notes=notes), False)
        folder.close("done")
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return folder


def _find_doubts(source: Source, model: nn.Module, masks: Masks) -> Iterator[str]:
    """What someone who judges the network has to know."""
    for name, mask in masks.items():
        if not mask.any():
            yield f"no weight of {name} is kept"
    if source.kind == "harp" and (dense := find_prunable(model).keys() - masks.keys()):
        yield f"without popup_scores, so left dense: {', '.join(sorted(dense))}"


def read_source(source: Source, model: nn.Module) -> tuple[Tensors, Masks, tuple[str, ...]]:
    """(plain weights, masks, doubts) of a file, with the names that they have in the network.

    Raises `UserError` if the file is not of its kind.
    """
    found = find_weights(source.path, model, source.entry)
    state = found.tensors
    if source.kind == "torch-prune":
        return *_read_torch_prune(state, source, model), found.notes
    prunable = find_prunable(model)
    if source.kind == "dense":
        return state, find_zeros({n: state[n] for n in prunable if n in state}), found.notes
    weights, masks = _read_scored(state, source)
    # Names that the file does not have at all are missing weights, which loading reports.
    unscored = sorted(prunable.keys() & weights.keys() - masks.keys())
    if source.kind == "hydra" and unscored:
        layers = ", ".join(name.rpartition(".")[0] for name in unscored[:8])
        raise source.error(f"lacks the popup_scores of {layers}")
    return weights, masks, found.notes


def _read_scored(state: Tensors, source: Source) -> tuple[Tensors, Masks]:
    """HYDRA and HARP: `popup_scores` beside each `weight`; those of largest magnitude are kept."""
    assert source.sparsity is not None
    keep_ratio = find_keep_ratio(source.sparsity)
    rated, named = SCORES
    scores, state = _split(state, named)
    if not scores:
        raise source.error(
            "holds no popup_scores; import plain weights, zero where they are removed, with: "
            "prunekit import dense"
        )
    rates: Tensors = {}
    if source.kind == "harp":
        rates, state = _split(state, rated)
        if missing := scores.keys() - rates.keys():
            raise source.error(f"lacks {min(missing)}{rated} of a harp file")
    masks = {}
    for layer, score in scores.items():
        name = f"{layer}.weight"
        if name not in state or state[name].shape != score.shape:
            raise source.error(
                f"has {layer}.popup_scores {tuple(score.shape)} that fit no weight of that shape "
                "(HARP's pruning of whole channels is not supported)"
            )
        if score.isnan().any():
            raise source.error(f"holds NaN in {layer}.popup_scores")
        kept = count_imported(score.numel(), keep_ratio)
        if rates:
            kept = _count_harp(score.numel(), rates[layer], keep_ratio * source.alpha)
        mask = torch.zeros(score.numel(), dtype=torch.bool)
        mask[score.abs().flatten().topk(kept).indices] = True
        masks[name] = mask.view_as(score)
    return state, masks


def _count_harp(n: int, rate: Tensor, least: float) -> int:
    """A layer's own keep ratio is sigmoid(rate), mapped to [least, 1], in the file's precision."""
    if rate.numel() != 1 or not rate.isfinite().all():
        raise UserError("a k_score of the harp file is not a finite number")
    kept = torch.sigmoid(rate.reshape(())) * (1 - least) + least
    return n - int((1 - kept) * n)


def _read_torch_prune(state: Tensors, source: Source, model: nn.Module) -> tuple[Tensors, Masks]:
    """torch.nn.utils.prune: `NAME_orig` and `NAME_mask` for a pruned parameter NAME."""
    # A network may have names of its own that end so: padding masks, spectral norms.
    added = {n.removesuffix("_orig") for n in state.keys() - model.state_dict().keys()}
    names = [n for n in sorted(added) if f"{n}_orig" in state and f"{n}_mask" in state]
    if not names:
        raise source.error(
            "holds no weight_orig with a weight_mask; import plain weights with: prunekit import "
            "dense"
        )
    masks = {}
    for name in names:
        original, mask = state.pop(f"{name}_orig"), state.pop(f"{name}_mask")
        if not ((mask == 0) | (mask == 1)).all():
            raise source.error(
                f"holds values other than 0 and 1 in {name}_mask; multiply the weights by the "
                "mask, and import them with: prunekit import dense"
            )
        if mask.shape != original.shape:
            raise source.error(f"holds a {name}_mask whose shape is not that of {name}_orig")
        state[name], masks[name] = original, mask != 0
    return state, masks


def _split(state: Tensors, ending: str) -> tuple[Tensors, Tensors]:
    """(entries whose names have this ending, without it; the other entries)."""
    found = {n.removesuffix(ending): v for n, v in state.items() if n.endswith(ending)}
    return found, {n: v for n, v in state.items() if not n.endswith(ending)}
