"""Adversarial training and attacks: declarations. What they name is imported on first use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from prunekit import EvaluatorComponent, ObjectiveComponent, Radius, Threatened, hookimpl, option
from prunekit.errors import OptionError

ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The attacks of standard AutoAttack, in its order."""
FEW_CLASSES = ("apgd-ce", "fab", "square")
"""The attacks used instead on a network with 2 or 3 classes."""
TARGETS = 9
"""Target classes of standard AutoAttack's targeted attacks, if there are that many."""


@dataclass(frozen=True)
class AttackOptions(Threatened):
    """Options of every component that attacks with a fixed step size."""

    step_size: Radius | None = option(
        None, help="size of an attack step; default: eps / 4 (trades in l2: 2 eps / steps)", above=0
    )


@dataclass(frozen=True)
class LabelOptions:
    """Options of an objective with the cross-entropy on labels; all that `benign` has."""

    label_smoothing: float = option(
        0.0, help="part of a label's probability that all classes share alike", low=0, below=1
    )


@dataclass(frozen=True)
class TrainingOptions(AttackOptions):
    """Options of an objective that attacks, and is validated under an attack."""

    steps: int = option(10, help="steps of the attack", low=1, smoke=2)
    validation_steps: int = option(10, help="PGD steps in validation", low=1, smoke=2)


@dataclass(frozen=True)
class PgdAtOptions(TrainingOptions, LabelOptions):
    """Options of `pgd-at`."""


@dataclass(frozen=True)
class TradesOptions(PgdAtOptions):
    """Options of `trades`."""

    beta: float = option(6.0, help="weight of the robust term", low=0)


@dataclass(frozen=True)
class MartOptions(PgdAtOptions):
    """Options of `mart`."""

    beta: float = option(5.0, help="weight of the consistency term", low=0)


@dataclass(frozen=True)
class FreeAdvOptions(Threatened, LabelOptions):
    """Options of `free-adv`."""

    norms = ("linf",)  # its noise follows the signs of gradients

    replays: int = option(
        4,
        help="optimizer steps on each batch; the data is passed over epochs / replays times",
        low=1,
        smoke=2,
    )
    reset: Literal["never", "epoch"] = option(
        "never", help="when the noise is reset to zero; HYDRA's code resets it every epoch"
    )
    validation_steps: int = option(10, help="PGD steps in validation", low=1, smoke=2)


@dataclass(frozen=True)
class SingleStepOptions(Threatened, LabelOptions):
    """Options of objectives that attack with a single step."""

    norms = ("linf",)  # the step follows the signs of the gradient

    ramp: float = option(
        0.0, help="epochs in which eps grows from 0", unit="epochs", delays=True, low=0
    )
    drop: float = option(
        0.05,
        help="fall of the robust validation accuracy within an epoch that ends the stage, if "
        "accuracy in training rose meanwhile (catastrophic overfitting); 1: never",
        low=0,
        high=1,
    )
    validation_steps: int = option(10, help="PGD steps in validation", low=1, smoke=2)


@dataclass(frozen=True)
class FgsmRsOptions(SingleStepOptions):
    """Options of `fgsm-rs`."""

    step: float = option(1.25, help="length of the step, in multiples of eps", above=0)


@dataclass(frozen=True)
class NFgsmOptions(SingleStepOptions):
    """Options of `n-fgsm`."""

    noise: float = option(2.0, help="reach of the noise, in multiples of eps", low=0)


@dataclass(frozen=True)
class PgdOptions(AttackOptions):
    """Options of the evaluator `pgd`."""

    steps: int = option(50, help="steps of each restart", low=1, smoke=2)
    restarts: int = option(
        10, help="random starts; the worst one counts", low=1, high=1000, smoke=1
    )
    iterate: Literal["last", "any"] = option(
        "last", help="which iterate has to fool the network: the last, or any (stronger, faster)"
    )


@dataclass(frozen=True)
class AutoAttackOptions(Threatened):
    """Options of the evaluator `autoattack`."""

    attacks: (
        tuple[Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"], ...] | None
    ) = option(None, help="attacks, run in this order; default: those of standard AutoAttack")
    steps: int = option(100, help="steps of APGD and FAB", low=1, smoke=2)
    queries: int = option(5000, help="queries of Square", low=1, smoke=5)
    restarts: int = option(1, help="random starts of the untargeted attacks", low=1, smoke=1)
    seed: int = option(0, help="seed of every attack on every batch", low=0)

    def __post_init__(self) -> None:
        if self.attacks == ():
            raise OptionError(
                "attacks", "attacks is empty; name an attack, or leave it out for the standard ones"
            )


def doubt_step(options: SingleStepOptions) -> str:
    """A step of `fgsm-rs` after which every start ends at a corner of the ball."""
    if not isinstance(options, FgsmRsOptions) or options.step <= 2:
        return ""
    return (
        f"takes a step of {options.step:g} times eps, and 2 cross the whole ball; write 2 or less"
    )


def count_autoattack(options: AutoAttackOptions) -> int:
    """Forward passes for an image that withstands every attack, for a network with 10 classes."""
    single = options.restarts * (options.steps + 1)
    passes = {
        "apgd-ce": single,
        "apgd-dlr": single,
        "apgd-t": TARGETS * (options.steps + 1),
        "fab": 2 * options.restarts * options.steps,
        "fab-t": 2 * TARGETS * options.steps,
        "square": options.queries,
    }
    return 1 + sum(passes[name] for name in options.attacks or ATTACKS)


def count_validation(options: TrainingOptions | FreeAdvOptions | SingleStepOptions) -> int:
    """Forward passes for an image in validation: of the attack, and with and without it."""
    return options.validation_steps + 2


def tell_attacked(options: TrainingOptions | FreeAdvOptions | SingleStepOptions) -> str:
    """What the accuracy of a training step is measured on."""
    return "attacked training images"


VALIDATION: dict[str, Any] = {
    "validation_passes": count_validation,
    "validates": ("accuracy", "robust_accuracy"),
    "select": "robust_accuracy",
}
"""What a declaration says of an objective that is validated under an attack."""


@hookimpl
def prunekit_objectives() -> Iterable[ObjectiveComponent]:
    """Declare the objectives: clean training and six kinds of adversarial training."""
    yield ObjectiveComponent(
        name="benign",
        summary="Cross-entropy on clean images",
        build="prunekit_adversarial.objectives:build_benign",
        options=LabelOptions,
    )
    yield ObjectiveComponent(
        name="pgd-at",
        summary="Adversarial training: cross-entropy on images attacked by PGD",
        build="prunekit_adversarial.objectives:build_pgd_at",
        options=PgdAtOptions,
        paper="Madry et al., ICLR 2018, arXiv 1706.06083",
        forward_passes=lambda options: options.steps + 1,
        attack_passes=lambda options: options.steps,
        accuracy_of=tell_attacked,
        **VALIDATION,
    )
    yield ObjectiveComponent(
        name="trades",
        summary="Clean cross-entropy + beta * KL between clean and attacked predictions",
        build="prunekit_adversarial.objectives:build_trades",
        options=TradesOptions,
        paper="Zhang et al., ICML 2019, arXiv 1901.08573",
        forward_passes=lambda options: options.steps + 3,
        attack_passes=lambda options: options.steps + 1,
        **VALIDATION,
    )
    yield ObjectiveComponent(
        name="mart",
        summary="Boosted cross-entropy on attacked images + beta * KL, weighted by 1 - p(label)",
        build="prunekit_adversarial.objectives:build_mart",
        options=MartOptions,
        paper="Wang et al., ICLR 2020, openreview rklOg6EFwS",
        forward_passes=lambda options: options.steps + 2,
        attack_passes=lambda options: options.steps,
        **VALIDATION,
    )
    yield ObjectiveComponent(
        name="free-adv",
        summary="Free adversarial training: one backward pass updates both weights and noise",
        build="prunekit_adversarial.objectives:build_free_adv",
        options=FreeAdvOptions,
        paper="Shafahi et al., NeurIPS 2019, arXiv 1904.12843",
        replays=lambda options: options.replays,
        accuracy_of=tell_attacked,
        **VALIDATION,
    )
    for name, summary, options, paper in (
        (
            "fgsm-rs",
            "Fast adversarial training: one step from a random start, clipped to the ball",
            FgsmRsOptions,
            "Wong et al., ICLR 2020, arXiv 2001.03994",
        ),
        (
            "n-fgsm",
            "Fast adversarial training: one step from strong noise, not clipped to the ball",
            NFgsmOptions,
            "de Jorge et al., NeurIPS 2022, arXiv 2202.01181",
        ),
    ):
        yield ObjectiveComponent(
            name=name,
            summary=summary,
            build=f"prunekit_adversarial.single_step:build_{name.replace('-', '_')}",
            options=options,
            paper=paper,
            details="The stage ends at the first epoch that shows catastrophic overfitting, and "
            "keeps an earlier one: the best, or where it comes before the end of `ramp`, the last. "
            "A fall by `drop` should be more than noise: with 100 validation "
            "images, 5 points are not. The attack is made in eval mode, theirs in train mode.",
            forward_passes=lambda options: 2,
            attack_passes=lambda options: 1,
            doubts=doubt_step,
            accuracy_of=tell_attacked,
            **VALIDATION,
        )


@hookimpl
def prunekit_evaluators() -> Iterable[EvaluatorComponent]:
    """Declare the evaluators: clean accuracy, PGD and AutoAttack."""
    yield EvaluatorComponent(
        name="clean",
        summary="Accuracy on clean images",
        build="prunekit_adversarial.evaluators:build_clean",
    )
    yield EvaluatorComponent(
        name="pgd",
        summary="Accuracy under PGD on the cross-entropy, worst case over restarts",
        build="prunekit_adversarial.evaluators:build_pgd",
        options=PgdOptions,
        paper="Madry et al., ICLR 2018, arXiv 1706.06083",
        forward_passes=lambda options: 1 + options.restarts * (options.steps + 1),
        judges="attack",
    )
    yield EvaluatorComponent(
        name="autoattack",
        summary="Accuracy under AutoAttack: the standard version, or attacks of your choice",
        build="prunekit_adversarial.autoattack:build_autoattack",
        options=AutoAttackOptions,
        needs=("pyautoattack",),
        paper="Croce and Hein, ICML 2020, arXiv 2003.01690",
        forward_passes=count_autoattack,
        judges="attack",
        beats=("pgd",),
    )
