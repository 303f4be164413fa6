"""Both published profiles from end to end: small random networks of the true classes, in the published folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
)
from PIL import Image
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from pipelines.errors import ModelsMissing
from pipelines.flux_vision_upscaler import NO_CAPTION, FluxVisionUpscaler
from pipelines.progress import Report
from tests.conftest import png_bytes
from tests.pipelines.test_caption_vlm import byte_vocabulary, save_qwen, save_smol
from tests.pipelines.test_flux2 import CHAT
from tests.pipelines.test_flux_vision_upscaler import LIMITS, QUICK, distance, run
from weights.store import WeightStore

PROFILES = ("flux1-dev", "flux2-klein-4b")
DYNAMIC = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
VAE_SHAPE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLUX_SHAPE: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}
TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def save_flux1_dev(root: Path, pocket: WeightStore) -> None:
    """Guidance embedded in both networks, a VAE of factor 8 with 16 channels; texts as in the pocket set."""
    folder, controlnet = root / "flux1-dev", FluxControlNetModel(**FLUX_SHAPE | {"num_single_layers": 0})
    for layer in (controlnet.controlnet_x_embedder, *controlnet.controlnet_blocks):
        torch.nn.init.normal_(layer.weight, std=0.1)
    FluxTransformer2DModel(**FLUX_SHAPE).save_pretrained(folder / "transformer")
    controlnet.save_pretrained(root / "controlnet-upscaler-flux1-dev")
    vae = AutoencoderKL(**VAE_SHAPE, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)
    vae.save_pretrained(folder / "vae")
    for part in TEXT_PARTS:
        shutil.copytree(pocket.folder("flux") / part, folder / part)
    DYNAMIC.save_pretrained(folder / "scheduler")


def save_klein(root: Path, pocket: WeightStore) -> None:
    """32 latent channels on tokens of 128, Qwen3 with the 27 layers whose states the published model reads."""
    folder, vocabulary = root / "flux2-klein-4b", byte_vocabulary(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    transformer = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    text = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=27,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
    )
    transformer.save_pretrained(folder / "transformer")
    AutoencoderKLFlux2(**VAE_SHAPE, latent_channels=32).save_pretrained(folder / "vae")
    Qwen3ForCausalLM(text).save_pretrained(folder / "text_encoder")
    Qwen2Tokenizer(vocab=vocabulary, merges=[], chat_template=CHAT).save_pretrained(folder / "tokenizer")
    DYNAMIC.save_pretrained(folder / "scheduler")


@pytest.fixture(scope="module")
def full(pocket: WeightStore, tmp_path_factory: pytest.TempPathFactory) -> WeightStore:
    """A full set of small models: both profiles and the large captioner."""
    torch.manual_seed(3)
    root = tmp_path_factory.mktemp("full")
    save_flux1_dev(root, pocket)
    save_klein(root, pocket)
    save_qwen(root / "vision-captioner")
    return WeightStore("full", root)


@pytest.fixture(params=PROFILES)
def pipeline(request: pytest.FixtureRequest, full: WeightStore) -> FluxVisionUpscaler:
    """In 32 bits, with tiles so small that a picture of 192 px has several."""
    return tiled(FluxVisionUpscaler.load(full, device="cpu", profile=request.param))


def tiled(pipeline: FluxVisionUpscaler) -> FluxVisionUpscaler:
    pipeline.profile = replace(pipeline.profile, max_tile_px=128, tile_overlap_px=32)
    return pipeline


def calls(network: torch.nn.Module) -> list[int]:
    """The batch size of every call of a network from now on."""
    seen: list[int] = []
    network.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    return seen


def test_a_profile_serves_the_whole_request(pipeline: FluxVisionUpscaler, photo_crop: Image.Image) -> None:
    """Captioned, tiled, redrawn, of the exact size, the same every time, and another picture at every creativity."""
    pictures = [run(pipeline, photo_crop, strength=strength, scale=1.55)[0] for strength in (0.0, 0.3, 0.9, 0.9)]
    _, result, reports = run(pipeline, photo_crop, strength=0.4, scale=1.55)

    assert all(picture.size == (198, 149) for picture in pictures)
    assert len(result.recipe["tiles"]["lefts"]) > 1 and result.recipe["weights"]["profile"] in PROFILES
    assert distance(pictures[2], pictures[3]) == 0
    assert 0 < distance(pictures[0], pictures[1]) < distance(pictures[0], pictures[2])
    stages = {report.stage for report in reports}
    assert {"caption", "prompt", "denoise", "vae_decode"} <= stages
    assert ("tile_captions" in stages) == (result.caption != NO_CAPTION)


@pytest.mark.parametrize("profile", PROFILES)
def test_published_weights_compute_in_bfloat16(full: WeightStore, photo_crop: Image.Image, profile: str) -> None:
    """Every network does, also where the device's usual type is float16, and the picture is nearly that of 32 bits."""
    exact = tiled(FluxVisionUpscaler.load(full, device="cpu", profile=profile))
    half = tiled(FluxVisionUpscaler.load(full, device="cpu", profile=profile, dtype=torch.float16))

    pictures = [run(pipeline, photo_crop, scale=1.5)[0] for pipeline in (exact, half)]

    family = half.family
    networks = [family.canvas.vae.vae, family.model.transformer, family.model.text_encoder]
    assert {network.dtype for network in networks} == {torch.bfloat16}
    assert distance(*pictures) < 3


def test_guidance_is_what_the_base_has(pipeline: FluxVisionUpscaler, photo_crop: Image.Image) -> None:
    """FLUX.1-dev reads it as an input, the distilled klein has none and says so; neither pays for a second pass."""
    seen = calls(pipeline.family.model.transformer)
    plain, _, _ = run(pipeline, photo_crop, strength=0.8, guidance_scale=1.0)
    once, seen[:] = list(seen), []
    guided, _, reports = run(pipeline, photo_crop, strength=0.8, guidance_scale=4.0)

    remarks = [report.message for report in reports if report.message and "guidance" in report.message]
    assert seen == once
    if pipeline.family.model.embeds_guidance:
        assert distance(plain, guided) > 0 and not remarks
    else:
        assert np.array_equal(np.asarray(plain), np.asarray(guided)) and len(remarks) == 1


def test_an_undistilled_klein_is_guided_by_a_second_pass(full: WeightStore, photo_crop: Image.Image) -> None:
    """True guidance from 1 on upwards: twice the batch, another picture."""
    pipeline = tiled(FluxVisionUpscaler.load(full, device="cpu", profile="flux2-klein-4b"))
    pipeline.family.model.takes_negative = True
    seen = calls(pipeline.family.model.transformer)
    plain = run(pipeline, photo_crop, strength=0.8, guidance_scale=1.0)[0]
    once, seen[:] = list(seen), []
    guided = run(pipeline, photo_crop, strength=0.8, guidance_scale=4.0)[0]

    assert seen == [2 * batch for batch in once] and distance(plain, guided) > 0


@pytest.mark.parametrize("save", [save_qwen, save_smol], ids=["qwen", "smol"])
def test_vision_captioners_serve_the_endpoint(
    full: WeightStore,
    photo_crop: Image.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save: Callable[[Path], None],
) -> None:
    """Either model in the folder `vision-captioner` is asked for the picture, and above 0.35 for every tile."""
    root = tmp_path / "full"
    shutil.copytree(full.root, root, ignore=shutil.ignore_patterns("vision-captioner"))
    save(root / "vision-captioner")
    pipeline = tiled(FluxVisionUpscaler.load(WeightStore("full", root), device="cpu", profile="flux2-klein-4b"))
    captioner: Any = pipeline._captioner()
    answer, said = captioner.caption, []

    def noted(*given: Any, **more: Any) -> str:
        said.append(answer(*given, **more))
        return "a wall"

    monkeypatch.setattr(captioner, "caption", noted)

    _, result, reports = run(pipeline, photo_crop, strength=0.4)

    num_tiles = len(result.recipe["tiles"]["tops"]) * len(result.recipe["tiles"]["lefts"])
    assert len(said) == 1 + num_tiles > 2 and all(isinstance(caption, str) for caption in said)
    assert result.caption == "a wall"
    assert not [report for report in reports if report.message and "caption" in report.stage]


@pytest.mark.parametrize("part", ["flux1-dev/vae", "controlnet-upscaler-flux1-dev"])
def test_a_missing_part_is_named(full: WeightStore, photo_crop: Image.Image, tmp_path: Path, part: str) -> None:
    """A profile that is not complete says what it lacks."""
    root = tmp_path / "full"
    shutil.copytree(full.root, root)
    shutil.rmtree(root / part)
    pipeline = FluxVisionUpscaler.load(WeightStore("full", root), device="cpu", profile="flux1-dev")

    with pytest.raises(ModelsMissing, match=part):
        run(pipeline, photo_crop)


def test_fp8_is_refused_where_the_card_has_none(full: WeightStore, photo_crop: Image.Image) -> None:
    """The request fails with the reason; nothing runs in another type instead."""
    pipeline = FluxVisionUpscaler.load(full, device="cpu", profile="flux2-klein-4b")
    pipeline.fp8 = True

    with pytest.raises(ModelsMissing, match="flux_fp8"):
        run(pipeline, photo_crop)


def test_previews_of_klein_have_the_colours_of_the_picture(full: WeightStore, photo_crop: Image.Image) -> None:
    """It denoises normalised latents; a preview shows what they amount to, however far the two are apart."""
    pipeline = tiled(FluxVisionUpscaler.load(full, device="cpu", profile="flux2-klein-4b"))
    shown: list[Image.Image] = []

    def listen(report: Report) -> None:
        if report.preview is not None and (image := report.preview()) is not None:
            shown.append(image)

    params = replace(QUICK, strength=0.02)
    model = pipeline.family.model
    model.mean, model.deviation = model.mean + 3.0, model.deviation * 0.1
    pipeline(png_bytes(photo_crop), params, limits=LIMITS, output=BytesIO(), progress=listen)

    assert shown and all(distance(image, photo_crop.resize(image.size)) < 12 for image in shown)
