"""Networks that others trained and pruned -> run directories like any other."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import Tensor, nn

from prunekit.catalog.component import NoOptions
from prunekit.catalog.registry import load_registry
from prunekit.contracts import Masks
from prunekit.errors import Place, UserError, relative
from prunekit.models.building import build_network, describe_model, find_shape
from prunekit.models.failures import explained
from prunekit.pruning.layers import find_prunable
from prunekit.pruning.masks import State, apply_masks, describe_counts, find_broken, hash_masks
from prunekit.recipe.document import Recipe, override
from prunekit.recipe.plan import Stage, make_plan
from prunekit.recipe.values import KeyPath
from prunekit.report import Tell
from prunekit.store.checkpoint import load_weights, read_weights, write_model
from prunekit.store.files import make_folder, write_text
from prunekit.store.keys import hash_file
from prunekit.store.layout import MODEL, RECIPE
from prunekit.store.runs import RunFolder
from prunekit.store.stages import StageFolder, StageResult

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """A file of somebody else's, and what it does not say itself."""

    path: Path
    kind: str
    """"hydra", "harp", "torch-prune" or "dense"."""
    sparsity: float | None = None
    alpha: float = 0.1
    """HARP: no layer keeps less than alpha times the keep ratio."""


def count_imported(n: int, keep_ratio: float) -> int:
    """How many of n weights HYDRA keeps: n - int((1 - k) n), rounding of floats included.

    >>> count_imported(1000, 0.1), count_imported(10, 0.3), count_imported(10, 0.9)
    (100, 3, 10)
    """
    return n - int((1 - keep_ratio) * n)


def find_keep_ratio(sparsity: float) -> float:
    """The keep ratio as HYDRA's user wrote it: 0.1 for 0.9, where 1 - 0.9 is a little less.

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
    """Make a run directory of the file; `sections` are those of the recipe that it gets, and
    what somebody who judges the network has to know is told.

    Raises `UserError` where the file holds more than tensors or does not fit the network.
    """
    if source.kind in ("hydra", "harp") and source.sparsity is None:
        raise UserError(f"a {source.kind} file does not say its keep ratio; give --sparsity 0.9")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{relative(out)} is there already; choose another folder with --out")
    recipe = Recipe(out / RECIPE, dict(sections), _places(sections))
    override(recipe, settings)
    plan = make_plan(recipe, load_registry())
    (run,) = plan.runs
    with explained(run):
        shape, classes = find_shape(run)
        model = build_network(run, shape, classes, fresh=False)
    weights, masks = read_source(source, model)
    load_weights(model, weights, source.path)
    apply_masks(model, masks)
    if broken := find_broken(model):
        raise UserError(f"{relative(source.path)}: {broken} holds values that are no numbers")
    state = State(model, masks)
    counts = describe_counts(state)
    sparsity = 1 - counts["kept"] / counts["weights"]
    about = {
        "kind": "import", "format": source.kind, "file": source.path.name,
        "sha256": hash_file(source.path), "sparsity": source.sparsity,
    }  # fmt: skip
    header = {"stage": about, "sparsity": sparsity, "smoke": False}
    existed = out.exists()
    make_folder(out)
    try:
        write_model(out / MODEL, model, masks, {**describe_model(run, shape, classes), **header})
        folder = RunFolder(out, plan, run)
        folder.start("cpu")
        stage = Stage("import", "import", 0, NoOptions())
        metrics = {"sparsity": sparsity, "masks": hash_masks(masks), "counts": counts}
        notes = [f"{source.kind} file {source.path.name}, SHA-256 {about['sha256']}"]
        for doubt in _find_doubts(source, model, masks):
            tell(f"{relative(source.path)}: {doubt}")
            notes.append(doubt)
        folder.add(stage, "", StageResult(metrics, notes=notes), StageFolder(out), False)
        write_text(out / RECIPE, _write_recipe(plan.describe(run), source, out))
        folder.close("done")
    except BaseException:
        if not existed:
            shutil.rmtree(out, ignore_errors=True)
        raise
    return folder


def _places(sections: Mapping[str, Any]) -> dict[KeyPath, Place]:
    """Where mistakes are: in the options of the command line."""
    flags = {
        "--dataset": ("dataset", "use"), "--model": ("architecture", "use"),
        "--eps": ("threat", "eps"),
    }  # fmt: skip
    return {
        (section, key): Place(f"{flag} {sections[section][key]}")
        for flag, (section, key) in flags.items()
        if key in sections.get(section, {})
    }


def _find_doubts(source: Source, model: nn.Module, masks: Masks) -> list[str]:
    """What somebody who judges the network has to know."""
    doubts = [f"nothing is left of {name}" for name, mask in masks.items() if not mask.any()]
    if source.kind == "harp" and (dense := find_prunable(model).keys() - masks.keys()):
        doubts.append(f"without popup_scores, so left dense: {', '.join(sorted(dense))}")
    return doubts


def _write_recipe(document: dict[str, Any], source: Source, out: Path) -> str:
    """What evaluates the network; its first lines say how to go on."""
    architecture = {**document["architecture"], "init": MODEL}
    lines = [
        f"# Imported from {source.path.name} ({source.kind}).",
        "# To finetune it, write a recipe that extends this one:",
        "#",
        f'#   extends = "{out}/{RECIPE}"',
        '#   objective = "trades"',
        *([] if "threat" in document else ["#   [threat]", '#   eps = "8/255"']),
        "#   [[stage]]",
        '#   kind = "finetune"',
        "#   epochs = 100",
        "",
    ]
    return "\n".join(lines) + "\n" + tomli_w.dumps({**document, "architecture": architecture})


def read_source(source: Source, model: nn.Module) -> tuple[Tensors, Masks]:
    """(plain weights, masks) of a file, keyed as the network is."""
    state = read_weights(source.path)
    own = model.state_dict()
    if not any(name.startswith("sub_block1.") for name in own):
        # A block of HYDRA's wide ResNets that their forward pass never uses.
        state = {n: v for n, v in state.items() if not n.startswith("sub_block1.")}
    if source.kind == "torch-prune":
        return _read_torch_prune(state, source)
    if source.kind == "dense":
        masks = {n: state[n] != 0 for n in find_prunable(model) if n in state}
        return state, {n: mask for n, mask in masks.items() if not mask.all()}
    weights, masks = _read_scored(state, source)
    if source.kind == "hydra" and (dense := find_prunable(model).keys() - masks.keys()):
        # A network with another layer type is caught by its keys.
        lacking = ", ".join(sorted(name.rpartition(".")[0] for name in dense & weights.keys())[:8])
        if lacking:
            raise UserError(f"{relative(source.path)} lacks the popup_scores of {lacking}")
    return weights, masks


def _read_scored(state: Tensors, source: Source) -> tuple[Tensors, Masks]:
    """HYDRA and HARP: `popup_scores` beside `weight`, the largest by size are kept."""
    assert source.sparsity is not None
    keep_ratio = find_keep_ratio(source.sparsity)
    scores, state = _split(state, ".popup_scores")
    if not scores:
        raise UserError(
            f"{relative(source.path)} holds no popup_scores; for plain weights with zeros in "
            "them: prunekit import dense"
        )
    rates: Tensors = {}
    if source.kind == "harp":
        rates, state = _split(state, ".k_score")
        if missing := scores.keys() - rates.keys():
            raise UserError(f"{relative(source.path)} lacks {min(missing)}.k_score of a harp file")
    masks = {}
    for layer, score in scores.items():
        name = f"{layer}.weight"
        if name not in state or state[name].shape != score.shape:
            raise UserError(
                f"{relative(source.path)}: {layer}.popup_scores {tuple(score.shape)} belongs to no "
                "weight of that shape (whole channels of HARP are not read)"
            )
        if score.isnan().any():
            raise UserError(f"{relative(source.path)}: {layer}.popup_scores holds NaN")
        kept = count_imported(score.numel(), keep_ratio)
        if rates:
            kept = _count_harp(score.numel(), rates[layer], keep_ratio * source.alpha)
        mask = torch.zeros(score.numel(), dtype=torch.bool)
        mask[score.abs().flatten().topk(kept).indices] = True
        masks[name] = mask.view_as(score)
    return state, masks


def _count_harp(n: int, rate: Tensor, least: float) -> int:
    """A layer's own keep ratio is sigmoid(rate), moved to [least, 1]; in the file's precision."""
    if rate.numel() != 1 or not rate.isfinite().all():
        raise UserError("a k_score of the harp file is no finite number")
    kept = torch.sigmoid(rate.reshape(())) * (1 - least) + least
    return n - int((1 - kept) * n)


def _read_torch_prune(state: Tensors, source: Source) -> tuple[Tensors, Masks]:
    """torch.nn.utils.prune: `NAME_orig` and `NAME_mask` for a pruned parameter NAME."""
    originals, state = _split(state, "_orig")
    found, state = _split(state, "_mask")
    if not originals or originals.keys() != found.keys():
        odd = sorted(originals.keys() ^ found.keys())
        raise UserError(
            f"{relative(source.path)} is no file of torch.nn.utils.prune: "
            + (f"_orig and _mask do not go together for {', '.join(odd[:8])}" if odd else
               "it holds no weight_orig; for plain weights: prunekit import dense")
        )  # fmt: skip
    for name, mask in found.items():
        if not ((mask == 0) | (mask == 1)).all():
            raise UserError(
                f"{relative(source.path)}: {name}_mask holds values other than 0 and 1, which "
                "scale weights; multiply them in, and import the zeros: prunekit import dense"
            )
    masks = {name: mask != 0 for name, mask in found.items()}
    if wrong := [n for n, mask in masks.items() if mask.shape != originals[n].shape]:
        raise UserError(f"{relative(source.path)}: the mask of {wrong[0]} has another shape")
    return {**state, **originals}, masks


def _split(state: Tensors, ending: str) -> tuple[Tensors, Tensors]:
    """(entries with this ending, without it in their names; the others)."""
    found = {n.removesuffix(ending): v for n, v in state.items() if n.endswith(ending)}
    return found, {n: v for n, v in state.items() if not n.endswith(ending)}
