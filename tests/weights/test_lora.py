"""LoRA files are read whole or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from weights.header import UnsuitableFile
from weights.lora import read_lora

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
PAIR = {f"{STEM}.lora_down.weight": torch.ones(4, 768), f"{STEM}.lora_up.weight": torch.ones(320, 4)}


def saved(tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
    return tmp_path / "x.safetensors"


def test_alpha_over_rank_is_the_scale(tmp_path: Path) -> None:
    """kohya's alpha divides by the rank; without one the scale is 1."""
    with_alpha = read_lora(saved(tmp_path, PAIR | {f"{STEM}.alpha": torch.tensor(2.0)}))
    without = read_lora(saved(tmp_path, PAIR))

    (change,) = with_alpha.parts["unet"].values()
    assert change.scale == 0.5
    assert next(iter(without.parts["unet"].values())).scale == 1.0
    as_kohya_writes_its_default = read_lora(saved(tmp_path, PAIR | {f"{STEM}.alpha": torch.tensor(1)}))
    assert next(iter(as_kohya_writes_its_default.parts["unet"].values())).scale == 0.25
    assert with_alpha.family == "Stable Diffusion 1.5"
    assert with_alpha.size_bytes == 4 * (4 * 768 + 320 * 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_few_bits_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    """Files are stored in 16 and in 8 bits."""
    lora = read_lora(saved(tmp_path, {name: tensor.to(dtype) for name, tensor in PAIR.items()}))

    (change,) = lora.parts["unet"].values()
    assert change.down.float().eq(1).all() and change.up.dtype == dtype


@pytest.mark.parametrize(
    ("stem", "place"),
    [
        ("base_model.model.down_blocks.0.attentions.0.proj_in", ("unet", "down_blocks_0_attentions_0_proj_in")),
        ("base_model.model.unet.conv_in", ("unet", "conv_in")),
        ("diffusion_model.input_blocks.1.1.proj_in", ("unet", "input_blocks_1_1_proj_in")),
        ("model.diffusion_model.out.2", ("unet", "out_2")),
        ("lycoris_down_blocks_0_resnets_0_conv1", ("unet", "down_blocks_0_resnets_0_conv1")),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1", ("text_encoder", "encoder_layers_0_mlp_fc1")),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", ("text_encoder_2", "encoder_layers_0_mlp_fc1")),
    ],
)
def test_more_ways_to_name_a_layer(tmp_path: Path, stem: str, place: tuple[str, str]) -> None:
    """Wrappers of training libraries are taken off."""
    for down, up in (("lora_A", "lora_B"), ("lora_A.default", "lora_B.default"), ("lora_down", "lora_up")):
        pair = {f"{stem}.{down}.weight": torch.ones(2, 8), f"{stem}.{up}.weight": torch.ones(8, 2)}
        parts = read_lora(saved(tmp_path, pair)).parts
        assert [(part, layer) for part, layers in parts.items() for layer in layers] == [place]


def test_what_nobody_knows_is_left_out_and_counted(tmp_path: Path) -> None:
    """A few strange tensors do not make a file useless; packed embeddings and layers of rank 0 are no business."""
    strange = {"logit_scale": torch.ones(1), "bundle_emb.word.string_to_param.*": torch.ones(2, 768)}
    empty = {"lora_unet_conv_in.lora_down.weight": torch.ones(0, 4, 3, 3)}
    empty |= {"lora_unet_conv_in.lora_up.weight": torch.ones(320, 0, 1, 1), "lora_unet_conv_in.alpha": torch.ones(1)}

    lora = read_lora(saved(tmp_path, PAIR | strange | empty, {"ss_network_dim": "4", "anything": "at all"}))

    assert lora.num_unknown == 1 and lora.num_layers == 1


def test_a_scalar_is_one_more_factor(tmp_path: Path) -> None:
    """LyCORIS can train one for each layer."""
    numbers = {f"{STEM}.alpha": torch.tensor(2.0), f"{STEM}.scalar": torch.tensor(3.0)}

    (change,) = read_lora(saved(tmp_path, PAIR | numbers)).parts["unet"].values()

    assert change.scale == 1.5


def test_pefts_settings_in_the_file_count(tmp_path: Path) -> None:
    """diffusers writes PEFT's alpha and its exceptions into the header's texts."""
    tensors = {
        "unet.conv_in.lora_A.weight": torch.ones(4, 8, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 4, 1, 1),
        "unet.mid.to_q.lora_A.weight": torch.ones(4, 8),
        "unet.mid.to_q.lora_B.weight": torch.ones(8, 4),
    }
    settings = {"unet.lora_alpha": 8, "unet.r": 4, "unet.alpha_pattern": {"mid.to_q": 1}}

    lora = read_lora(saved(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(settings)}))

    assert {name: change.scale for name, change in lora.parts["unet"].items()} == {"conv_in": 2.0, "mid_to_q": 0.25}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({f"{STEM}.lora_down.weight": torch.ones(4, 768)}, "incomplete"),
        (PAIR | {f"{STEM}.lora_up.weight": torch.ones(320, 5)}, "do not fit together"),
        (PAIR | {f"{STEM}.lora_up.weight": torch.ones(320, 4, 3, 3)}, "do not fit together"),
        (
            PAIR
            | {f"{STEM}.lora_down.weight": torch.ones(4, 768, 3, 3), f"{STEM}.lora_mid.weight": torch.ones(4, 4, 3, 3)},
            "do not fit together",
        ),
        (PAIR | {f"{STEM}.lora_down.weight": torch.full((4, 768), float("nan"))}, "not finite"),
        (PAIR | {f"{STEM}.alpha": torch.ones(3)}, "not one number"),
        (PAIR | {f"{STEM}.dora_scale": torch.ones(320, 1)}, "DoRA"),
        ({f"{STEM}.hada_w1_a": torch.ones(4, 4)}, "LoHa"),
        ({f"{STEM}.lokr_w1": torch.ones(4, 4)}, "LoKr"),
        (PAIR | {f"{number}.else": torch.ones(1) for number in range(3)}, "belong to no LoRA, such as '0.else'"),
        ({f"{STEM}.lora_down.weight": torch.ones(0, 768), f"{STEM}.lora_up.weight": torch.ones(320, 0)}, "no layer"),
        (PAIR | {f"{STEM}.lora_magnitude_vector.weight": torch.ones(320)}, "DoRA"),
        ({f"{STEM}.oft_blocks": torch.ones(4, 4)}, "OFT"),
        ({f"{STEM}.on_input": torch.ones(1), f"{STEM}.weight": torch.ones(4)}, r"\(IA\)3"),
        ({"model.diffusion_model.out.2.weight": torch.ones(4, 4)}, "is a base model, not a LoRA"),
        ({"emb_params": torch.ones(2, 768)}, "is a textual inversion embedding"),
        ({"what": torch.ones(2, 3, 4), "ever": torch.ones(1)}, "no known kind"),
    ],
)
def test_what_cannot_be_applied_is_refused(tmp_path: Path, tensors: dict[str, Tensor], reason: str) -> None:
    """Other kinds of files, other kinds of adapters, and files with parts missing."""
    with pytest.raises(UnsuitableFile, match=reason):
        read_lora(saved(tmp_path, tensors))


@pytest.mark.parametrize("alpha", ["NaN", "1e999", "1" + "0" * 400, '"many"'])
def test_an_alpha_in_the_settings_that_is_no_number_is_refused(tmp_path: Path, alpha: str) -> None:
    """The texts of a file come from strangers as well."""
    tensors = {"unet.mid.to_q.lora_A.weight": torch.ones(4, 8), "unet.mid.to_q.lora_B.weight": torch.ones(8, 4)}
    path = saved(tmp_path, tensors, {"lora_adapter_metadata": f'{{"unet.lora_alpha": {alpha}}}'})

    with pytest.raises(UnsuitableFile, match=r"settings|alpha"):
        read_lora(path)
