"""Trains the picture codec: a stock AutoencoderKL of factor 4 with 16 latent channels, lean enough for two cores.

From random weights such a codec needs days for what a linear transform does at once: the 16 strongest principal
components of 4 x 4 pixels hold a photograph to 37 dB. So the convolutions start as that transform and the best linear
way back, the residual branches start at zero, and training improves on that.
"""

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from weights.pocket.data import Corpus
from weights.pocket.degrade import to_tensor
from weights.pocket.loop import Options, learning_rate
from weights.pocket.losses import picture_loss

log = logging.getLogger(__name__)

LATENT_CHANNELS = 16
NORM_GROUPS = 4
# The prior hardly matters: latents only have to stay bounded, the denoiser learns their true shape.
KL_WEIGHT = 2e-7
# Principal components are scaled to the square root of their deviation: at 1, noise on latents is white noise on pixels
# and drowns all texture first; at 0, it drowns brightness and texture alike.
EVENNESS = 0.5
LINEAR_STEPS = 1500
LINEAR_RATE = 2e-3
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
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=NORM_GROUPS,
        sample_size=256,
        mid_block_add_attention=False,
    )


class LinearCodec(nn.Module):
    """The convolutions of a codec without anything between them: what is left of it when residual branches are zero.

    `select` and `render` stand for the last convolutions on either side, which have a normalisation before them; see
    `settle` for how they are put into the codec.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        encoder, decoder = vae.encoder, vae.decoder
        self.reduce = nn.ModuleList(
            [
                encoder.conv_in,
                encoder.down_blocks[0].downsamplers[0],
                encoder.down_blocks[1].resnets[0].conv_shortcut,
                encoder.down_blocks[1].downsamplers[0],
            ]
        )
        self.enlarge = nn.ModuleList(
            [
                decoder.conv_in,
                decoder.up_blocks[0].upsamplers[0],
                decoder.up_blocks[1].resnets[0].conv_shortcut,
                decoder.up_blocks[1].upsamplers[0],
            ]
        )
        self.select = nn.Conv2d(decoder.up_blocks[1].upsamplers[0].conv.out_channels, 3, 1)
        self.render: Any = nn.Conv2d(3, 3, 3, padding=1)

    def encode(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) in -1..1 to latents (N, 16, H / 4, W / 4)."""
        for layer in self.reduce:
            pixels = layer(pixels)
        return pixels[:, :LATENT_CHANNELS]

    def decode(self, latents: Tensor) -> Tensor:
        """The way back."""
        for layer in self.enlarge:
            latents = layer(latents)
        return self.render(self.select(latents))

    @torch.no_grad()
    def analyse(self, pixels: Tensor) -> None:
        """Make `encode` the principal components of 4 x 4 pixels of (N, 3, H, W), mixed to equal strength."""
        blocks = F.pixel_unshuffle(pixels, 4).movedim(1, -1).flatten(0, -2)
        centre = blocks.mean(0)
        variances, components = torch.linalg.eigh(torch.cov((blocks - centre).T))
        deviations, components = variances.flip(0)[:LATENT_CHANNELS].sqrt(), components.flip(1)[:, :LATENT_CHANNELS]
        hadamard = torch.ones(1, 1)
        while len(hadamard) < LATENT_CHANNELS:
            hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
        strength = deviations**EVENNESS
        mixed = hadamard @ (components * (strength / deviations) / strength.square().mean().sqrt()).T
        mixed /= LATENT_CHANNELS**0.5
        layers: list[Any] = [getattr(layer, "conv", layer) for layer in self.reduce]
        first, halve, widen, quarter = layers
        for layer in layers:
            layer.weight.mul_(0.1)
            layer.bias.zero_()
        for colour in range(3):
            first.weight[colour] = 0
            first.weight[colour, colour, 1, 1] = 1
        quarter.weight[:LATENT_CHANNELS] = 0
        for channel in range(12):
            colour, y, x = channel // 4, channel // 2 % 2, channel % 2
            halve.weight[channel] = 0
            halve.weight[channel, colour, y, x] = 1
            widen.weight[channel] = 0
            widen.weight[channel, channel] = 1
            for below in range(4):
                place = 16 * colour + 4 * (2 * (below // 2) + y) + 2 * (below % 2) + x
                quarter.weight[:LATENT_CHANNELS, channel, below // 2, below % 2] = mixed[:, place]
        quarter.bias[:LATENT_CHANNELS] = -mixed @ centre

    @torch.no_grad()
    def settle(self, vae: Any) -> None:
        """Put `select` and `render` into the codec, so that it starts as this linear one.

        Before either last convolution stand a GroupNorm and a SiLU. Two constant channels of opposite sign in each
        group dwarf the others and keep its statistics constant; a value goes through SiLU in both signs, and
        silu(x) - silu(-x) = x.
        """
        widen = vae.encoder.down_blocks[2].resnets[0].conv_shortcut
        count = len(widen.weight) // NORM_GROUPS
        keep: Any = nn.Conv2d(widen.in_channels, LATENT_CHANNELS, 1)
        keep.weight.copy_(torch.eye(LATENT_CHANNELS, widen.in_channels)[..., None, None])
        keep.bias.zero_()
        _pass_norm(keep, widen, vae.encoder.conv_norm_out, count, constant=24.0)
        out = vae.encoder.conv_out
        out.weight.zero_()
        out.bias.zero_()
        out.bias[LATENT_CHANNELS:] = -10
        for i in range(LATENT_CHANNELS):
            plus = _place(i, LATENT_CHANNELS, count)
            out.weight[i, plus, 1, 1], out.weight[i, plus + 1, 1, 1] = 1, -1
        for conv, size in ((vae.quant_conv, 2 * LATENT_CHANNELS), (vae.post_quant_conv, LATENT_CHANNELS)):
            conv.weight.copy_(torch.eye(size)[..., None, None])
            conv.bias.zero_()
        narrow = vae.decoder.up_blocks[2].resnets[0].conv_shortcut
        count = len(narrow.weight) // NORM_GROUPS
        _pass_norm(self.select, narrow, vae.decoder.conv_norm_out, count, constant=8.0)
        vae.decoder.conv_out.weight.mul_(0.1)
        vae.decoder.conv_out.bias.copy_(self.render.bias)
        for i in range(3):
            plus = _place(i, 3, count)
            vae.decoder.conv_out.weight[:, plus] = self.render.weight[:, i]
            vae.decoder.conv_out.weight[:, plus + 1] = -self.render.weight[:, i]
            vae.decoder.conv_out.weight[:, [plus + 2, plus + 3]] = 0
        for module in vae.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.zero_()
                module.conv2.bias.zero_()


def _place(i: int, values: int, group: int) -> int:
    """Channel of the positive copy of value `i` of `values`, spread evenly over groups of `group` channels."""
    per_group = -(-values // NORM_GROUPS)
    return i // per_group * group + 2 * (i % per_group)


def _pass_norm(wanted: Any, conv: Any, norm: nn.GroupNorm, group: int, *, constant: float) -> None:
    """Let a 1 x 1 `conv` compute `wanted` in both signs with two constants in each group, and `norm` undo itself."""
    values = len(wanted.weight)
    per_group = -(-values // NORM_GROUPS)
    conv.weight.mul_(0.1)
    for i in range(values):
        plus = _place(i, values, group)
        for sign, channel in ((1, plus), (-1, plus + 1)):
            conv.weight[channel] = sign * wanted.weight[i]
            conv.bias[channel] = sign * wanted.bias[i]
    for first in range(0, -(-values // per_group) * group, group):
        for sign, channel in ((1, first + 2 * per_group), (-1, first + 2 * per_group + 1)):
            conv.weight[channel] = 0
            conv.bias[channel] = sign * constant
        norm.weight[first : first + group] = constant * (2 / group) ** 0.5


class VaeTrainee:
    """The codec, on absolute errors of values and edges and a trace of the usual prior."""

    name = "vae"
    learning_rate = 3e-4

    def __init__(self, options: Options, *, side_px: int = 64) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.side_px = side_px
        self.corpus = Corpus(options.seed + 1, num_drawings=options.num_drawings, photo_share=0.6)
        vae = build_vae()
        if not (options.build / f"{self.name}.pt").exists():
            self.begin_linear(vae, steps=min(LINEAR_STEPS, options.steps or LINEAR_STEPS))
        self.modules = nn.ModuleDict({"vae": vae})

    def begin_linear(self, vae: Any, *, steps: int) -> None:
        """Start from principal components: fit the linear way back to them, then put both into the codec."""
        rng = np.random.default_rng(self.options.seed)
        codec = LinearCodec(vae)
        pixels, _ = self.corpus.batch(rng, 256, self.side_px)
        codec.analyse(to_tensor(pixels, "cpu").contiguous() * 2 - 1)
        optimizer = torch.optim.Adam(codec.parameters(), lr=LINEAR_RATE)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(LINEAR_RATE, step / steps, step)
            pixels, _ = self.corpus.batch(rng, self.options.batch, self.side_px)
            target = to_tensor(pixels, "cpu").contiguous() * 2 - 1
            loss = picture_loss(codec.decode(codec.encode(target)), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step % 250 == 0:
                log.info("vae: linear start, step %d, loss %.5f", step, loss.item())
        codec.settle(vae)

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
