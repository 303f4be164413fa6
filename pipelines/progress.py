"""How a pipeline tells what it is doing: plain reports to a callback, which may stop the work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Report:
    """One line about the work.

    A stage reports once when it starts (`step` 0, no `seconds`), once after each of its steps, and once when it ends
    (`seconds` set). A remark for the user has a `message`. Steps of a stage that makes a picture may have a `preview`:
    called before the next step, it makes a small picture of how far it is, or None where it may not be shown.
    """

    stage: str
    step: int = 0
    total: int = 0
    seconds: float | None = None
    message: str | None = None
    preview: Callable[[], Image | None] | None = field(default=None, compare=False, repr=False)


Progress = Callable[[Report], None]
"""Receives every report; raises `Cancelled` to stop the pipeline, which then leaves no trace."""


@dataclass
class Stages:
    """Runs the stages of one picture, times them and passes their reports on.

    Attributes:
        progress: Receives the reports.
        timings: Seconds by stage.
        may_show: Whether a preview may be seen; asked about each.
    """

    progress: Progress
    timings: dict[str, float] = field(default_factory=dict)
    may_show: Callable[[Image], bool] = lambda image: True
    _paint: Callable[[Any], Image] | None = None
    _estimate: Callable[[], Any] | None = None

    @contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[Callable[[int], None]]:
        """Time a stage; yields a function that reports step `n` of `total`."""
        started = time.perf_counter()
        self.progress(Report(stage=name, total=total))
        yield lambda step: self.progress(Report(stage=name, step=step, total=total, preview=self._preview()))
        seconds = time.perf_counter() - started
        self.timings[name] = self.timings.get(name, 0.0) + seconds
        self.progress(Report(stage=name, step=total, total=total, seconds=seconds))

    @contextmanager
    def painting(self, paint: Callable[[Any], Image]) -> Iterator[None]:
        """Give the steps inside previews: `paint` makes them of what `watch` was told last."""
        self._paint = paint
        try:
            yield
        finally:
            self._paint = self._estimate = None

    def watch(self, estimate: Callable[[], Any]) -> None:
        """Say how to compute what the model expects to come out."""
        self._estimate = estimate

    def _preview(self) -> Callable[[], Image | None] | None:
        paint, estimate = self._paint, self._estimate
        if paint is None or estimate is None:
            return None

        def preview() -> Image | None:
            image = paint(estimate())
            return image if self.may_show(image) else None

        return preview

    def beat(self, stage: str) -> None:
        """Give the callback the chance to stop a stage that has no steps."""
        self.progress(Report(stage=stage))

    def remark(self, stage: str, message: str) -> None:
        """Tell the user something about a stage."""
        self.progress(Report(stage=stage, message=message))
