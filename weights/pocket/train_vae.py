"""Trains the picture codec: a stock AutoencoderKL of factor 4 with 16 latent channels, lean enough for two cores."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from weights.pocket.data import Corpus
from weights.pocket.degrade import to_tensor
from weights.pocket.loop import Options
from weights.pocket.losses import picture_loss

# The prior hardly matters: latents only have to stay bounded, the denoiser learns their true shape.
KL_WEIGHT = 2e-7
# That of SD 1.5: what latents are multiplied with before noise is added.
SCALING_FACTOR = 0.18215


def build_vae() -> Any:
    """The untrained AutoencoderKL.

    It has no attention: that would look at the whole picture, and decoding in tiles would no longer be exact.
    """
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=256,
        mid_block_add_attention=False,
    )


class VaeTrainee:
    """The codec, on absolute errors of values and edges and a trace of the usual prior."""

    name = "vae"
    learning_rate = 2e-3

    def __init__(self, options: Options, *, side_px: int = 64) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.side_px = side_px
        self.corpus = Corpus(options.seed + 1, num_drawings=options.num_drawings, photo_share=0.6)
        self.modules = nn.ModuleDict({"vae": build_vae()})

    def loss(self, rng: np.random.Generator, step: int) -> Tensor:
        """One batch: encoded, sampled, decoded and compared, in -1..1."""
        pixels, _ = self.corpus.batch(rng, self.options.batch, self.side_px)
        target = to_tensor(pixels, self.options.device).contiguous() * 2 - 1
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        vae: Any = self.modules["vae"]
        with torch.autocast(target.device.type, torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(target.device)
            result = vae.decode(posterior.mean + posterior.std * noise).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        return picture_loss(result.float(), target) + KL_WEIGHT * divergence

    @torch.no_grad()
    def even_out(self, vae: Any, num_crops: int = 128) -> None:
        """Bring every latent channel to mean 0 and the deviation that SD 1.5's scaling factor expects, in place.

        Noise is added to all channels alike: a faint channel would drown in it before a strong one is touched. The
        convolutions between latents and networks have no neighbourhood, so they take the change up exactly.
        """
        pixels, _ = self.corpus.batch(np.random.default_rng(self.options.seed), num_crops, self.side_px)
        latents = vae.encode(to_tensor(pixels, self.options.device).contiguous() * 2 - 1).latent_dist.mean
        shift = latents.mean((0, 2, 3))
        factor = 1 / (latents.std((0, 2, 3)) * SCALING_FACTOR)
        count = len(shift)
        inward, outward = vae.quant_conv, vae.post_quant_conv
        inward.weight[:count] *= factor.view(-1, 1, 1, 1)
        inward.bias[:count] = (inward.bias[:count] - shift) * factor
        inward.bias[count:] += 2 * factor.log()
        outward.bias += outward.weight[:, :, 0, 0] @ shift
        outward.weight /= factor.view(1, -1, 1, 1)

    def export(self, modules: nn.ModuleDict, models: Path) -> None:
        """Write `vae` with evened-out latents."""
        vae: Any = copy.deepcopy(modules["vae"])
        self.even_out(vae)
        vae.register_to_config(scaling_factor=SCALING_FACTOR)
        vae.save_pretrained(models / "vae")
