"""CCSR's schedule, tiles, sampler and colours, on networks that are random or can be computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.ccsr import CCSR, SCHEDULE, RestoringUNet, gaussian_weights, plan, restore, spaced_timesteps
from pipelines.delivery import to_tensor
from pipelines.errors import Cancelled
from pipelines.prescale import Lanczos, load_prestage
from pipelines.tiling import Tile, fit_grid
from tests.conftest import PHOTOS
from weights.ccsr import (
    PROMPT_TENSOR,
    Layout,
    WrongHeads,
    check_heads,
    load_controlnet,
    load_networks,
    steer_by_latents,
    write_layout,
)
from weights.pocket.degrade import reduce, wear
from weights.store import WeightStore

CPU = torch.device("cpu")
V1 = Layout(version="v1", num_steps=45)
ONE_STEP = Layout(version="v2", num_steps=1, start="picture")
ALPHAS: Tensor = DDPMScheduler(**SCHEDULE).alphas_cumprod

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": (2, 4),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "use_linear_projection": True,
}
HEAD = 4


class Oracle:
    """Claims that the clean latents are the condition: pointwise, so no tile can matter. Counts its calls."""

    size_multiple = 2

    def __init__(self) -> None:
        self.timesteps: list[float] = []
        self.num_tiles = 0

    def predict(self, tiles: Tensor, places: Sequence[Tile], timestep: float, conditioning: Tensor) -> Tensor:
        self.timesteps.append(timestep)
        self.num_tiles += len(tiles)
        alpha = ALPHAS[int(timestep)].double()
        given = torch.cat([conditioning[..., top:bottom, left:right] for top, left, bottom, right in places]).double()
        return ((tiles.double() - alpha.sqrt() * given) / (1 - alpha).sqrt()).float()


class Pointwise:
    """Looks at one position only, but is wrong: its noise is a mixture of sample and condition."""

    def predict(self, tiles: Tensor, places: Sequence[Tile], timestep: float, conditioning: Tensor) -> Tensor:
        given = torch.cat([conditioning[..., top:bottom, left:right] for top, left, bottom, right in places])
        return 0.3 * tiles.tanh() + 0.2 * given


def run(model: Any, condition: Tensor, layout: Layout, *, max_tile: int = 64, seed: int = 5, batch: int = 2) -> Tensor:
    """Restore latents with tiles of at most `max_tile`."""
    grid = fit_grid(*condition.shape[-2:], max_tile=max_tile, overlap=max_tile // 2)
    generator = torch.Generator().manual_seed(seed)
    return restore(model, condition, layout, grid=grid, tile_batch=batch, generator=generator)


@pytest.mark.parametrize(
    ("num_steps", "chain"),
    [(45, (658, 341, 15)), (15, (642, 357, 5)), (12, (636, 363, 4)), (10, (666, 333, 4)), (6, (599, 400, 2))]
    + [(50, (652, 347, 16)), (20, (631, 368, 6))],
)
def test_schedules_of_version_1(num_steps: int, chain: tuple[int, int, int]) -> None:
    """Where the loop begins and ends, and its length, for what people set; 45 is the authors' own."""
    last, *visited = plan(replace(V1, num_steps=num_steps))

    assert (last, visited[0], visited[-1], len(visited)) == (999, *chain)


@given(st.integers(3, 200), st.floats(0, 1), st.floats(0, 1))
def test_every_schedule_descends(num_steps: int, t_max: float, t_min: float) -> None:
    """Whatever is asked for, some steps are left, all of the grid, and never the same twice."""
    last, *visited = plan(Layout(version="v1", num_steps=num_steps, t_max=t_max, t_min=t_min))

    assert last == 999 > visited[0]
    assert all(later < earlier for earlier, later in zip(visited, visited[1:], strict=False))
    assert set(visited) <= set(spaced_timesteps(num_steps))
    if t_min == 0:
        assert visited[-1] == 0


def test_schedules_of_version_2() -> None:
    """One call, or the published two; a schedule that leaves no step is refused, as is version 1 with two."""
    assert plan(ONE_STEP) == [999]
    assert plan(replace(ONE_STEP, num_steps=6, t_min=0.5)) == [999, 499]
    assert plan(replace(ONE_STEP, num_steps=10, t_min=0.5)) == [999, 601, 501]
    assert plan(replace(V1, num_steps=1)) == [999]
    with pytest.raises(ValueError, match="leave none"):
        plan(replace(ONE_STEP, num_steps=2, t_min=0.5))
    with pytest.raises(ValueError, match="got 2"):
        plan(replace(V1, num_steps=2))


def test_the_stock_scheduler_steps_the_respaced_chain() -> None:
    """With explicit timesteps it computes the posterior of the shortened chain, as written down by hand."""
    chain = list(reversed(spaced_timesteps(45)))
    scheduler = DDPMScheduler(**SCHEDULE)
    scheduler.set_timesteps(timesteps=chain)
    sample, noise = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 5, 5)

    for timestep, before in zip(chain, chain[1:], strict=False):
        stepped = scheduler.step(noise, timestep, sample, generator=torch.Generator().manual_seed(timestep))
        now, earlier = ALPHAS[timestep].double(), ALPHAS[before].double()
        clean = (sample - (1 - now).sqrt() * noise) / now.sqrt()
        beta = 1 - now / earlier
        mean = earlier.sqrt() * beta / (1 - now) * clean + (now / earlier).sqrt() * (1 - earlier) / (1 - now) * sample
        drawn = torch.randn(sample.shape, generator=torch.Generator().manual_seed(timestep))
        expected = mean + (beta * (1 - earlier) / (1 - now)).sqrt() * drawn
        assert torch.allclose(stepped.prev_sample, expected.float(), atol=2e-5), timestep
        assert torch.allclose(stepped.pred_original_sample, clean.float(), atol=2e-5)


@pytest.mark.parametrize("layout", [V1, ONE_STEP, replace(V1, num_steps=15, t_max=1.0, t_min=0.0)])
@pytest.mark.parametrize("max_tile", [64, 16])
def test_a_perfect_network_gives_the_picture_back(layout: Layout, max_tile: int) -> None:
    """Signs, scales, indices and slices: one mistake in any of them, and the latents differ from the condition."""
    condition = torch.randn(1, 4, 40, 24)

    for seed in (1, 2):
        assert (run(Oracle(), condition, layout, max_tile=max_tile, seed=seed) - condition).abs().max() < 2e-5


def test_calls_are_the_plan_times_the_tiles() -> None:
    """Every visited timestep asks once about each tile, and tells after each call of the model."""
    oracle, told = Oracle(), []
    grid = fit_grid(40, 24, max_tile=16, overlap=8)
    restore(
        oracle,
        torch.randn(1, 4, 40, 24),
        V1,
        grid=grid,
        tile_batch=2,
        generator=torch.Generator(),
        on_tile=lambda: told.append(1),
    )

    assert oracle.num_tiles == 16 * len(grid.tiles())
    assert sorted(set(oracle.timesteps), reverse=True) == plan(V1)
    assert len(told) == len(oracle.timesteps)


def test_tiles_of_any_size_agree() -> None:
    """Noise belongs to the whole latent: where the network looks at single positions, tiles cannot be seen."""
    condition = torch.randn(1, 4, 48, 72)
    whole = run(Pointwise(), condition, V1, max_tile=72)

    for max_tile in (16, 24, 40):
        assert (run(Pointwise(), condition, V1, max_tile=max_tile) - whole).abs().max() < 2e-6 * whole.abs().max()


def test_noise_follows_the_seed_alone() -> None:
    """The same seed gives the same latents, another seed others, and torch's own generator is not touched."""
    condition, state = torch.randn(1, 4, 16, 16), torch.get_rng_state()
    first, again, other = (run(Pointwise(), condition, V1, seed=seed) for seed in (1, 1, 2))

    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from([16, 32, 64]))
def test_gaussian_weights_add_to_one(height: int, width: int, max_tile: int) -> None:
    """At every position, in 32 bits, although a lone corner weighs 1e-10 before it is normalised."""
    grid = fit_grid(height, width, max_tile=max_tile, overlap=max_tile // 2)
    weights, total = gaussian_weights(grid), torch.zeros(height, width)
    for (top, left, bottom, right), weight in zip(grid.tiles(), weights, strict=True):
        total[top:bottom, left:right] += weight[0]

    assert weights.dtype == torch.float32 and bool(weights.isfinite().all())
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6)


def write_small_ccsr(folder: Path, layout: Layout) -> None:
    """Random networks in the layout of a published set; everything has an effect."""
    torch.manual_seed(4)
    unet = UNet2DConditionModel(**UNET)
    controlnet = steer_by_latents(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4)))
    for name, parameter in controlnet.named_parameters():
        if name.startswith("controlnet_"):
            torch.nn.init.normal_(parameter, std=0.2)
    unet.save_pretrained(folder / "unet")
    controlnet.save_pretrained(folder / "controlnet")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )
    vae.save_pretrained(folder / "vae")
    save_file({PROMPT_TENSOR: torch.randn(1, 77, 12)}, folder / "empty_prompt.safetensors")
    write_layout(replace(layout, channels_per_head=HEAD), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of random networks on disk."""
    path = tmp_path_factory.mktemp("ccsr")
    write_small_ccsr(path, replace(V1, num_steps=6))
    return path


@pytest.fixture
def ccsr(folder: Path) -> CCSR:
    return CCSR.load(folder, device=CPU, dtype=torch.float32, base=Lanczos())


@torch.inference_mode()
def test_two_forms_of_the_controlnet_agree(folder: Path) -> None:
    """Noisy and given latents side by side into one convolution, or into two whose results are added: the same."""
    apart = load_controlnet(folder / "controlnet", dtype=torch.float32).eval()
    config = dict(apart.config) | {"in_channels": 8, "conditioning_embedding_out_channels": (4,)}
    together = ControlNetModel.from_config(config).eval()
    state = {name: tensor for name, tensor in apart.state_dict().items() if "cond_embedding" not in name}
    state["conv_in.weight"] = torch.cat([apart.conv_in.weight, apart.controlnet_cond_embedding.weight], dim=1)
    state["conv_in.bias"] = apart.conv_in.bias + apart.controlnet_cond_embedding.bias
    assert together.load_state_dict(state, strict=False).unexpected_keys == []
    x, given, text = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16), torch.randn(1, 7, 12)
    together.controlnet_cond_embedding = torch.nn.Sequential(torch.nn.Identity())
    nothing = torch.zeros(1, 8, 16, 16)

    down, middle = apart(x, 500, text, given, return_dict=False)
    down_8, middle_8 = together(torch.cat([x, given], dim=1), 500, text, nothing, return_dict=False)

    for mine, theirs in zip([*down, middle], [*down_8, middle_8], strict=True):
        assert torch.allclose(mine, theirs, atol=3e-6)


def test_version_2_loads_into_the_same_slot(folder: Path, tmp_path: Path) -> None:
    """Its `condition_conv_in` and its extra flag in the config are the same network under other names."""
    tensors = load_file(folder / "controlnet" / "diffusion_pytorch_model.safetensors")
    renamed = {
        name.replace("controlnet_cond_embedding", "condition_conv_in"): tensor for name, tensor in tensors.items()
    }
    config = (folder / "controlnet" / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(
        config.replace("{", '{"use_vae_encode_condition": true,', 1), encoding="utf-8"
    )
    save_file(renamed, tmp_path / "diffusion_pytorch_model.safetensors")

    loaded = load_controlnet(tmp_path, dtype=torch.float32).state_dict()

    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_other_numbers_of_heads_are_refused(folder: Path) -> None:
    """No tensor's shape would tell: 8 heads everywhere load, and are wrong."""
    real = {"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": [5, 10, 20, 20]}
    check_heads(real, channels_per_head=64, where="unet")
    with pytest.raises(WrongHeads, match=r"is 8, expected \[5, 10, 20, 20\]"):
        check_heads(real | {"attention_head_dim": 8}, channels_per_head=64, where="unet")
    with pytest.raises(WrongHeads, match="expected"):
        load_networks(folder, Layout(version="v1", num_steps=6, channels_per_head=8), dtype=torch.float32)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 2), (33, 47), (64, 64)])
@pytest.mark.parametrize("color_fix", ["none", "adain", "wavelet"])
def test_any_size_comes_out_as_asked(ccsr: CCSR, size: tuple[int, int], color_fix: Any) -> None:
    """One pixel, strips and odd sides: exactly the wanted size, finite, within 0 and 1."""
    image = torch.rand(1, 3, max(1, size[0] // 2), max(1, size[1] // 2))

    restored = ccsr.with_layout(color_fix=color_fix, num_steps=1, max_tile=16, tile_overlap=8)(image, size, seed=3)

    assert restored.shape == (1, 3, *size) and restored.dtype == torch.float32
    assert bool(restored.isfinite().all()) and 0 <= restored.min() <= restored.max() <= 1


def test_what_changes_nothing_gives_the_enlarged_picture(ccsr: CCSR) -> None:
    """Padding, tiles, compensation and cutting are invisible: a network that answers with its condition is Lanczos."""
    ccsr.model = Oracle()  # type: ignore[assignment]
    image = torch.rand(1, 3, 37, 21)

    restored = ccsr.with_layout(round_trip_compensation=True, color_fix="none", max_tile=16, tile_overlap=8)(
        image, (74, 42)
    )

    assert (restored - Lanczos()(image, (74, 42))).abs().max() < 2e-3


@pytest.mark.parametrize("color_fix", ["none", "adain", "wavelet"])
def test_a_large_picture_is_restored_in_bounded_memory(ccsr: CCSR, color_fix: Any) -> None:
    """Above `exact_px` pixels lie in a file and go from band to band; with the oracle the picture still comes back."""
    ccsr.model = Oracle()  # type: ignore[assignment]
    ccsr.canvas.exact_px = 60 * 60
    image = torch.rand(1, 3, 400, 30)

    bands = list(
        ccsr.with_layout(num_steps=1, round_trip_compensation=True, color_fix=color_fix).bands(image, (800, 60))
    )

    assert len(bands) > 1
    assert (torch.cat(bands, dim=-2) - Lanczos()(image, (800, 60))).abs().max() < 2e-3


def test_the_seed_decides_and_nothing_stays_behind(ccsr: CCSR) -> None:
    """Twice the same seed is twice the same picture; no weight moves."""
    image = torch.rand(1, 3, 20, 20)
    before = {name: tensor.clone() for name, tensor in ccsr.model.networks.controlnet.state_dict().items()}

    first, again, other = (ccsr(image, (40, 40), seed=seed) for seed in (1, 1, 2))

    assert torch.equal(first, again) and not torch.equal(first, other)
    after = ccsr.model.networks.controlnet.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_stop_is_heard_between_tiles(ccsr: CCSR) -> None:
    """A callback that raises ends the work where it is."""
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 8:
            raise Cancelled

    with pytest.raises(Cancelled):
        ccsr(torch.rand(1, 3, 30, 30), (60, 60), stop)

    assert len(calls) == 8


def test_the_velocity_form_is_the_same_network(ccsr: CCSR) -> None:
    """What predicts velocity is turned into noise: from the same output, another but consistent answer."""
    tiles, condition = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    places, alpha = [Tile(0, 0, 8, 8)], float(ALPHAS[500])
    by_noise = ccsr.model.predict(tiles, places, 500.0, condition)

    by_velocity = RestoringUNet(ccsr.model.networks, prediction_type="v_prediction").predict(
        tiles, places, 500.0, condition
    )

    assert torch.allclose(by_velocity, alpha**0.5 * by_noise + (1 - alpha) ** 0.5 * tiles, atol=1e-5)


def psnr(first: Tensor, second: Tensor) -> float:
    """Peak signal to noise ratio of two pictures in 0..1, in dB."""
    return float(-10 * torch.log10((first - second).square().mean()))


MIDDLES = {"clinic": (400, 160), "shuttle": (540, 400), "ceiling": (488, 344)}
"""Corners (left, top) of what is looked at, 192 x 192 px."""


@pytest.mark.parametrize("worn", [False, True])
def test_the_built_in_networks_restore(pocket: WeightStore, worn: bool) -> None:
    """Halved photographs come nearer to the truth than by enlarging alone, those with noise and JPEG by more."""
    base = load_prestage(pocket, CPU)
    ccsr = CCSR.load(pocket.folder("ccsr-v2"), device=CPU, dtype=torch.float32, base=base)
    gains = {}
    for name, (left, top) in MIDDLES.items():
        with Image.open(PHOTOS / f"{name}.png") as photo:
            truth = to_tensor(photo.convert("RGB").crop((left, top, left + 192, top + 192)))
        small = reduce(truth, 2, "area")
        if worn:
            small = wear(small, np.random.default_rng(3), noise_share=1.0, jpeg_share=1.0)
        gains[name] = psnr(ccsr(small, (192, 192)), truth) - psnr(base(small, (192, 192)), truth)

    assert min(gains.values()) > 0, gains
    assert sum(gains.values()) / len(gains) > (0.1 if worn else 0.05), gains


@pytest.mark.parametrize("version", ["ccsr-v1", "ccsr-v2"])
def test_the_built_in_networks_leave_flat_pictures_flat(pocket: WeightStore, version: str) -> None:
    """Neither form adds a speckle: less than half of 1/255 anywhere."""
    ccsr = CCSR.load(pocket.folder(version), device=CPU, dtype=torch.float32, base=Lanczos())
    if version == "ccsr-v1":
        ccsr = ccsr.with_layout(num_steps=6)

    for level in (0.5, 0.08):
        restored = ccsr(torch.full((1, 3, 32, 32), level), (64, 64), seed=7)
        assert (restored - level).abs().max() < 0.5 / 255
