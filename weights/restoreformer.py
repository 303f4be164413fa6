"""RestoreFormer and RestoreFormer++: networks that restore a blurred, small or damaged face, aligned and 512 px large.

Papers: RestoreFormer (CVPR 2022), RestoreFormer++ (arXiv 2308.07228). An encoder and a decoder around a codebook of
undamaged faces, where the decoder attends to what the encoder saw. Code and published weights: Apache-2.0 (they were
trained on FFHQ, whose pictures are CC BY-NC-SA). The sizes, and which of the two it is, are read from the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weights.rrdbnet import UnsuitableNetwork
from weights.superres import read_tensors

SIDE_PX = 512
"""Side of the pictures that the published networks are made for."""
SUFFIXES = (".safetensors", ".pth", ".ckpt")
_TRAINED_AS = "vqvae."  # the training program's name of the network in its checkpoints, beside `loss.`
_GROUPS = 32


class _Residual(nn.Module):
    """Two normalised convolutions beside a shortcut."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(_GROUPS, out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut: nn.Module = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, out, H, W)."""
        changed = self.conv1(F.silu(self.norm1(x)))
        changed = self.conv2(F.silu(self.norm2(changed)))
        shortcut: Tensor = self.nin_shortcut(x)
        return shortcut + changed


class _Attention(nn.Module):
    """Attention among all positions, where the questions may be asked by another picture of the same shape."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.GroupNorm(_GROUPS, channels, eps=1e-6)
        self.norm2 = nn.GroupNorm(_GROUPS, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, asking: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to the same; `asking` has the same shape."""
        seen = self.norm1(x)
        asked = seen if asking is None else self.norm2(asking)
        query, key, value = (self._heads(part) for part in (self.q(asked), self.k(seen), self.v(seen)))
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, heads, H * W, C / heads)
        projected: Tensor = self.proj_out(mixed.transpose(-1, -2).reshape(x.shape))
        return x + projected

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.num_heads, -1)).flatten(-2).transpose(-1, -2)


class _Resampling(nn.Module):
    """Half or twice the size: a convolution of stride 2, or of pixels that were doubled."""

    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if up else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2 H, 2 W) or (B, C, H / 2, W / 2)."""
        resized: Tensor = self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))
        return resized


class _Middle(nn.Module):
    """At the smallest size."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.block_1 = _Residual(channels, channels)
        self.attn_1 = _Attention(channels, num_heads)
        self.block_2 = _Residual(channels, channels)


class _Level(nn.Module):
    """The blocks of one size, each with attention or all without."""

    def __init__(self, channels: int, out: int, *, num_blocks: int, num_heads: int, attends: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Residual(out if i else channels, out) for i in range(num_blocks))
        self.attn = nn.ModuleList(_Attention(out, num_heads) for _ in range(num_blocks if attends else 0))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor, asking: Tensor | None = None) -> Tensor:
        """(B, channels, H, W) to (B, out, H, W); attention is asked by the picture itself or by another."""
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x, asking) if len(self.attn) else x
        return x


class _Encoder(nn.Module):
    """From pixels to codes."""

    def __init__(self, widths: Sequence[int], *, num_blocks: int, num_heads: int, z_channels: int) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            _Level(widths[max(0, i - 1)], width, num_blocks=num_blocks, num_heads=num_heads, attends=i == last)
            for i, width in enumerate(widths)
        )
        for level, width in zip(self.down[:last], widths, strict=False):
            level.downsample = _Resampling(width, up=False)
        self.mid = _Middle(widths[-1], num_heads)
        self.norm_out = nn.GroupNorm(_GROUPS, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """(B, 3, H, W) to the codes, what the decoder's levels are asked by, and what its middle is asked by."""
        x = self.conv_in(x)
        asking: list[Tensor] = []
        for level in self.down:
            asking.append(level(x))
            x = level.get_submodule("downsample")(asking[-1])
        x = self.mid.block_1(x)
        asking[-1] = x
        x = self.mid.block_2(self.mid.attn_1(x))
        return self.conv_out(F.silu(self.norm_out(x))), asking, x


class _Decoder(nn.Module):
    """From codes to pixels; attention, on the `num_attending` smallest sizes, is asked by the encoder."""

    def __init__(
        self, widths: Sequence[int], *, num_blocks: int, num_heads: int, z_channels: int, num_attending: int
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], num_heads)
        self.up = nn.ModuleList(
            _Level(
                widths[min(last, i + 1)],
                width,
                num_blocks=num_blocks + 1,
                num_heads=num_heads,
                attends=i > last - num_attending,
            )
            for i, width in enumerate(widths)
        )
        for level, width in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = _Resampling(width, up=True)
        self.norm_out = nn.GroupNorm(_GROUPS, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor, asking: Sequence[Tensor], asking_middle: Tensor) -> Tensor:
        """(B, z_channels, h, w) to (B, 3, H, W)."""
        x = self.mid.block_1(self.conv_in(x))
        x = self.mid.block_2(self.mid.attn_1(x, asking_middle))
        for level, other in zip(reversed(self.up), reversed(asking), strict=True):
            x = level.get_submodule("upsample")(level(x, other))
        decoded: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return decoded


class _Codebook(nn.Module):
    """Replaces each position by the nearest of the learnt codes."""

    def __init__(self, num_codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to the same."""
        distances = torch.cdist(x.flatten(2).transpose(1, 2), self.embedding.weight[None])
        codes: Tensor = self.embedding(distances.argmin(dim=-1))
        return codes.transpose(1, 2).reshape(x.shape)


class RestoreFormer(nn.Module):
    """The network; the defaults are those of RestoreFormer++ as published.

    Args:
        widths: Channels at full size, half of it, and so on.
        num_blocks: Blocks at each size of the encoder; the decoder has one more.
        num_codes: Of the codebook.
        code_channels: Of each code.
        z_channels: Between encoder, codebook and decoder.
        num_heads: Of each attention; 8 in RestoreFormer.
        num_attending: Sizes at which the decoder attends; 1 in RestoreFormer.
    """

    def __init__(
        self,
        *,
        widths: Sequence[int] = (64, 128, 128, 256, 256, 512),
        num_blocks: int = 2,
        num_codes: int = 1024,
        code_channels: int = 256,
        z_channels: int = 256,
        num_heads: int = 4,
        num_attending: int = 2,
    ) -> None:
        super().__init__()
        self.encoder = _Encoder(widths, num_blocks=num_blocks, num_heads=num_heads, z_channels=z_channels)
        self.decoder = _Decoder(
            widths, num_blocks=num_blocks, num_heads=num_heads, z_channels=z_channels, num_attending=num_attending
        )
        self.quantize = _Codebook(num_codes, code_channels)
        self.quant_conv = nn.Conv2d(z_channels, code_channels, 1)
        self.post_quant_conv = nn.Conv2d(code_channels, z_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Restore aligned faces.

        Args:
            image: (B, 3, H, W), floating, in 0..1; sides that can be halved `len(widths) - 1` times.

        Returns:
            Same shape, dtype and device, about 0..1 and not clamped.
        """
        codes, asking, asking_middle = self.encoder(image * 2 - 1)
        codes = self.post_quant_conv(self.quantize(self.quant_conv(codes)))
        decoded: Tensor = self.decoder(codes, asking, asking_middle)
        return decoded / 2 + 0.5


def load_restorer(file: Path) -> RestoreFormer:
    """The network in a file: RestoreFormer.pth, RestoreFormer++.ckpt, or either as safetensors.

    Returns:
        The network in float32 and in evaluation mode, on the CPU.

    Raises:
        UnsuitableNetwork: It is none that can be read.
    """
    tensors = read_tensors(file, with_classes=True)
    own = {name.removeprefix(_TRAINED_AS): one for name, one in tensors.items() if name.startswith(_TRAINED_AS)}
    return restorer_of(own or tensors)


def restorer_of(tensors: Mapping[str, Tensor]) -> RestoreFormer:
    """Build the network that a file's tensors describe, and fill it.

    Raises:
        UnsuitableNetwork: They describe none.
    """
    try:
        widths = [
            tensors[f"encoder.down.{i}.block.0.conv2.weight"].shape[0]
            for i in range(_count(tensors, "encoder.down.{}.block.0.conv2.weight"))
        ]
        attending = sum(f"decoder.up.{i}.attn.0.q.weight" in tensors for i in range(len(widths)))
        num_codes, code_channels = tensors["quantize.embedding.weight"].shape
        with torch.device("meta"):
            model = RestoreFormer(
                widths=widths,
                num_blocks=_count(tensors, "encoder.down.0.block.{}.conv1.weight"),
                num_codes=num_codes,
                code_channels=code_channels,
                z_channels=tensors["quant_conv.weight"].shape[1],
                num_heads=4 if attending > 1 else 8,  # no tensor tells it
                num_attending=attending,
            )
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise UnsuitableNetwork(f"The tensors are not those of RestoreFormer or RestoreFormer++: {error}") from error
    return model.eval().requires_grad_(False)


def _count(tensors: Mapping[str, Tensor], name: str) -> int:
    """How many names there are with 0, 1, 2, … in the place of the braces."""
    number = 0
    while name.format(number) in tensors:
        number += 1
    return number
