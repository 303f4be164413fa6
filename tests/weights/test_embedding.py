"""Textual inversions in every layout, for one text encoder and for two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from weights.embedding import fitting, read_embedding
from weights.header import UnsuitableFile


def saved(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, tmp_path / "word.safetensors")
    return tmp_path / "word.safetensors"


@pytest.mark.parametrize(
    ("tensors", "shapes"),
    [
        ({"emb_params": torch.ones(5, 768).half()}, [(5, 768)]),
        ({"<cat-toy>": torch.ones(768)}, [(1, 768)]),
        ({"anything": torch.ones(3, 768)}, [(3, 768)]),
        ({"clip_g": torch.ones(80, 1280), "clip_l": torch.ones(80, 768)}, [(80, 768), (80, 1280)]),
        ({"text_encoders_1": torch.ones(2, 1280), "text_encoders_0": torch.ones(2, 768)}, [(2, 768), (2, 1280)]),
    ],
)
def test_every_layout_is_read(tmp_path: Path, tensors: dict[str, Tensor], shapes: list[tuple[int, int]]) -> None:
    """Vectors come as (n, width) in 32 bits, in the order of the text encoders."""
    embedding = read_embedding(saved(tmp_path, tensors))

    assert [tuple(rows.shape) for rows in embedding.vectors] == shapes
    assert all(rows.dtype == torch.float32 for rows in embedding.vectors)
    assert fitting(embedding, tuple(width for _, width in shapes)) == embedding.vectors


def test_the_word_in_the_file_is_told(tmp_path: Path) -> None:
    """diffusers names the vectors after their word, which pages about such files tell their readers to use."""
    assert read_embedding(saved(tmp_path, {"<cat-toy>": torch.ones(768)})).word == "<cat-toy>"
    assert read_embedding(saved(tmp_path, {"emb_params": torch.ones(768)})).word == ""


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"clip_g": torch.ones(2, 1280)}, "lacks the vectors 'clip_l'"),
        ({"clip_g": torch.ones(2, 1280), "clip_l": torch.ones(3, 768)}, "different numbers"),
        ({"emb_params": torch.ones(0, 768)}, "expected 1 to 750"),
        ({"emb_params": torch.ones(2, 768, dtype=torch.int64)}, "expected 1 to 750"),
        ({"emb_params": torch.full((2, 768), torch.inf)}, "not finite"),
        ({"<a>": torch.ones(768), "<b>": torch.ones(768)}, "several"),
        ({"lora_unet_conv_in.lora_down.weight": torch.ones(4, 4)}, "is a LoRA"),
    ],
)
def test_what_is_no_embedding_is_refused(tmp_path: Path, tensors: dict[str, Tensor], reason: str) -> None:
    """The reason is in the message."""
    with pytest.raises(UnsuitableFile, match=reason):
        read_embedding(saved(tmp_path, tensors))


def test_an_embedding_of_another_family_is_named(tmp_path: Path) -> None:
    """Widths tell the families apart."""
    sdxl = read_embedding(saved(tmp_path, {"clip_g": torch.ones(1, 1280), "clip_l": torch.ones(1, 768)}))
    sd2 = read_embedding(saved(tmp_path, {"emb_params": torch.ones(1, 1024)}))

    with pytest.raises(UnsuitableFile, match=r"768 and 1280 numbers \(SDXL\); this model's text encoder takes 768"):
        fitting(sdxl, (768,))
    with pytest.raises(UnsuitableFile, match=r"Stable Diffusion 2"):
        fitting(sd2, (768, 1280))


def test_a_huge_embedding_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header says how large its vectors are; those of no text encoder never come into memory."""
    path = saved(tmp_path, {"emb_params": torch.ones(1, 9000)})
    monkeypatch.setattr("weights.embedding._vectors", lambda tensor: pytest.fail("was read"))

    with pytest.raises(UnsuitableFile, match=r"\(1, 9000\)"):
        read_embedding(path)
