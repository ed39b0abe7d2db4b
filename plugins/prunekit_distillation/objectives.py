"""Objectives that learn from a robust teacher: RSLAD, SAAD, and the matching term of IGDM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from prunekit_adversarial.attacks import kl_divergences, maximize_kl, predict
from prunekit_adversarial.objectives import Adversarial, Attacked, plan
from torch import Tensor, nn

from prunekit.contexts import ObjectiveContext
from prunekit.contracts import Clock, Loss
from prunekit_distillation import RsladOptions, SaadOptions


@dataclass(frozen=True)
class Taught(Attacked):
    """Attacked images, and the teacher's logits (B, K): at x, at x', and at 2 x - x'; None where
    the loss needs none."""

    clean: Tensor
    attacked: Tensor | None
    opposite: Tensor | None


@dataclass(frozen=True)
class Rslad(Adversarial):
    """(1 - natural) KL(t(x) || p(x')) + natural KL(t(x) || p(x)) (Zi et al., ICCV 2021, eq. 7).

    t and p are the softmaxes of teacher and student; x' maximizes the first KL. IGDM adds
    igdm * epoch / epochs times KL(softmax(T(x') - T(2x - x')) || softmax(S(x') - S(2x - x'))), of
    the logits T and S (Lee et al., ICLR 2025). The logged terms are `robust`, `natural` and `igdm`,
    without weights; the logits are those at x'.
    """

    teacher: nn.Module
    natural: float
    igdm: float

    def prepare(self, x: Tensor, y: Tensor, clock: Clock) -> Taught:
        """Images attacked on the KL to the teacher, and what the teacher says of them."""
        with torch.no_grad():
            clean = predict(self.teacher, x)
        adversarial = maximize_kl(self.model, x, self.attack, clean)
        with torch.no_grad():
            attacked = predict(self.teacher, adversarial) if self._looks else None
            opposite = predict(self.teacher, 2 * x - adversarial) if self.igdm else None
        return Taught(x, y, adversarial, clean, attacked, opposite)

    @property
    def _looks(self) -> bool:
        """Whether the teacher is asked about attacked images."""
        return self.igdm > 0

    def loss(self, prepared: Taught, clock: Clock) -> Loss:
        """The loss at clean and attacked images."""
        logits = predict(self.model, prepared.adversarial)
        terms = {"robust": kl_divergences(prepared.clean, logits).mean()}
        value = (1 - self.natural) * terms["robust"]
        if self.natural:
            terms["natural"] = self._clean(prepared).mean()
            value = value + self.natural * terms["natural"]
        if self.igdm:
            terms["igdm"] = self._match(prepared, logits).mean()
            value = value + self._weight(clock) * terms["igdm"]
        return Loss(value, logits.detach(), {name: term.detach() for name, term in terms.items()})

    def _clean(self, prepared: Taught) -> Tensor:
        """KL(t(x) || p(x)) of each image, (B,)."""
        return kl_divergences(prepared.clean, predict(self.model, prepared.x))

    def _match(self, prepared: Taught, logits: Tensor) -> Tensor:
        """The KL of IGDM of each image, (B,); `logits` (B, K) are the student's at x'."""
        assert prepared.attacked is not None
        assert prepared.opposite is not None
        with _statistics_stay(self.model):
            opposite = predict(self.model, 2 * prepared.x - prepared.adversarial)
        return kl_divergences(prepared.attacked - prepared.opposite, logits - opposite)

    def _weight(self, clock: Clock) -> float:
        return self.igdm * (clock.epoch + 1) / clock.epochs


@dataclass(frozen=True)
class Saad(Rslad):
    """Mean of w_i (KL(t(x') || p(x')) + IGDM_i) + natural (1 - w_i / max w) KL(t(x) || p(x)).

    w_i = scale * (H_i - min H), with the entropy H_i of t(x'_i), over the batch (Lee et al., TMLR
    2026). The logged terms are the means of the KLs, without any weights: `robust`, `natural`,
    `igdm`; the logits are those at x'.
    """

    scale: float

    @property
    def _looks(self) -> bool:
        return True

    def loss(self, prepared: Taught, clock: Clock) -> Loss:
        """The loss at clean and attacked images."""
        assert prepared.attacked is not None
        logits = predict(self.model, prepared.adversarial)
        log = prepared.attacked.log_softmax(1)
        entropy = -(log.exp() * log).sum(1)
        above = entropy - entropy.amin()
        robust = kl_divergences(prepared.attacked, logits)
        terms = {"robust": robust.mean()}
        if self.igdm:
            matched = self._match(prepared, logits)
            terms["igdm"] = matched.mean()
            robust = robust + self._weight(clock) * matched
        value = (self.scale * above * robust).mean()
        if self.natural:
            clean = self._clean(prepared)
            terms["natural"] = clean.mean()
            # Where the teacher is as uncertain of all images, each counts in the clean term.
            certain = 1 - above / above.amax().clamp(min=torch.finfo(above.dtype).tiny)
            value = value + self.natural * (certain * clean).mean()
        return Loss(value, logits.detach(), {name: term.detach() for name, term in terms.items()})


@contextmanager
def _statistics_stay(model: nn.Module) -> Iterator[None]:
    """Inside, batch normalization in train mode leaves its running statistics alone."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    before = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm, buffers in zip(norms, before, strict=True):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


def build_rslad(options: RsladOptions, context: ObjectiveContext) -> Rslad:
    """Build the objective `rslad`; raises `UserError` if there is no threat, or no teacher."""
    teacher = context.network(options.teacher)
    return Rslad(*plan(options, context), teacher, options.natural, options.igdm)


def build_saad(options: SaadOptions, context: ObjectiveContext) -> Saad:
    """Build the objective `saad`; raises `UserError` if there is no threat, or no teacher."""
    teacher = context.network(options.teacher)
    own = (options.natural, options.igdm, options.scale)
    return Saad(*plan(options, context), teacher, *own)
