"""Whether a picture may be shown: the checker of Stable Diffusion, confirmed by a second classifier.

The checker (`CompVis/stable-diffusion-safety-checker`, distributed under CreativeML OpenRAIL-M) compares a CLIP
embedding with 17 fixed concepts and often takes skin tones, abstract pictures and noise for one of them. So a
classifier of two labels (`Falconsai/nsfw_image_detection`, Apache-2.0) has to agree. Where none is installed, the
checker decides alone.

Both look at 224 pixels. A picture whose sides differ much, or that is large, is also looked at in parts:

=================================== =========================================================
what is looked at                   is unsafe where
=================================== =========================================================
the whole picture                   the checker reacts, and the classifier is sure to 0.85
squares along its longer side, and  the classifier is sure to 0.95; without a classifier: the
windows of half its sides           checker reacts
=================================== =========================================================

Cost on two cores, full set: about a second a view, at most ten views of a picture of usual shape.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, ViTForImageClassification, ViTImageProcessor

WHOLE_CONFIDENCE, PART_CONFIDENCE = 0.85, 0.95
"""How sure the classifier must be: the first as Black Forest Labs use it, the second because close-ups mislead it."""
MAX_ASPECT, MAX_SIDE_PX = 1.5, 1536
"""From here on the whole picture alone says too little."""
MAX_SQUARES = 15
"""Along the longer side; in pictures still longer they grow to windows, which are squashed."""
MARGIN = 2
"""Views are reduced to this many times what a model looks at before its processor does the rest."""
UNSAFE_LABEL = "nsfw"


class Box(NamedTuple):
    """A part of a picture in pixels."""

    left: float
    top: float
    right: float
    bottom: float


class SafetyChecker:
    """The models, in float32 on one device; neither is changed by a request."""

    def __init__(self, checker: Any, processor: Any, confirmer: Any = None, confirmer_processor: Any = None) -> None:
        self.checker = checker.eval()
        self.processor = processor
        self.confirmer: Any = None if confirmer is None else confirmer.eval()
        self.confirmer_processor = confirmer_processor

    @classmethod
    def load(cls, folder: Path, *, confirmer: Path | None = None, device: str = "cpu") -> SafetyChecker:
        """Load checker and, where its folder is given, classifier, each in the layout it was published in.

        Raises:
            OSError: A folder is incomplete.
        """
        options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
        checker: Any = StableDiffusionSafetyChecker.from_pretrained(folder, **options)
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        if confirmer is None:
            return cls(checker.to(device), processor)
        classifier: Any = ViTForImageClassification.from_pretrained(confirmer, **options)
        return cls(
            checker.to(device),
            processor,
            classifier.to(device),
            ViTImageProcessor.from_pretrained(confirmer, local_files_only=True),
        )

    @torch.inference_mode()
    def is_unsafe(self, image: Image.Image) -> bool:
        """Whether an RGB picture of any size must not be shown; the same answer every time."""
        whole, *parts = (view(image, box, MARGIN * self._side_px) for box in boxes(*image.size))
        if self.confirmer is None:
            return any(self._reacts([whole, *parts]))
        sure = self._confidence([whole, *parts])
        if any(value >= PART_CONFIDENCE for value in sure[1:]):
            return True
        return sure[0] >= WHOLE_CONFIDENCE and self._reacts([whole])[0]

    @property
    def _side_px(self) -> int:
        """The longer of the sides that the two models look at."""
        sides = [self.checker.config.vision_config.image_size]
        if self.confirmer is not None:
            sides.append(self.confirmer.config.image_size)
        return max(sides)

    def _reacts(self, views: list[Image.Image]) -> list[bool]:
        """Whether the checker finds one of its concepts, for each view; one batch."""
        pixels = self._pixels(self.processor, views, self.checker)
        # Its other forward blackens a picture and logs a warning for each view: both are for the recipe to do.
        _, found = self.checker.forward_onnx(pixels, pixels.new_zeros(len(views), 1))
        return [bool(each) for each in found]

    def _confidence(self, views: list[Image.Image]) -> list[float]:
        """How sure the classifier is that each view is unsafe, 0..1; one batch."""
        logits = self.confirmer(self._pixels(self.confirmer_processor, views, self.confirmer)).logits
        label = self.confirmer.config.label2id[UNSAFE_LABEL]
        return [float(value) for value in logits.float().softmax(-1)[:, label]]

    @staticmethod
    def _pixels(processor: Any, views: list[Image.Image], model: Any) -> Tensor:
        """The views (N, 3, side, side) as the model wants them."""
        values: Tensor = processor(images=views, return_tensors="pt")["pixel_values"]
        return values.to(model.device, model.dtype)


def boxes(width: int, height: int) -> list[Box]:
    """What is looked at of a picture of `width` x `height` px, in pixels: the whole first, then the parts."""
    whole = Box(0, 0, width, height)
    short, long = sorted((width, height))
    if long <= MAX_ASPECT * short and long <= MAX_SIDE_PX:
        return [whole]
    found = [whole]
    if long > MAX_ASPECT * short:
        # An odd number, so that one of them lies in the middle.
        count = min(MAX_SQUARES, math.ceil(long / short) | 1)
        side = max(short, long / MAX_SQUARES)
        for index in range(count):
            start = (long - side) * index / (count - 1)
            found.append(Box(start, 0, start + side, short) if width >= height else Box(0, start, short, start + side))
    if long > MAX_SIDE_PX:
        found += [
            Box(column * width / 4, row * height / 4, (column + 2) * width / 4, (row + 2) * height / 4)
            for row in range(3)
            for column in range(3)
        ]
    return found


def view(image: Image.Image, box: Box, side_px: int) -> Image.Image:
    """A part of a picture as RGB with a shorter side of at most `side_px`, reduced with an antialiasing filter."""
    width, height = box.right - box.left, box.bottom - box.top
    factor = min(1.0, side_px / min(width, height))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    # A quick area average down to three times the size, then a filter: as good, and fast on large pictures.
    return image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0).convert("RGB")


def blacked_out(image: Image.Image) -> Image.Image:
    """What is shown instead of an unsafe picture: black, of the same size and mode, opaque where there is an alpha."""
    black = Image.new("RGB", image.size).convert(image.mode)
    if "A" in image.mode:
        black.putalpha(255)
    return black
