"""What a file of weights is, from names and shapes as they are in published files."""

from __future__ import annotations

import pytest

from weights.detect import check_checkpoint, check_embedding, check_lora, detect
from weights.header import Header, TensorInfo, UnsuitableFile

UNET = "model.diffusion_model."
TO_K = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FIRST = f"{UNET}input_blocks.0.0.weight"
CLIP = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
Shapes = dict[str, tuple[int, ...]]
SD15: Shapes = {
    FIRST: (320, 4, 3, 3),
    TO_K: (320, 768),
    CLIP: (49408, 768),
    "first_stage_model.decoder.conv_in.weight": (1,),
}
SDXL: Shapes = {
    FIRST: (320, 4, 3, 3),
    f"{UNET}label_emb.0.0.weight": (1280, 2816),
    "conditioner.embedders.1.model.ln_final.weight": (1280,),
}
LORA: Shapes = {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (8, 768)}


def header(shapes: Shapes, **metadata: str) -> Header:
    return Header({name: TensorInfo("F16", shape, 0, 0) for name, shape in shapes.items()}, metadata)


def test_base_models_of_both_families_are_taken() -> None:
    """With the tensors that trainers leave in them, or a UNet alone."""
    extras: Shapes = {"model_ema.diffusion_modelout2weight": (4,), "betas": (1000,), "alphas_cumprod": (1000,)}

    check_checkpoint(header(SD15 | extras), "SD_1_5")
    check_checkpoint(header({FIRST: (320, 4, 3, 3), TO_K: (320, 768)}), "SD_1_5")
    check_checkpoint(header(SDXL | extras), "SDXL")


CHECKPOINTS: dict[str, tuple[Shapes, str, str]] = {
    "SDXL for SD 1.5": (SDXL, "SD_1_5", "is a base model for SDXL; the model_type of this request is SD_1_5"),
    "SD 1.5 for SDXL": (
        SD15,
        "SDXL",
        "is a base model for Stable Diffusion 1.5; the model_type of this request is SDXL",
    ),
    "SD 2": (
        {FIRST: (320, 4, 3, 3), "cond_stage_model.model.ln_final.weight": (1024,)},
        "SD_1_5",
        "a base model for Stable Diffusion 2;",
    ),
    "SD 2, UNet alone": ({FIRST: (320, 4, 3, 3), TO_K: (320, 1024)}, "SD_1_5", "a base model for Stable Diffusion 2;"),
    "the refiner": (
        {FIRST: (384, 4, 3, 3), "conditioner.embedders.0.model.ln_final.weight": (1280,)},
        "SDXL",
        "for the SDXL refiner;",
    ),
    "the refiner, UNet alone": ({FIRST: (384, 4, 3, 3), TO_K: (768, 1280)}, "SDXL", "for the SDXL refiner;"),
    "SD 3": ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)}, "SDXL", "for Stable Diffusion 3;"),
    "Flux": ({f"{UNET}double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "SDXL", "for FLUX;"),
    "Flux, alone": ({"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "SD_1_5", "for FLUX;"),
    "inpainting": (SD15 | {FIRST: (320, 9, 3, 3)}, "SD_1_5", "for inpainting"),
    "editing": (SD15 | {FIRST: (320, 8, 3, 3)}, "SD_1_5", "for editing by instruction"),
    "depth": (SD15 | {FIRST: (320, 5, 3, 3)}, "SD_1_5", "for pictures with depth"),
    "velocity": (SDXL | {"v_pred": (0,), "ztsnr": (0,)}, "SDXL", "predicts velocity"),
    "no UNet": ({f"{UNET}time_embed.0.weight": (1280, 320)}, "SD_1_5", "without a UNet"),
    "a LoRA": (LORA, "SD_1_5", "is a LoRA for Stable Diffusion 1.5, not a base model"),
    "an embedding": ({"emb_params": (2, 768)}, "SD_1_5", "is a textual inversion embedding, not a base model"),
    "a VAE": ({"decoder.conv_in.weight": (512, 4, 3, 3)}, "SD_1_5", "is a VAE, not a base model"),
    "a ControlNet": ({"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "SD_1_5", "is a ControlNet, not"),
    "diffusers' UNet": (
        {"down_blocks.0.resnets.0.conv1.weight": (1,)},
        "SD_1_5",
        "is a UNet alone, in diffusers' layout",
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_what_is_no_base_model_of_the_family_is_named(kind: str) -> None:
    """The caller learns what the file is, not which tensor did not fit."""
    shapes, family, reason = CHECKPOINTS[kind]

    with pytest.raises(UnsuitableFile, match=reason.replace(".", r"\.")):
        check_checkpoint(header(shapes), family)


def test_velocity_is_told_by_texts_too() -> None:
    """Files by recent trainers say so in their header."""
    with pytest.raises(UnsuitableFile, match="velocity"):
        check_checkpoint(header(SDXL, **{"modelspec.prediction_type": "v"}), "SDXL")


def test_files_for_another_field_are_named() -> None:
    """A base model is no LoRA, and neither is an embedding."""
    with pytest.raises(UnsuitableFile, match=r"is a base model for Stable Diffusion 1\.5, not a LoRA"):
        check_lora(header(SD15), "SD_1_5")
    with pytest.raises(UnsuitableFile, match=r"is a LoRA for Stable Diffusion 1\.5, not a textual inversion"):
        check_embedding(header(LORA))
    with pytest.raises(UnsuitableFile, match="no known kind"):
        detect(header({"something": (1, 2, 3), "else": (1,)}))


@pytest.mark.parametrize(
    ("name", "shape", "family"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight", (8, 2048), "SDXL"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", (8, 1280), "SDXL"),
        (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v.lora_down.weight",
            (8, 1024),
            "Diffusion 2",
        ),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", (8, 2048), "SDXL"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight", (8, 2048), "SDXL"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", (8, 3072), "FLUX"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", (8, 3072), "FLUX"),
        ("lora_unet_joint_blocks_0_x_block_attn_proj.lora_down.weight", (8, 1536), "Stable Diffusion 3"),
    ],
)
def test_a_lora_of_another_family_is_named(name: str, shape: tuple[int, int], family: str) -> None:
    """By its names where they tell, else by the width of the text that its layers attend to."""
    with pytest.raises(UnsuitableFile, match=f"is a LoRA for .*{family}; the model_type of this request is SD_1_5"):
        check_lora(header({name: shape}), "SD_1_5")
