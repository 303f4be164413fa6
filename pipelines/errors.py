"""What can go wrong in a pipeline, in its own words; `server` translates each into fal's error body."""

from __future__ import annotations

from collections.abc import Sequence


class PipelineError(Exception):
    """The picture could not be made."""


class Cancelled(PipelineError):
    """The caller asked to stop; raised out of a progress callback."""


class ImageLoadError(PipelineError):
    """The bytes are not a readable image."""


class UnsupportedImageFormat(PipelineError):
    """The bytes are an image of a kind that is not read here."""

    def __init__(self, found: str, supported: Sequence[str]) -> None:
        super().__init__(f"Images of format {found} are not supported; expected one of {', '.join(supported)}.")
        self.found, self.supported = found, tuple(supported)


class ImageTooLarge(PipelineError):
    """The picture, or what would be made of it, has more pixels than this server accepts.

    `max_width` and `max_height` (px) are the largest input sides of the same shape that would be accepted.
    """

    def __init__(self, message: str, *, width: int, height: int, max_width: int, max_height: int) -> None:
        super().__init__(message)
        self.width, self.height, self.max_width, self.max_height = width, height, max_width, max_height


class ImageTooSmall(PipelineError):
    """The picture has fewer pixels than the pipeline can work on."""

    def __init__(self, message: str, *, width: int, height: int, min_width: int, min_height: int) -> None:
        super().__init__(message)
        self.width, self.height, self.min_width, self.min_height = width, height, min_width, min_height


class NonFiniteResult(PipelineError):
    """The decoder produced NaN or infinity, in 32-bit floating point too; a black picture is never served instead."""


class InvalidParams(PipelineError):
    """A parameter has a value that the pipeline cannot use."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class CaptionFailed(PipelineError):
    """The captioner has no words for a picture; the request goes on without."""


class ModelsMissing(PipelineError):
    """The operator has not installed the models that a request needs."""


class ModelsUnusable(PipelineError):
    """A file that the operator has put among the models cannot be used."""
