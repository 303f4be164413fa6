"""The published CCSR checkpoint becomes a part of a set: every name finds its place, and the networks stay the same."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.ccsr import CCSR
from pipelines.prescale import Lanczos
from tests.weights.original_ccsr import ccsr_checkpoint
from weights.ccsr import load_controlnet, read_layout
from weights.convert import STABLE_DIFFUSION_21, Architecture, ccsr_parts, convert_ccsr_v1, main
from weights.header import UnsuitableFile

SMALL = Architecture(
    unet={
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
        "attention_head_dim": (2, 4, 4),
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
        "use_linear_projection": True,
    },
    vae={
        "block_out_channels": (4, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
    },
    text_encoder={
        "vocab_size": 30,
        "hidden_size": 12,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "max_position_embeddings": 77,
        "projection_dim": 12,
        "bos_token_id": 28,
        "eos_token_id": 29,
        "pad_token_id": 0,
    },
    channels_per_head=4,
)


def small_checkpoint() -> dict[str, Tensor]:
    """Random tensors under the published names; the text encoder has one layer more than is used."""
    generator = torch.Generator().manual_seed(6)
    shapes = ccsr_checkpoint(unet_config=SMALL.unet, vae_config=SMALL.vae, text_width=12, text_layers=3, vocabulary=30)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint on disk."""
    path = tmp_path_factory.mktemp("published") / "ccsr.safetensors"
    save_file(small_checkpoint(), path)
    return path


@pytest.fixture(scope="module")
def folder(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it is converted to."""
    path = tmp_path_factory.mktemp("converted")
    convert_ccsr_v1(file, path, dtype=torch.float32, architecture=SMALL)
    return path


def test_every_published_tensor_has_its_place() -> None:
    """At full size, without memory: all names are found with their shapes, and nothing useful is left over."""
    published = ccsr_checkpoint(
        unet_config=STABLE_DIFFUSION_21.unet,
        vae_config=STABLE_DIFFUSION_21.vae,
        text_width=1024,
        text_layers=24,
        vocabulary=49408,
    )
    parts = ccsr_parts(STABLE_DIFFUSION_21)
    used = set()

    for network, sources in parts.values():
        for name, tensor in network.state_dict().items():
            shape = published[sources[name].name]
            expected = shape if sources[name].third is None else (shape[0] // 3, *shape[1:])
            assert [side for side in tensor.shape if side != 1] == [side for side in expected if side != 1], name
            used.add(sources[name].name)

    unused = {name for name in published if name not in used}
    dropped = (
        "cond_encoder.",
        "decoder_loss.",
        "betas",
        "alphas_cumprod",
        "cond_stage_model.model.transformer.resblocks.23.",
    )
    left = {name for name in unused if not name.startswith(dropped)}
    assert left == {f"cond_stage_model.model.{name}" for name in ("text_projection", "logit_scale", "attn_mask")}
    sizes = {name: sum(each.numel() for each in part.network.parameters()) / 1e6 for name, part in parts.items()}
    assert {name: math.floor(size) for name, size in sizes.items()} == {
        "unet": 865, "controlnet": 363, "vae": 83, "text_encoder": 340,
    }  # fmt: skip


def test_unet_and_vae_are_what_diffusers_makes_of_them(folder: Path) -> None:
    """Our map against that of the library, tensor by tensor."""
    checkpoint = small_checkpoint()
    config: dict[str, Any] = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}

    unet = convert_ldm_unet_checkpoint(dict(checkpoint), config)
    vae = convert_ldm_vae_checkpoint(dict(checkpoint), {"down_block_types": [None] * 3, "up_block_types": [None] * 3})

    for expected, part in ((unet, "unet"), (vae, "vae")):
        ours = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        assert ours.keys() == expected.keys()
        assert all(torch.equal(tensor.flatten(), expected[name].flatten()) for name, tensor in ours.items())


@torch.inference_mode()
def test_the_split_controlnet_is_the_original(folder: Path) -> None:
    """Noisy and given latents into the published convolution, or into its two halves: the same residuals."""
    checkpoint = small_checkpoint()
    ours = load_controlnet(folder / "controlnet", dtype=torch.float32).eval()
    x, given, text = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16), torch.randn(1, 77, 12)
    first = torch.cat([x, given], dim=1)

    mixed = ours.conv_in(x) + ours.controlnet_cond_embedding(given)
    down, middle = ours(x, 400, text, given, return_dict=False)

    weight, bias = (
        checkpoint["control_model.input_blocks.0.0.weight"],
        checkpoint["control_model.input_blocks.0.0.bias"],
    )
    assert torch.allclose(mixed, torch.nn.functional.conv2d(first, weight, bias, padding=1), atol=3e-6)
    assert isinstance(ours, ControlNetModel) and len(down) == 9
    assert bool(middle.isfinite().all())


def test_the_converted_set_restores_a_picture(folder: Path) -> None:
    """The real loader and the real pre-stage run on it; its prompt has the published shape."""
    layout = read_layout(folder)
    ccsr = CCSR.load(folder, device=torch.device("cpu"), dtype=torch.float32, base=Lanczos())

    restored = ccsr.with_layout(num_steps=3)(torch.rand(1, 3, 20, 30), (40, 60), seed=1)

    assert (layout.version, layout.num_steps, layout.color_fix) == ("v1", 45, "adain")
    assert ccsr.model.networks.prompt_embeds.shape == (1, 77, 12)
    assert restored.shape == (1, 3, 40, 60) and bool(restored.isfinite().all())


@torch.inference_mode()
def test_the_prompt_is_the_empty_one(folder: Path) -> None:
    """Start, end, then zeros, through two of three layers and the last normalisation, computed by hand."""
    state = {name.removeprefix("cond_stage_model.model."): tensor for name, tensor in small_checkpoint().items()}
    states = state["token_embedding.weight"][[28, 29] + [0] * 75] + state["positional_embedding"]
    mask = torch.full((77, 77), -math.inf).triu(1)
    functional = torch.nn.functional
    for layer in range(2):
        row = {
            name.split(f"resblocks.{layer}.")[1]: each for name, each in state.items() if f"resblocks.{layer}." in name
        }
        normed = functional.layer_norm(states, (12,), row["ln_1.weight"], row["ln_1.bias"])
        q, k, v = functional.linear(normed, row["attn.in_proj_weight"], row["attn.in_proj_bias"]).chunk(3, dim=-1)
        heads = [part.reshape(77, 2, 6).transpose(0, 1) for part in (q, k, v)]
        seen = torch.softmax(heads[0] @ heads[1].transpose(1, 2) / 6**0.5 + mask, dim=-1) @ heads[2]
        joined = seen.transpose(0, 1).reshape(77, 12)
        states = states + functional.linear(joined, row["attn.out_proj.weight"], row["attn.out_proj.bias"])
        normed = functional.layer_norm(states, (12,), row["ln_2.weight"], row["ln_2.bias"])
        hidden = functional.gelu(functional.linear(normed, row["mlp.c_fc.weight"], row["mlp.c_fc.bias"]))
        states = states + functional.linear(hidden, row["mlp.c_proj.weight"], row["mlp.c_proj.bias"])
    expected = functional.layer_norm(states, (12,), state["ln_final.weight"], state["ln_final.bias"])

    prompt = load_file(folder / "empty_prompt.safetensors")["prompt_embeds"]

    assert torch.allclose(prompt[0], expected, atol=1e-5)


def test_a_pickle_is_refused_by_its_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever it is called; the command says so and leaves nothing behind."""
    old, new = tmp_path / "ccsr.safetensors", tmp_path / "zip.safetensors"
    old.write_bytes(pickle.dumps({"state_dict": [1] * 50}))
    torch.save({"state_dict": torch.zeros(3)}, new)

    for file in (old, new):
        with pytest.raises(SystemExit):
            main(["ccsr-v1", str(file), str(tmp_path / "out")])
        assert "pickle" in capsys.readouterr().err

    assert not (tmp_path / "out").exists()


def test_another_checkpoint_is_refused_by_what_it_lacks(file: Path, tmp_path: Path) -> None:
    """A file without the ControlNet is named for what it is not; a cut-off file is not read at all."""
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("control_model.")}
    save_file(tensors, tmp_path / "plain.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])

    with pytest.raises(UnsuitableFile, match="for the controlnet it lacks"):
        convert_ccsr_v1(tmp_path / "plain.safetensors", tmp_path / "out", architecture=SMALL)
    with pytest.raises(UnsuitableFile, match="cut off"):
        convert_ccsr_v1(tmp_path / "cut.safetensors", tmp_path / "out", architecture=SMALL)
    assert not (tmp_path / "out").exists()
