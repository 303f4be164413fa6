"""How a pipeline tells what it is doing: plain reports to a callback, which may stop the work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Report:
    """One line about the work.

    A stage reports once when it starts (`step` 0, no `seconds`), once after each of its steps, and once when it ends
    (`seconds` set). A remark for the user has a `message`.
    """

    stage: str
    step: int = 0
    total: int = 0
    seconds: float | None = None
    message: str | None = None


Progress = Callable[[Report], None]
"""Receives every report; raises `Cancelled` to stop the pipeline, which then leaves no trace."""


@dataclass
class Stages:
    """Runs the stages of one picture, times them and passes their reports on."""

    progress: Progress
    timings: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[Callable[[int], None]]:
        """Time a stage; yields a function that reports step `n` of `total`."""
        started = time.perf_counter()
        self.progress(Report(stage=name, total=total))
        yield lambda step: self.progress(Report(stage=name, step=step, total=total))
        seconds = time.perf_counter() - started
        self.timings[name] = self.timings.get(name, 0.0) + seconds
        self.progress(Report(stage=name, step=total, total=total, seconds=seconds))

    def beat(self, stage: str) -> None:
        """Give the callback the chance to stop a stage that has no steps."""
        self.progress(Report(stage=stage))

    def remark(self, stage: str, message: str) -> None:
        """Tell the user something about a stage."""
        self.progress(Report(stage=stage, message=message))
