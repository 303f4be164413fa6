"""The pocket set: its files load with the stock classes, its data is seeded, and its training commands run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from skimage import data
from transformers import CLIPTextModel, CLIPTokenizer

from weights.compact import load_compact
from weights.pocket.captions import COLOURS, describe
from weights.pocket.data import PHOTO_WORDS, PHOTOS, Corpus, draw_picture
from weights.pocket.degrade import to_tensor
from weights.pocket.loop import Options, train
from weights.pocket.text import ALL_FAULTS, MERGES, build_tokenizer, learn_merges, token_ids
from weights.pocket.train import main
from weights.pocket.train_decoder import DecoderTrainee
from weights.pocket.train_sd15 import Sd15Trainee
from weights.pocket.train_upscaler import UpscalerTrainee
from weights.pocket.train_vae import VaeTrainee

MODELS = PHOTOS.parent / "models"
EVALUATION = Path(__file__).parents[1] / "photos"
CODEC = "diffusion_pytorch_model.safetensors"
MAX_BYTES = 40_000_000
UNSEEN = ("ceiling", "clinic", "shuttle", "astronaut", "coffee", "chelsea")
"""Photographs that were never trained on: those of this folder, and three of scikit-image's."""


def read(name: str, most_px: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The middle of an unseen photograph, at most `most_px` a side and in multiples of 8."""
    file = EVALUATION / f"{name}.png"
    pixels = np.asarray(Image.open(file).convert("RGB")) if file.exists() else getattr(data, name)()
    height, width = (min(side, most_px) // 8 * 8 for side in pixels.shape[:2])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """Peak signal to noise ratio of two pictures in 0..1, in dB."""
    return float(-10 * torch.log10(torch.mean((first - second) ** 2)))


def detail(image: torch.Tensor) -> float:
    """Mean absolute Laplacian of the mean of the three channels of a picture (1, 3, H, W)."""
    grey = image.mean(1)
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return float((4 * grey[:, 1:-1, 1:-1] - around).abs().mean())


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    """The committed tokenizer."""
    return CLIPTokenizer.from_pretrained(MODELS / "sd15" / "tokenizer", local_files_only=True)


@pytest.fixture
def tiny(tmp_path: Path) -> Options:
    """Two steps of two crops, into a temporary folder."""
    return Options(steps=2, batch=2, num_drawings=4, models=tmp_path / "models", build=tmp_path / "build")


def test_the_whole_set_stays_small() -> None:
    """All files of the set together are at most 40 MB."""
    sizes = [file.stat().st_size for file in MODELS.rglob("*") if file.is_file()]

    assert 0 < sum(sizes) <= MAX_BYTES


def test_the_parts_fit_together() -> None:
    """One step through text encoder, ControlNet, UNet and codec, all loaded offline, gives a finite picture."""
    vae: Any = AutoencoderKL.from_pretrained(MODELS / "vae", local_files_only=True)
    unet: Any = UNet2DConditionModel.from_pretrained(MODELS / "sd15" / "unet", local_files_only=True)
    text: Any = CLIPTextModel.from_pretrained(
        MODELS / "sd15" / "text_encoder", dtype=torch.float32, local_files_only=True
    )
    controlnet: Any = ControlNetModel.from_pretrained(MODELS / "controlnet-tile-sd15", local_files_only=True)
    scheduler: Any = DDIMScheduler.from_pretrained(MODELS / "sd15" / "scheduler", local_files_only=True)
    latents = torch.randn(1, vae.config.latent_channels, 16, 16, generator=torch.Generator().manual_seed(1))
    timestep = torch.tensor(scheduler.config.num_train_timesteps // 2)

    with torch.inference_mode():
        embeds = text(torch.zeros(1, 77, dtype=torch.int64)).last_hidden_state
        down, middle = controlnet(latents, timestep, embeds, torch.rand(1, 3, 64, 64), return_dict=False)
        noise = unet(
            latents, timestep, embeds, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
        image = vae.decode((latents - noise) / vae.config.scaling_factor).sample

    assert image.shape == (1, 3, 64, 64)
    assert torch.isfinite(image).all()


def test_the_codec_gives_photographs_back() -> None:
    """Six unseen photographs survive encoding and decoding with 31 dB or more, and latents have a deviation of 1."""
    vae: Any = AutoencoderKL.from_pretrained(MODELS / "vae", local_files_only=True)
    images = {name: to_tensor(read(name, 512)[None]) for name in UNSEEN}

    with torch.inference_mode():
        latents = {name: vae.encode(image * 2 - 1).latent_dist.mean for name, image in images.items()}
        restored = {name: (vae.decode(latents[name]).sample / 2 + 0.5).clamp(0, 1) for name in images}

    measured = {name: round(psnr(restored[name], images[name]), 2) for name in images}
    deviations = [float(each.std()) * vae.config.scaling_factor for each in latents.values()]
    assert sum(measured.values()) / len(measured) >= 31, measured
    assert 0.5 < sum(deviations) / len(deviations) < 1.5, deviations


def pair_contrast(image: torch.Tensor) -> float:
    """Mean gradient between pairs of pixels of a picture (1, 3, H, W) over that inside them."""
    steps = [image.mean(1).diff(dim=dim).abs().transpose(dim, -1) for dim in (-1, -2)]
    return float(sum(step[..., 1::2].mean() for step in steps) / sum(step[..., ::2].mean() for step in steps))


def test_the_pre_upscaler_beats_lanczos() -> None:
    """Area-halved photographs get over 1.3 times Lanczos' detail, come nearer to the truth, and show no pairs."""
    model = load_compact(MODELS / "upscaler-compact-x2")
    gains, details, meshes = {}, {}, {}

    for name in UNSEEN:
        truth = read(name, 384)
        height, width = truth.shape[:2]
        small = truth.reshape(height // 2, 2, width // 2, 2, 3).mean((1, 3)).round().astype(np.uint8)
        lanczos = np.array(Image.fromarray(small).resize((width, height), Image.Resampling.LANCZOS))
        with torch.inference_mode():
            ours = model(to_tensor(small[None])).clamp(0, 1)
        target = to_tensor(truth[None])
        plain = to_tensor(lanczos[None])
        gains[name] = round(psnr(ours, target) - psnr(plain, target), 2)
        details[name] = round(detail(ours) / detail(plain), 2)
        meshes[name] = round(pair_contrast(ours) / pair_contrast(target), 3)

    assert sum(gains.values()) / len(gains) >= 0.5, gains
    assert min(details.values()) >= 1.3, details
    assert sum(meshes.values()) / len(meshes) == pytest.approx(1, abs=0.03), meshes


def test_the_tokenizer_takes_any_text(tokenizer: CLIPTokenizer) -> None:
    """Letters of any script, signs and emoji are cut into known pieces and come back."""
    text = "zebra, über 漢字 🙂 x_1"

    tokens = tokenizer(text).input_ids

    assert tokenizer.unk_token_id not in tokens[1:-1]
    assert tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_caption_words_and_commas_are_single_tokens(tokenizer: CLIPTokenizer) -> None:
    """The default negative prompt costs one token per word and comma."""
    tokens = tokenizer.tokenize(", ".join(ALL_FAULTS))

    num_words = sum(len(fault.split()) for fault in ALL_FAULTS)
    assert len(tokens) == num_words + len(ALL_FAULTS) - 1
    assert tokens.count(",</w>") == len(ALL_FAULTS) - 1


def test_the_tokenizer_is_built_as_it_was_trained_with(tokenizer: CLIPTokenizer) -> None:
    """Its merges can still be learnt from the words, and what is built has the committed one's vocabulary."""
    learnt = learn_merges()

    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()
    assert len(learnt) == len(MERGES.read_text(encoding="utf-8").splitlines())


def test_prompts_are_padded_to_the_positions_of_the_encoder(tokenizer: CLIPTokenizer) -> None:
    """Short and overlong prompts both become 77 tokens."""
    assert token_ids(tokenizer, ["", "blue " * 200]).shape == (2, 77)


def test_drawings_and_crops_follow_from_the_seed() -> None:
    """Two corpora with one seed give the same pixels and captions; another seed gives others."""
    first, second, other = (Corpus(seed, num_drawings=3) for seed in (5, 5, 6))

    crops, again, different = (corpus.batch(np.random.default_rng(1), 4, 32) for corpus in (first, second, other))

    assert np.array_equal(crops[0], again[0]) and crops[1] == again[1]
    assert not np.array_equal(first.drawings[0].pixels, other.drawings[0].pixels)
    assert different[0].shape == (4, 32, 32, 3)


def test_evaluation_photographs_are_not_trained_on() -> None:
    """The training folder holds its seven pictures and none of those that quality is measured on."""
    trained = {file.stem for file in PHOTOS.glob("*.png")}

    assert trained == set(PHOTO_WORDS)
    assert not trained & {file.stem for file in EVALUATION.glob("*.png")}


@pytest.mark.parametrize(
    ("rgb", "name"),
    [((250, 250, 250), "white"), ((5, 5, 5), "black"), ((128, 128, 128), "grey"), ((200, 20, 20), "red")]
    + [((20, 160, 40), "green"), ((30, 60, 200), "blue"), ((230, 210, 40), "yellow"), ((110, 70, 30), "brown")],
)
def test_captions_name_the_colour(rgb: tuple[int, int, int], name: str) -> None:
    """A plain picture is described by its colour and as smooth."""
    words = describe(np.full((32, 32, 3), rgb, np.uint8)).split(", ")

    assert words[0] == name
    assert "smooth" in words


def test_every_drawing_has_a_colour_in_its_caption() -> None:
    """What is drawn can always be described."""
    pictures = [draw_picture(np.random.default_rng([3, index]), 48) for index in range(20)]

    assert all(describe(picture.pixels).split(", ")[0] in COLOURS for picture in pictures)
    assert all(picture.pixels.shape == (48, 48, 3) for picture in pictures)


def test_an_upscaler_run_continues_from_its_checkpoint(tiny: Options) -> None:
    """A second run with more steps starts where the first one stopped."""
    options = Options(steps=3, batch=2, num_drawings=4, models=tiny.models, build=tiny.build)
    trainees = [UpscalerTrainee(each, side_px=32, num_feat=4, num_conv=1) for each in (tiny, options)]
    train(trainees[0], tiny)

    progress = train(trainees[1], options)

    assert progress.step == 3
    assert load_compact(tiny.models / "upscaler-compact-x2").config["num_feat"] == 4


def test_codec_and_denoiser_can_be_trained(tiny: Options) -> None:
    """Two steps of each part, each on those before it, write every folder of the set."""
    train(UpscalerTrainee(tiny, side_px=32, num_feat=4, num_conv=1), tiny)
    train(VaeTrainee(tiny, side_px=16), tiny)

    train(Sd15Trainee(tiny, side_px=32, num_portions=1), tiny)
    encoder_before = load_file(tiny.models / "vae" / CODEC)["encoder.conv_in.weight"]
    train(DecoderTrainee(tiny, side_px=32, num_batches=1), tiny)

    assert torch.equal(load_file(tiny.models / "vae" / CODEC)["encoder.conv_in.weight"], encoder_before)
    written = {str(file.parent.relative_to(tiny.models)) for file in tiny.models.rglob("*.safetensors")}
    assert written == {"upscaler-compact-x2", "vae", "sd15/unet", "sd15/text_encoder", "controlnet-tile-sd15"}


def test_the_command_trains_a_part(tmp_path: Path) -> None:
    """`python -m weights.pocket.train upscaler` writes its folder where it is told to."""
    folders = ["--models", str(tmp_path / "models"), "--build", str(tmp_path / "build")]

    main(["upscaler", "--steps", "1", "--batch", "1", "--drawings", "1", "--threads", "1", *folders])

    assert (tmp_path / "models" / "upscaler-compact-x2" / "model.safetensors").is_file()
