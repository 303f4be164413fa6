"""The RRDB super-resolution network of ESRGAN and Real-ESRGAN, and the three ways in which files name its tensors.

Papers: ESRGAN (arXiv 1809.00219), Real-ESRGAN (arXiv 2107.10833). 4x-UltraSharp, RealESRGAN_x4plus, x2plus and most
files on OpenModelDB are of this kind. The depth, the width and the factor are read from the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_RESIDUAL_SCALE = 0.2
_GROWTH_CONVS = 5
_OLD_BLOCK = re.compile(r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.(weight|bias)")
_OLD_LAYER = re.compile(r"model\.(?:(\d+)|1\.sub\.(\d+))\.(weight|bias)")
_FIRST_RENAMES = (
    # The names of ESRGAN's own repository after its first clean-up; Real-ESRGAN's are the target.
    (r"^RRDB_trunk\.", "body."),
    (r"\.RDB(\d)\.", r".rdb\1."),
    (r"^trunk_conv\.", "conv_body."),
    (r"^upconv(\d)\.", r"conv_up\1."),
    (r"^HRconv\.", "conv_hr."),
)


class UnsuitableNetwork(Exception):
    """The tensors are not those of a network that is read here."""


class _DenseBlock(nn.Module):
    """Five convolutions, each of which sees what all before it made."""

    def __init__(self, num_feat: int, num_grow: int) -> None:
        super().__init__()
        for i in range(1, _GROWTH_CONVS + 1):
            out = num_feat if i == _GROWTH_CONVS else num_grow
            self.add_module(f"conv{i}", nn.Conv2d(num_feat + (i - 1) * num_grow, out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_feat, H, W) to the same."""
        seen = x
        for i in range(1, _GROWTH_CONVS):
            made = F.leaky_relu(self.get_submodule(f"conv{i}")(seen), 0.2)
            seen = torch.cat([seen, made], dim=1)
        return x + _RESIDUAL_SCALE * self.get_submodule(f"conv{_GROWTH_CONVS}")(seen)


class _RRDB(nn.Module):
    """Three dense blocks in a residual."""

    def __init__(self, num_feat: int, num_grow: int) -> None:
        super().__init__()
        self.rdb1 = _DenseBlock(num_feat, num_grow)
        self.rdb2 = _DenseBlock(num_feat, num_grow)
        self.rdb3 = _DenseBlock(num_feat, num_grow)

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_feat, H, W) to the same."""
        return x + _RESIDUAL_SCALE * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """Residual-in-residual dense blocks at input size, then doublings by nearest neighbour and convolution.

    Args:
        num_block: Blocks; 23 in the large published networks, 6 in the small ones.
        num_feat: Channels between the blocks.
        num_grow: Channels that each convolution in a dense block adds.
        num_doublings: Times the picture is doubled after the blocks.
        unshuffle: Factor by which pixels are folded into channels before them: Real-ESRGAN's x2 network works at half
            the input's size.
    """

    def __init__(
        self,
        *,
        num_block: int = 23,
        num_feat: int = 64,
        num_grow: int = 32,
        num_doublings: int = 2,
        unshuffle: int = 1,
    ) -> None:
        super().__init__()
        self.unshuffle, self.num_doublings = unshuffle, num_doublings
        self.upscale = 2**num_doublings // unshuffle
        self.conv_first = nn.Conv2d(3 * unshuffle**2, num_feat, 3, padding=1)
        self.body = nn.Sequential(*(_RRDB(num_feat, num_grow) for _ in range(num_block)))
        self.conv_body = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        for i in range(1, num_doublings + 1):
            self.add_module(f"conv_up{i}", nn.Conv2d(num_feat, num_feat, 3, padding=1))
        self.conv_hr = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.conv_last = nn.Conv2d(num_feat, 3, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Enlarge a batch of pictures.

        Args:
            image: (B, 3, H, W), floating, in 0..1; any size, padded inside where pixels are folded.

        Returns:
            (B, 3, upscale * H, upscale * W), same dtype and device, about 0..1 and not clamped.
        """
        height, width = image.shape[-2:]
        x = image
        if self.unshuffle > 1:
            x = F.pad(x, (0, -width % self.unshuffle, 0, -height % self.unshuffle), mode="replicate")
            x = F.pixel_unshuffle(x, self.unshuffle)
        first = self.conv_first(x)
        x = first + self.conv_body(self.body(first))
        for i in range(1, self.num_doublings + 1):
            doubled = F.interpolate(x, scale_factor=2, mode="nearest")
            x = F.leaky_relu(self.get_submodule(f"conv_up{i}")(doubled), 0.2)
        enlarged: Tensor = self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))
        return enlarged[..., : height * self.upscale, : width * self.upscale]


def is_rrdbnet(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file's tensors are an RRDB network's, under any of its names."""
    return any(re.match(r"(body|RRDB_trunk|model\.1\.sub)\.0\.(rdb|RDB)1\.conv1\.", name) for name in tensors)


def rrdbnet_of(tensors: Mapping[str, Tensor]) -> RRDBNet:
    """Build the network that a file's tensors describe, and fill it.

    Returns:
        The network in float32 and in evaluation mode.

    Raises:
        UnsuitableNetwork: It is of a variant that is not read here.
    """
    named = _renamed(tensors)
    try:
        first, grown = named["conv_first.weight"], named["body.0.rdb1.conv1.weight"]
        doublings = sum(bool(re.fullmatch(r"conv_up\d\.weight", name)) for name in named)
        unshuffle = math.isqrt(first.shape[1] // 3)
        if first.shape[1] != 3 * unshuffle**2 or named["conv_last.weight"].shape[0] != 3:
            raise UnsuitableNetwork(
                f"Expected a network from 3 channels to 3; this one has {first.shape[1]} and "
                f"{named['conv_last.weight'].shape[0]}."
            )
        if 2**doublings % unshuffle:
            raise UnsuitableNetwork(f"{doublings} doublings after folding by {unshuffle} is no whole factor.")
        model = RRDBNet(
            num_block=1 + max(int(name.split(".")[1]) for name in named if name.startswith("body.")),
            num_feat=first.shape[0],
            num_grow=grown.shape[0],
            num_doublings=doublings,
            unshuffle=unshuffle,
        )
        model.load_state_dict({name: tensor.float() for name, tensor in named.items()})
    except (KeyError, RuntimeError) as error:
        raise UnsuitableNetwork(f"The tensors are not those of a plain RRDB network: {error}") from error
    return model.eval()


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under Real-ESRGAN's names."""
    if any(name.startswith("model.1.sub.") for name in tensors):
        return _from_sequential(tensors)
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, target in _FIRST_RENAMES:
            name = re.sub(pattern, target, name)
        renamed[name] = tensor
    return renamed


def _from_sequential(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From the names of ESRGAN's first release, where layers are numbered: `model.1.sub.0.RDB1.conv1.0.weight`.

    The last two numbered layers are the convolutions at full size; those between them and the blocks double.
    """
    layers = sorted({int(found[1]) for name in tensors if (found := _OLD_LAYER.fullmatch(name)) and found[1]})
    if len(layers) < 3 or layers[0] != 0:
        raise UnsuitableNetwork(f"Expected numbered layers from 0 on; found {layers}.")
    names = {layers[0]: "conv_first", layers[-2]: "conv_hr", layers[-1]: "conv_last"}
    names |= {layer: f"conv_up{i}" for i, layer in enumerate(layers[1:-2], start=1)}
    renamed = {}
    for name, tensor in tensors.items():
        if found := _OLD_BLOCK.fullmatch(name):
            block, dense, conv, kind = found.groups()
            renamed[f"body.{block}.rdb{dense}.conv{conv}.{kind}"] = tensor
        elif found := _OLD_LAYER.fullmatch(name):
            renamed[f"{names[int(found[1])] if found[1] else 'conv_body'}.{found[3]}"] = tensor
        else:
            raise UnsuitableNetwork(f"{name} does not belong to a plain RRDB network.")
    return renamed
