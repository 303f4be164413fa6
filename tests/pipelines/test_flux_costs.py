"""The published configurations without their weights: sizes and work are what plans and limits assume."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, Flux2Transformer2DModel, FluxControlNetModel, FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from pipelines.flux_vision_upscaler import PROFILES

TEXT_TOKENS = 512
"""Of every forward, but where it is said otherwise."""


def on_meta(kind: Any, **config: Any) -> Any:
    """A network whose parameters have shapes only."""
    with torch.device("meta"):
        return kind(**config)


@cache
def clip() -> Any:
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    return on_meta(CLIPTextModel, config=config)


@cache
def t5() -> Any:
    config = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    return on_meta(T5EncoderModel, config=config)


@cache
def flux1() -> Any:
    return on_meta(FluxTransformer2DModel, guidance_embeds=True)


@cache
def upscaler_controlnet() -> Any:
    return on_meta(FluxControlNetModel, num_layers=5, num_single_layers=0, guidance_embeds=True)


@cache
def klein() -> Any:
    shape = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
    return on_meta(Flux2Transformer2DModel, guidance_embeds=False, **shape)


@cache
def flux1_vae() -> Any:
    return on_meta(
        AutoencoderKL,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


@pytest.mark.parametrize(
    ("build", "millions"),
    [(flux1, 11901), (upscaler_controlnet, 1791), (klein, 3875.5), (t5, 4762), (clip, 123), (flux1_vae, 83.8)],
)
def test_sizes_are_the_published_ones(build: Any, millions: float) -> None:
    """Parameters of each part, within 1 %."""
    network: nn.Module = build()

    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def ids(count: int, axes: int) -> Tensor:
    return torch.zeros(count, axes, device="meta")


def counted(work: Callable[[], object]) -> float:
    """10^12 floating-point operations of a call."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops()) / 1e12


def tera_flops(
    network: Any, side_px: int, *, channels: int, text_size: int, axes: int, num_references: int = 0, **more: Any
) -> float:
    """10^12 floating-point operations of one forward for a tile of `side_px`, text and references included."""
    tokens = (side_px // 16) ** 2 * (1 + num_references)
    sample = torch.zeros(1, tokens, channels, device="meta")
    control = {"controlnet_cond": sample} if isinstance(network, FluxControlNetModel) else {}
    return counted(
        lambda: network(
            sample,
            encoder_hidden_states=torch.zeros(1, TEXT_TOKENS, text_size, device="meta"),
            timestep=torch.zeros(1, device="meta"),
            img_ids=ids(tokens, axes),
            txt_ids=ids(TEXT_TOKENS, axes),
            **more,
            **control,
        )
    )


POOLED = {"pooled_projections": torch.zeros(1, 768, device="meta"), "guidance": torch.zeros(1, device="meta")}
FIRST: dict[str, Any] = {"channels": 64, "text_size": 4096, "axes": 3, **POOLED}
SECOND: dict[str, Any] = {"channels": 128, "text_size": 7680, "axes": 4, "guidance": None}
LARGE = pytest.mark.slow


@pytest.mark.parametrize(
    ("side_px", "wanted"),
    [
        (512, (21.5, 2.00, 10.2)),
        pytest.param(1024, (74.4, 6.93, 34.8), marks=LARGE),
        pytest.param(2048, (418, 38, 191), marks=LARGE),
    ],
)
def test_work_of_a_tile_step_is_the_published_one(side_px: int, wanted: tuple[float, float, float]) -> None:
    """One forward of FLUX.1-dev, of its upscaler ControlNet and of FLUX.2-klein-4B, within 1 %."""
    found = (
        tera_flops(flux1(), side_px, **FIRST),
        tera_flops(upscaler_controlnet(), side_px, **FIRST),
        tera_flops(klein(), side_px, **SECOND),
    )

    assert found == pytest.approx(wanted, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("side_px", "wanted"), [(512, 23.5), (768, 45.8), (1024, 81.3), (1088, 92.7)])
def test_work_of_both_networks_is_the_published_one(side_px: int, wanted: float) -> None:
    """A step of a tile with FLUX.1-dev and its ControlNet, within 1 %."""
    found = sum(tera_flops(network, side_px, **FIRST) for network in (flux1(), upscaler_controlnet()))

    assert found == pytest.approx(wanted, rel=0.01)


@pytest.mark.slow
def test_work_with_a_reference_is_the_published_one() -> None:
    """FLUX.2-klein-4B on a tile of 1024 px and as many tokens of reference, within 1 %."""
    assert tera_flops(klein(), 1024, **SECOND, num_references=1) == pytest.approx(76.6, rel=0.01)


@pytest.mark.parametrize(("side_px", "wanted"), [(512, (1.12, 2.51)), (1024, (4.88, 10.5)), (2048, (26.1, 48.5))])
def test_work_of_the_vae_is_the_published_one(side_px: int, wanted: tuple[float, float]) -> None:
    """Encoding and decoding a picture, within 1 %."""
    vae = flux1_vae()
    pixels = torch.zeros(1, 3, side_px, side_px, device="meta")
    latents = torch.zeros(1, 16, side_px // 8, side_px // 8, device="meta")

    found = (counted(lambda: vae.encode(pixels)), counted(lambda: vae.decode(latents)))

    assert found == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize(("num_tokens", "wanted"), [(77, 0.72), (256, 2.40), (512, 4.84)])
def test_work_of_a_text_is_the_published_one(num_tokens: int, wanted: float) -> None:
    """T5-XXL on a text, within 1 %."""
    encoder, tokens = t5(), torch.zeros(1, num_tokens, dtype=torch.long, device="meta")

    assert counted(lambda: encoder(tokens)) == pytest.approx(wanted, rel=0.01)


def test_work_follows_the_formula_of_the_plans() -> None:
    """FLUX.1-dev: 12.93e9 N + 7.0e5 N^2 for N tokens with the text, on a tile that no table lists."""
    network = on_meta(FluxTransformer2DModel, guidance_embeds=True, num_layers=1, num_single_layers=2)
    tokens = (1120 // 16) ** 2 + TEXT_TOKENS

    found = 19 * tera_flops(network, 1120, **FIRST)

    assert PROFILES["flux1-dev"].max_tile_px >= 1120
    assert found == pytest.approx((12.93e9 * tokens + 7.0e5 * tokens**2) / 1e12, rel=0.02)
