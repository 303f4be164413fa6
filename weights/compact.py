"""The Compact super-resolution network: a plain stack of convolutions that doubles a picture.

The architecture is SRVGGNetCompact of Real-ESRGAN (arXiv 2107.10833), whose published files name their
parameters `body.N.weight` and `body.N.bias`; those files load into this class unchanged.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


class Compact(nn.Module):
    """Convolutions at input size, then one pixel shuffle; the network learns what nearest enlargement lacks.

    Args:
        num_in_ch: Channels of the input picture.
        num_out_ch: Channels of the result; the base is added to it, so it must equal `num_in_ch`.
        num_feat: Channels between the convolutions.
        num_conv: Convolutions between the first and the last one.
        upscale: Whole factor by which both sides grow.
    """

    def __init__(
        self, num_in_ch: int = 3, num_out_ch: int = 3, num_feat: int = 32, num_conv: int = 8, upscale: int = 2
    ) -> None:
        super().__init__()
        self.config = {
            "num_in_ch": num_in_ch,
            "num_out_ch": num_out_ch,
            "num_feat": num_feat,
            "num_conv": num_conv,
            "upscale": upscale,
        }
        self.upscale = upscale
        layers: list[nn.Module] = [nn.Conv2d(num_in_ch, num_feat, 3, padding=1), nn.PReLU(num_feat)]
        for _ in range(num_conv):
            layers += [nn.Conv2d(num_feat, num_feat, 3, padding=1), nn.PReLU(num_feat)]
        layers.append(nn.Conv2d(num_feat, num_out_ch * upscale**2, 3, padding=1))
        self.body = nn.Sequential(*layers)

    @property
    def receptive_px(self) -> int:
        """How far, in input pixels, a result pixel looks in each direction: one per convolution."""
        return int(self.config["num_conv"]) + 2

    def forward(self, image: Tensor) -> Tensor:
        """Enlarge a batch of pictures.

        Args:
            image: (B, num_in_ch, H, W), floating, in 0..1.

        Returns:
            (B, num_out_ch, upscale * H, upscale * W), same dtype and device, about 0..1 and not clamped.
        """
        base = F.interpolate(image, scale_factor=self.upscale, mode="nearest")
        return F.pixel_shuffle(self.body(image), self.upscale) + base


def load_compact(folder: Path, *, device: str | torch.device = "cpu") -> Compact:
    """Build the network that `config.json` in `folder` describes and fill it from `model.safetensors`.

    Returns:
        The network in float32 and in evaluation mode, whatever type the file stores.

    Raises:
        FileNotFoundError: One of the two files is missing.
        RuntimeError: The file's tensors are not those of the described network.
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    model = Compact(**config)
    tensors = load_file(folder / WEIGHTS_FILE)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.to(device).eval()


def save_compact(model: Compact, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` (float32) to `folder`, replacing what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(model.config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
