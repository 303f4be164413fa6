"""The training loop that all parts share: seeded steps, a moving average of the weights, checkpoints, exports.

Each step draws everything from generators seeded with (seed, step), so a run that is continued from its checkpoint
sees the pictures it would have seen. The learning rate follows a cosine over the number of steps or, when a run is
limited by time, over the time.
"""

import copy
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

PROGRESS_EVERY_S = 20.0
CHECKPOINT_EVERY_S = 180.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """How long and where to train; with both limits given, the one that is reached first ends the run."""

    minutes: float | None = None
    steps: int | None = None
    device: str = "cpu"
    seed: int = 1
    batch: int = 16
    num_drawings: int = 1200
    models: Path
    build: Path


class Trainee(Protocol):
    """A part of the set while it is trained."""

    name: str
    learning_rate: float
    modules: nn.ModuleDict

    def loss(self, rng: np.random.Generator, step: int) -> Tensor:
        """The scalar loss of one batch drawn from `rng`."""

    def export(self, modules: nn.ModuleDict, models: Path) -> None:
        """Write the part as it is loaded later, from `modules` (the moving average)."""


@dataclass
class Progress:
    """Where a run stands; `seconds` counts the training time over all continuations."""

    step: int = 0
    seconds: float = 0.0

    def share(self, options: Options) -> float:
        """How much of the run is over, 0..1, by whichever limit is nearer."""
        by_time = self.seconds / (60 * options.minutes) if options.minutes else 0.0
        by_steps = self.step / options.steps if options.steps else 0.0
        return min(1.0, max(by_time, by_steps))


def learning_rate(peak: float, share: float, step: int) -> float:
    """A hundred steps of warm-up, then a cosine from `peak` to a fiftieth of it."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
    return peak * cosine * min(1.0, (step + 1) / 100)


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, step: int) -> None:
    """Move the average a little towards the module; quickly in the first steps, by a thousandth later."""
    weight = 1 - min(0.999, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), weight)


def save_half(module: Any, folder: Path) -> None:
    """Write a diffusers or transformers model in its own layout with 16-bit weights; `module` is left as it is."""
    copy.deepcopy(module).half().save_pretrained(folder)


def train(trainee: Trainee, options: Options) -> Progress:
    """Train a part until a limit of `options` is reached and export it; continues from a checkpoint if there is one.

    Raises:
        FloatingPointError: The loss is no longer a number.
    """
    modules = trainee.modules.to(options.device).train()
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=trainee.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
    )
    average = copy.deepcopy(modules).requires_grad_(False)
    progress = Progress()
    checkpoint = options.build / f"{trainee.name}.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=options.device, weights_only=True)
        modules.load_state_dict(state["modules"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(state["step"], state["seconds"])
        log.info("%s: continuing at step %d, minute %.1f", trainee.name, progress.step, progress.seconds / 60)

    def save() -> None:
        options.build.mkdir(parents=True, exist_ok=True)
        state = {
            "modules": modules.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": progress.step,
            "seconds": progress.seconds,
        }
        torch.save(state, checkpoint.with_suffix(".part"))
        checkpoint.with_suffix(".part").replace(checkpoint)
        trainee.export(average, options.models)

    smooth, last = 0.0, time.perf_counter()
    told = saved = progress.seconds
    while progress.share(options) < 1:
        rate = learning_rate(trainee.learning_rate, progress.share(options), progress.step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = trainee.loss(np.random.default_rng([options.seed, progress.step]), progress.step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 0.5)
        optimizer.step()
        follow(average, modules, progress.step)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"{trainee.name}: the loss is {value} at step {progress.step}")
        smooth = value if smooth == 0.0 else 0.98 * smooth + 0.02 * value
        progress.step += 1
        now = time.perf_counter()
        progress.seconds, last = progress.seconds + now - last, now
        if progress.seconds - told > PROGRESS_EVERY_S:
            told = progress.seconds
            minutes, share = progress.seconds / 60, 100 * progress.share(options)
            log.info(
                "%s: step %d, minute %.1f, %.0f %%, loss %.5f, lr %.1e",
                *(trainee.name, progress.step, minutes, share, smooth, rate),
            )
        if progress.seconds - saved > CHECKPOINT_EVERY_S:
            saved = progress.seconds
            save()
    save()
    log.info("%s: done after %d steps, %.1f minutes", trainee.name, progress.step, progress.seconds / 60)
    return progress
