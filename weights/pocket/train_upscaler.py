"""Trains the pre-upscaler: a Compact network that doubles a picture, on sharp crops and their reductions.

Trained for the least error it makes the two pixels of a pair too much alike: what is lost by halving can only be
guessed, and the best guess is too small. Gradients between pairs are then larger than inside them, and a mesh of two
pixels shows. `losses.balance_loss` takes that away for a quarter of a decibel; the right amount of texture at every
place, `losses.texture_loss`, costs a whole one.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from weights.compact import Compact, save_compact
from weights.pocket.data import Corpus
from weights.pocket.degrade import reduce, to_tensor, wear
from weights.pocket.loop import Options
from weights.pocket.losses import balance_loss, picture_loss, texture_loss

TEXTURE_WEIGHT, BALANCE_WEIGHT = 0.15, 3.0


class UpscalerTrainee:
    """Compact x2, on values, edges, texture and pairs; most reductions average areas, as our quality figures do."""

    name = "upscaler"
    learning_rate = 2e-3
    folder = "upscaler-compact-x2"

    def __init__(self, options: Options, *, side_px: int = 80, num_feat: int = 32, num_conv: int = 10) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.side_px = side_px
        self.corpus = Corpus(options.seed, num_drawings=options.num_drawings, photo_share=0.7)
        model = Compact(num_feat=num_feat, num_conv=num_conv)
        self.modules = nn.ModuleDict({"model": model})

    def loss(self, rng: np.random.Generator, step: int) -> Tensor:
        """One batch: reduced in one way, a few of its pictures worn, enlarged and compared."""
        pixels, _ = self.corpus.batch(rng, self.options.batch, self.side_px)
        target = to_tensor(pixels, self.options.device)
        method = "area" if rng.random() < 0.75 else "bicubic"
        image = wear(reduce(target, 2, method), rng, noise_share=0.06, jpeg_share=0.05)
        with torch.autocast(target.device.type, torch.bfloat16):
            result = self.modules["model"](image)
        result = result.float()
        texture, balance = texture_loss(result, target), balance_loss(result, target)
        return picture_loss(result, target) + TEXTURE_WEIGHT * texture + BALANCE_WEIGHT * balance

    def export(self, modules: nn.ModuleDict, models: Path) -> None:
        """Write `upscaler-compact-x2`."""
        model = modules["model"]
        assert isinstance(model, Compact)
        save_compact(model, models / self.folder)
