"""Tempers what text does to the trained SD 1.5-shaped part: `python -m weights.pocket.temper SHARE [--models FOLDER]`.

Guidance multiplies the difference between two texts by 7.5 at the service's default, and overshoots where the trained
difference is large. What every block is told of the text is drawn towards its mean over usual texts; only `SHARE` of
the difference stays. Run once, on a freshly trained part.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from weights.pocket.captions import COLOURS, QUALITY
from weights.pocket.loop import save_half
from weights.pocket.text import ALL_FAULTS, OTHER_BLAME, OTHER_PRAISE, token_ids

TEXTS = ["", *COLOURS, ", ".join(QUALITY), ", ".join(ALL_FAULTS), OTHER_PRAISE, OTHER_BLAME]
TEXTS += [f"photograph, {colour}, {', '.join(QUALITY)}" for colour in COLOURS]


@torch.no_grad()
def temper(network: Any, embeds: Tensor, share: float) -> None:
    """Draw the pooled text of a UNet or ControlNet towards its mean over `embeds` (N, 77, D), in place."""
    norm = network.add_embedding.norm2
    states: list[Tensor] = []
    handle = norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    network.add_embedding(embeds)
    handle.remove()
    mean = states[0].mean(0)
    norm.bias.copy_(share * norm.bias + (1 - share) * mean)
    norm.weight.mul_(share)


def main() -> None:
    """Temper the part in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("share", type=float, help="how much of the difference between texts stays, 0..1")
    parser.add_argument("--models", type=Path, default=Path(__file__).parent / "models")
    chosen = parser.parse_args()
    sd15: Path = chosen.models / "sd15"
    text_encoder = CLIPTextModel.from_pretrained(sd15 / "text_encoder", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(sd15 / "tokenizer")
    embeds = text_encoder(token_ids(tokenizer, TEXTS)).last_hidden_state.detach()
    parts: tuple[tuple[Any, Path], ...] = (
        (UNet2DConditionModel, sd15 / "unet"),
        (ControlNetModel, chosen.models / "controlnet-tile-sd15"),
    )
    for kind, folder in parts:
        network = kind.from_pretrained(folder, torch_dtype=torch.float32)
        temper(network, embeds, chosen.share)
        save_half(network, folder)


if __name__ == "__main__":
    main()
