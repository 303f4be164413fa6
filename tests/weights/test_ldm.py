"""The map between diffusers' names and those of single-file checkpoints, against diffusers' own converters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from weights import ldm
from weights.configs import CONFIGS
from weights.header import UnsuitableFile, read_header
from weights.store import WeightStore


def on_meta(cls: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(CLIPTextConfig(**config))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_unets_of_full_size_map_as_diffusers_maps_them(family: str) -> None:
    """Every tensor of the published architectures gets the name from which diffusers' converter takes it."""
    unet = on_meta(UNet2DConditionModel, CONFIGS[family]["unet"])
    sources = ldm.unet_sources(unet.state_dict(), unet.config)
    checkpoint = {source.name: torch.tensor(index) for index, source in enumerate(sources.values())}

    converted = convert_ldm_unet_checkpoint(dict(checkpoint), dict(unet.config))

    assert converted.keys() == sources.keys()
    assert all(int(converted[name]) == index for index, name in enumerate(sources))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_vaes_of_full_size_map_as_diffusers_maps_them(family: str) -> None:
    """Likewise for the VAE, whose attention is written as convolutions in the file."""
    vae = on_meta(AutoencoderKL, CONFIGS[family]["vae"])
    sources = ldm.vae_sources(vae.state_dict(), vae.config)
    checkpoint = {source.name: torch.full((1, 1, 1, 1), index) for index, source in enumerate(sources.values())}

    converted = convert_ldm_vae_checkpoint(checkpoint, dict(vae.config))

    assert converted.keys() == sources.keys()
    assert all(int(converted[name].flatten()[0]) == index for index, name in enumerate(sources))


def test_the_second_text_encoder_maps_as_diffusers_maps_it() -> None:
    """OpenCLIP's joined projections are cut into query, key and value, and its text projection is turned."""
    config = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**config, projection_dim=8, vocab_size=10))
    sources = ldm.open_clip_sources(encoder.state_dict())
    checkpoint: dict[str, torch.Tensor] = {}
    for name, source in sources.items():
        shape = list(encoder.state_dict()[name].shape)
        if source.third is not None:
            shape[0] *= 3
        checkpoint.setdefault(source.name, torch.randn(shape))

    converted = convert_open_clip_checkpoint(encoder, dict(checkpoint), prefix=ldm.OPEN_CLIP)

    assert converted.keys() == sources.keys()
    for name, source in sources.items():
        assert torch.equal(converted[name], ldm._take(checkpoint[source.name], source)), name


def test_a_pocket_checkpoint_loads_back(pocket: WeightStore, tmp_path: Path) -> None:
    """Parts written under the original names come back bit for bit, in any size of architecture."""
    unet = UNet2DConditionModel.from_pretrained(pocket.folder("sd15") / "unet", local_files_only=True)
    clip = CLIPTextModel.from_pretrained(pocket.folder("sd15") / "text_encoder", local_files_only=True)
    sources = ldm.unet_sources(unet.state_dict(), unet.config)
    clip_names = {name: f"{ldm.CLIP[0]}text_model.{name}" for name in clip.state_dict()}
    file = tmp_path / "base.safetensors"
    tensors = {sources[name].name: tensor for name, tensor in unet.state_dict().items()}
    save_file(tensors | {clip_names[name]: tensor for name, tensor in clip.state_dict().items()}, file)

    again = on_meta(UNet2DConditionModel, unet.config)
    ldm.load_part(again, file, sources, dtype=torch.float32)
    clip_again = on_meta(CLIPTextModel, clip.config.to_dict())
    ldm.load_part(clip_again, file, ldm.clip_sources(clip.state_dict(), read_header(file)), dtype=torch.float32)

    assert all(torch.equal(tensor, unet.state_dict()[name]) for name, tensor in again.state_dict().items())
    assert all(torch.equal(tensor, clip.state_dict()[name]) for name, tensor in clip_again.state_dict().items())


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    """What does not fit is refused before the module is changed."""
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(2)}, file)
    module = nn.Linear(2, 2)
    before = module.weight.clone()

    with pytest.raises(UnsuitableFile, match=r"shape \(2, 3\); expected \(2, 2\)"):
        ldm.load_part(module, file, {"weight": ldm.Source("a"), "bias": ldm.Source("b")}, dtype=torch.float32)

    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("shape", [(), (1,), (4, 2)])
def test_thirds_of_what_has_none_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """OpenCLIP keeps three matrices in one tensor; a file can have anything under that name."""
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(shape), "b": torch.zeros(2)}, file)
    sources = {"weight": ldm.Source("a", third=2), "bias": ldm.Source("b")}

    with pytest.raises(UnsuitableFile, match="three equal parts"):
        ldm.load_part(nn.Linear(2, 2), file, sources, dtype=torch.float32)
