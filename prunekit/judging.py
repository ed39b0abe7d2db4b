"""What a judgement rests on: a network that is a function of single images, and gives numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from prunekit.errors import RunError, lacks_memory
from prunekit.evaluation import Standing, eval_mode, own_generators

IMAGES = 9
"""Images that `examine` shows together and alone: four of the batch, and five made from them."""
REPEATS = 8
"""Times that the same batch is shown."""
LOOKS = REPEATS + IMAGES + 5
"""Forward passes that `examine` does, backwards, alone and in parts included."""
DARK = 0.2
"""What pixels are multiplied by, for images that are not as bright as the others of their batch."""
DOUBTS = 20
"""Times that it is shown again where answers differ, to tell what draws now and then."""
NEAR = 8 / 255
"""How far pixels are moved at most, for images like those that attacks make."""
SAME = 1e-5
"""Outputs of the same batch are the same up to this part of the largest logit."""
CLOSE = 1e-4
"""Those of an image in another batch are: kernels round differently for another batch size."""
NUDGE = 1e-6
"""How far pixels are moved to see how much rounding moves the logits."""


def find_answer(model: nn.Module, x: Tensor, owner: str = "the network", mode: str = "") -> Tensor:
    """The logits (B, K) that a network gives for images x (B, C, H, W); it is called once.

    Raises `RunError` where it gives anything else, or writes over the images.
    """
    shown = x.clone()
    logits = read_logits(model(shown), len(x), owner, mode)
    if shown._version or not torch.equal(shown, x):
        raise RunError(
            f"{owner} changes the images that it is given{mode} (x.sub_(...), x -= ..., or "
            "inplace=True), and whatever looks at them next would see others: begin with a new "
            "tensor, x = x - ..."
        )
    return logits


def read_logits(output: Any, images: int, owner: str = "the network", mode: str = "") -> Tensor:
    """What a network gave for a number of images, if it is logits (B, K) of real numbers.

    Raises `RunError`, which says what it gave instead; `owner` is what that calls the network.
    """
    if isinstance(output, Tensor):
        if output.dim() == 2 and len(output) == images and output.is_floating_point():
            return output
        found = f"{str(output.dtype).removeprefix('torch.')} of shape {tuple(output.shape)}"
    else:
        found = f"a {type(output).__name__}"
    raise RunError(
        f"{owner} gives {found} for {images} images{mode}, instead of logits, floats of shape "
        f"({images}, number of classes): wrap it in a module that returns these"
    )


@dataclass(frozen=True)
class Examination:
    """How a network answers a few images, in evaluation mode.

    `random`: the same batch gets other answers. `mixed`: answers depend on the other images of the
    batch. `moved`: what the forward pass changes. `finite`: some logits are numbers.
    """

    random: bool
    mixed: bool
    moved: tuple[str, ...]
    finite: bool

    @property
    def doubts(self) -> dict[str, str]:
        """Short name -> what keeps the network from being a function of single images."""
        found = {}
        if self.random:
            found["random"] = (
                "the network answers the same images differently at times, in evaluation mode (a "
                "random layer, or a state that forward changes): its numbers depend on the draw"
            )
        if self.mixed:
            found["batch_dependent"] = (
                "the network's answer for an image depends on the other images of its batch, in "
                "evaluation mode: its numbers depend on batch_size and on the order of the images"
            )
        if self.moved:
            found["stateful"] = (
                f"the network's forward pass changes {', '.join(self.moved[:3])} in evaluation "
                "mode: its numbers depend on what it saw before (undone after each judgement)"
            )
        return found

    def demand(self, what: str) -> None:
        """Raise `RunError` if there are doubts: `what` would mean nothing."""
        for text in self.doubts.values():
            raise RunError(f"{text}; {what} would mean nothing")


@torch.no_grad()
def examine(model: nn.Module, x: Tensor) -> Examination:
    """Look whether a network is a function of single images, with the batch x (B, C, H, W).

    A few of them, bright and dark, several times, backwards, and each alone; all of them, half with
    noise and a quarter darkened, twice and in two parts. Differences that rounding explains do not
    count. What happens in few passes, or at few images, may not be seen. Random generators, modes,
    parameters and buffers stay.

    Raises `RunError` if the network does not give logits, or changes the images.
    """
    whole, light = x.clone(), x.flatten(1).mean(1)
    x = x[[0, -1, int(light.argmin()), int(light.argmax())]]
    x = torch.cat([x, 0.7 * (1 - x[:1]), DARK * x])  # never all alike
    standing = Standing(model)
    moved: dict[str, None] = {}

    def look(images: Tensor) -> Tensor:
        output = find_answer(model, images)
        moved.update(dict.fromkeys(standing.restore()))
        return output

    with own_generators(), eval_mode(model):
        first = look(x)
        rough = float(torch.finfo(first.dtype).eps)
        same, close = max(SAME, 2 * rough), max(CLOSE, 8 * rough)

        def varies(times: int) -> bool:
            return not all(_agree(first, look(x), same) for _ in range(times))

        unlike, mixed = varies(REPEATS - 1), False
        if not unlike:
            places = torch.arange(len(x))
            pairs = [_part(look, x, first, p) for p in ([places.flip(0)], places.split(1))]
            if len(whole) > 3:
                whole[1::2] = (whole + NEAR * (2 * _draw(whole) - 1)).clamp(0, 1)[1::2]
                whole[3::4] *= DARK
                seen = look(whole)
                unlike = not _agree(seen, look(whole), same)
                dark = torch.arange(len(whole)) % 4 == 3
                pairs.append(
                    _part(look, whole, seen, [dark.nonzero()[:, 0], (~dark).nonzero()[:, 0]])
                )
            mixed = not unlike and not all(_agree(*pair, close) for pair in pairs)
        if mixed:  # unless rounding alone moves the logits as much, or it draws now and then
            moves = _distances(first, look(x * (1 - NUDGE * _draw(x))))
            mixed = not all(_agree(*pair, close, moves) for pair in pairs)
            unlike = mixed and varies(DOUBTS)
    return Examination(
        unlike, mixed and not unlike, tuple(moved), bool(first.isfinite().all(1).any())
    )


def _draw(x: Tensor) -> Tensor:
    """Noise like x, uniform in [0, 1), which no random generator of the program gives."""
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x)


def _part(
    look: Callable[[Tensor], Tensor], x: Tensor, whole: Tensor, parts: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Logits of x, of all together (`whole`, given) and of parts of it (indices), in one order.

    Those of parts are NaN where layers fail that want several images.
    """
    whole = whole[torch.cat(list(parts))]
    try:
        return whole, torch.cat([look(x[part]) for part in parts])
    except Exception as error:  # whatever such layers raise
        if isinstance(error, RunError) or lacks_memory(error):
            raise
        return whole, torch.full_like(whole, torch.nan)


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """For each image (B,), the largest difference of logits that are finite in both."""
    far = (one.cpu().double() - other.cpu().double()).abs()
    return far.where(far.isfinite(), 0).amax(1)


def _agree(one: Tensor, other: Tensor, part: float, moves: Tensor | None = None) -> bool:
    """Whether logits (B, K) are equal up to `part` of the largest finite one.

    Or up to ten times what rounding moves those of some images, `moves`: at most, and at most
    images. Where networks round to few levels, rounding moves few images far, another batch all.
    """
    if one.shape != other.shape or not torch.equal(one.isfinite(), other.isfinite()):
        return False
    finite = one[one.isfinite()].cpu().double()
    bound = part * float(finite.abs().amax()) if len(finite) else 0.0
    far = _distances(one, other)
    if moves is None:
        return float(far.amax()) <= bound
    ways = (torch.amax, torch.median)
    return all(float(way(far)) <= max(bound, 10 * float(way(moves))) for way in ways)


@dataclass
class Watch:
    """What outputs a network gave while it was judged, image by image.

    `unreal` are the numbers of the images for which, as they are or near them, it gave NaN or
    infinity; `outputs` counts what was seen, and `real` says whether anything finite was among it.
    `keep` is called whenever what is to be kept has changed.
    """

    unreal: set[int] = field(default_factory=set)
    nowhere: set[int] = field(default_factory=set)
    """Those of them for which it did so as they are."""
    outputs: int = 0
    real: bool = False
    keep: Callable[[], None] = lambda: None
    _images: Tensor | None = None
    _first: int = 0
    _late: tuple[Tensor, Tensor] | None = None

    def begin(self, images: Tensor, first: int) -> None:
        """The judgement goes on with these images (B, C, H, W); the number of the first."""
        self.read()
        self._images, self._first = images, first

    def see(self, x: Tensor, logits: Tensor) -> None:
        """Note the outputs (B, K) at inputs x (B, C, H, W)."""
        self.read()
        self._late = (x.detach(), logits.detach().isfinite().all(1))
        # On a GPU it is read when the next one is seen: reading it now would stall the device.
        if logits.device.type == "cpu":
            self.read()

    def read(self) -> None:
        """Take note of what was seen last."""
        if self._late is None:
            return
        x, good = self._late
        self._late = None
        before = self._measure()
        self.outputs += len(good)
        count = int(good.sum())
        self.real |= count > 0
        if count < len(good) and self._images is not None:
            self._find(x[~good])
        if self._measure() != before:
            self.keep()

    def find_unreal(self) -> list[int]:
        """Which of the images that the judgement is at are among `unreal`; by place, from 0."""
        self.read()
        places = range(0 if self._images is None else len(self._images))
        return [i for i in places if self._first + i in self.unreal]

    def _measure(self) -> tuple[int, ...]:
        return bool(self.outputs), self.real, len(self.unreal), len(self.nowhere)

    def _find(self, inputs: Tensor) -> None:
        """Note which images these inputs were made from: the nearest ones."""
        assert self._images is not None
        numbers = range(self._first, self._first + len(self._images))
        for x in inputs:
            if self.unreal.issuperset(numbers) or x.shape != self._images.shape[1:]:
                return
            # An input that is no image itself says nothing about the network.
            if x.isfinite().all():
                far = (self._images - x).flatten(1).norm(dim=1)
                nearest = {self._first + i for i in torch.nonzero(far == far.min())[:, 0].tolist()}
                self.unreal |= nearest
                self.nowhere |= nearest if not far.min() else set()


@contextmanager
def watching(model: nn.Module, watch: Watch | None = None) -> Iterator[Watch]:
    """Watch every output of the network inside; raises `RunError` there for what is no logits."""
    watch = Watch() if watch is None else watch

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tracing = torch._C._get_tracing_state() is not None
        if args and isinstance(args[0], Tensor) and not tracing:
            watch.see(args[0], read_logits(output, len(args[0])))

    try:
        handle = model.register_forward_hook(see)
    except RuntimeError:  # scripted modules have none of their own
        handle = register_module_forward_hook(
            lambda module, args, output: see(module, args, output) if module is model else None
        )
    try:
        yield watch
    finally:
        handle.remove()
        watch.read()  # also of a judgement that was stopped and goes on later
