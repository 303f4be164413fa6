"""How the Flux-shaped pocket model begins, and that its recipe trains and exports what the pipeline loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from torch import Tensor

from pipelines.flux import Flux
from weights.flux_tokens import pack, position_ids
from weights.pocket.loop import Options, train
from weights.pocket.train_flux import (
    HEAD_SIZE,
    SHAPE,
    TEXT_SIZE,
    FluxTrainee,
    build_t5_tokenizer,
    estimator,
    wire,
)
from weights.store import POCKET_FOLDER


@pytest.fixture(scope="module")
def networks() -> tuple[FluxTransformer2DModel, FluxControlNetModel]:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=3, **SHAPE)
    controlnet = FluxControlNetModel(num_layers=1, num_single_layers=0, **SHAPE)
    wire(transformer, controlnet, doubt=0.2)
    return transformer.eval(), controlnet.eval()


@pytest.mark.parametrize("sigma", [0.03, 0.2, 0.5, 0.95])
@torch.inference_mode()
def test_untrained_networks_are_the_linear_estimator(
    networks: tuple[FluxTransformer2DModel, FluxControlNetModel], sigma: float
) -> None:
    """Before the first step the prediction is `a x + b c`, whatever the text says."""
    transformer, controlnet = networks
    noisy, control = torch.randn(2, 1, 16, 12, 12)
    shared = {
        "encoder_hidden_states": torch.randn(1, 8, TEXT_SIZE),
        "pooled_projections": torch.randn(1, TEXT_SIZE),
        "timestep": torch.tensor([sigma]),
        "img_ids": position_ids(12, 12),
        "txt_ids": torch.zeros(8, 3),
        "return_dict": False,
    }

    residuals, _ = controlnet(pack(noisy), controlnet_cond=pack(control), **shared)
    found = transformer(pack(noisy), controlnet_block_samples=residuals, **shared)[0]

    a, b = estimator(torch.tensor(sigma), 0.2)
    wanted = a * pack(noisy) + b * pack(control)
    assert (found - wanted).square().mean() < 0.02 * wanted.square().mean()


def test_the_estimator_is_the_best_one() -> None:
    """No other factors give a smaller error on samples of the model it assumes."""
    generator = torch.Generator().manual_seed(1)

    def normal() -> Tensor:
        return torch.randn(200_000, generator=generator, dtype=torch.float64)

    control, noise, sigma, doubt = normal(), normal(), 0.3, 0.25
    sharp = control + doubt**0.5 * normal()
    noisy, velocity = (1 - sigma) * sharp + sigma * noise, noise - sharp

    best = torch.linalg.lstsq(torch.stack([noisy, control], dim=1), velocity[:, None]).solution.flatten()

    assert [float(factor) for factor in estimator(torch.tensor(sigma), doubt)] == pytest.approx(best.tolist(), abs=0.02)


@torch.inference_mode()
def test_heads_look_at_their_neighbours(networks: tuple[FluxTransformer2DModel, FluxControlNetModel]) -> None:
    """Each head of the double block gives most of its attention to one neighbouring token."""
    attention = networks[0].transformer_blocks[0].attn
    hidden = torch.zeros(1, 100, attention.query_dim)
    hidden[..., 64], hidden[..., 65] = 6.7, -6.7  # the constant channels after normalisation
    cosine, sine = networks[0].pos_embed(position_ids(20, 20))

    def turned(projection: torch.nn.Linear, norm: torch.nn.Module) -> Tensor:
        parts = norm(projection(hidden).view(100, -1, HEAD_SIZE))
        pairs = parts.reshape(100, -1, HEAD_SIZE // 2, 2)
        rotated = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(2)
        return parts * cosine[:, None] + rotated * sine[:, None]

    queries, keys = turned(attention.to_q, attention.norm_q), turned(attention.to_k, attention.norm_k)
    middle = queries[55]  # row 5, column 5 of 10 x 10
    weights = torch.einsum("hd,khd->hk", middle, keys).div(HEAD_SIZE**0.5).softmax(dim=-1)

    assert weights.argmax(dim=-1).tolist() == [56, 54, 65, 45]
    assert weights.max(dim=-1).values.min() > 0.7


def test_t5_reads_words_and_anything_else() -> None:
    """Words of captions are one token each; unknown ones fall into letters."""
    tokenizer = build_t5_tokenizer()

    assert tokenizer.tokenize("photograph, red, sharp") == ["▁photograph", ",", "▁red", ",", "▁sharp"]
    assert "".join(tokenizer.tokenize("Zyx")).lstrip("▁") == "Zyx"
    assert tokenizer.unk_token_id in tokenizer("é").input_ids


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_recipe_trains_and_exports(tmp_path: Path) -> None:
    """A few steps on few pictures lower nothing yet, but what they write is loaded as the service loads it."""
    models = tmp_path / "models"
    models.mkdir()
    for part in ("vae", "upscaler-compact-x2"):
        (models / part).symlink_to(POCKET_FOLDER / part)
    options = Options(steps=2, batch=2, num_drawings=4, models=models, build=tmp_path / "build")

    progress = train(FluxTrainee(options, num_portions=1), options)

    loaded = Flux.load(
        models / "flux",
        models / "controlnet-upscaler-flux",
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_text_tokens=48,
    )
    assert progress.step == 2 and np.isfinite(loaded.encode("a wall").prompt_embeds.detach().numpy()).all()
