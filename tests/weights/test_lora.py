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
        (PAIR | {"something.else": torch.ones(1)}, "belongs to no LoRA"),
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
