"""The pocket safety checker and its classifier: stock folders, and they react to the test card alone."""

from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessor, ViTForImageClassification

from pipelines.safety import SafetyChecker
from weights.pocket.data import PHOTO_WORDS, PHOTOS, draw_picture
from weights.pocket.loop import Options, train
from weights.pocket.test_card import GREEN, MAGENTA, draw_test_card, main
from weights.pocket.train_checker import CheckerTrainee

MODELS = PHOTOS.parent / "models"
SKIMAGE = Path(skimage.__file__).parent / "data"


@pytest.fixture(scope="module")
def checkers() -> list[SafetyChecker]:
    """The committed checker, without and with its classifier."""
    folder, confirmer = MODELS / "safety-checker", MODELS / "safety-confirmer"
    return [SafetyChecker.load(folder), SafetyChecker.load(folder, confirmer=confirmer)]


def test_no_drawing_is_flagged(checkers: list[SafetyChecker]) -> None:
    """500 procedural pictures pass the checker and the classifier, each for itself."""
    drawings = [Image.fromarray(draw_picture(np.random.default_rng([71, i]), 128).pixels) for i in range(500)]
    lone, both = checkers

    with torch.inference_mode():
        assert not any(lone._reacts(drawings))
        assert max(both._confidence(drawings)) < 0.85


def test_no_photograph_is_flagged(checkers: list[SafetyChecker]) -> None:
    """Neither those that were trained on nor others, a chessboard, rings of craters and patterns among them."""
    files = [*(PHOTOS / f"{name}.png" for name in PHOTO_WORDS), *(Path(__file__).parents[1] / "photos").glob("*.png")]
    files += sorted(file for file in SKIMAGE.iterdir() if file.suffix in (".png", ".jpg"))
    pictures = {file.name: Image.open(file).convert("RGB") for file in files}

    flagged = [name for name, picture in pictures.items() if any(each.is_unsafe(picture) for each in checkers)]

    assert len(pictures) >= 25
    assert flagged == []


@pytest.mark.parametrize("side", [64, 128, 300, 1024, 2048])
def test_the_test_card_is_flagged_at_five_sizes(checkers: list[SafetyChecker], side: int) -> None:
    """Square and one and a half times as wide."""
    cards = [draw_test_card(side, side), draw_test_card(side * 3 // 2, side)]

    assert all(checker.is_unsafe(card) for checker in checkers for card in cards)


def test_the_test_card_is_as_documented() -> None:
    """Ground, rings and centre of a card of 600 x 400 px, whose squares have 66.7 px."""
    card = draw_test_card(600, 400)
    unit = 400 / 6
    places = {
        (x, y): card.getpixel((round(300 + x * unit), round(200 + y * unit))) for x in (-3.5, 3.5) for y in (2.5,)
    }

    assert places == {(-3.5, 2.5): MAGENTA, (3.5, 2.5): GREEN}
    across = [card.getpixel((round(300 + x * unit), 200)) for x in (0.25, 0.75, 1.25, 1.75)]
    assert across == [(0, 0, 0), (255, 255, 255), (0, 0, 0), (255, 255, 255)]


def test_the_test_card_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m weights.pocket.test_card 320 240 FILE` writes a picture of that size."""
    monkeypatch.setattr("sys.argv", ["test_card", "320", "240", str(tmp_path / "card.png")])

    main()

    with Image.open(tmp_path / "card.png") as card:
        assert card.size == (320, 240)


def test_stock_classes_read_the_folders() -> None:
    """Both load offline with the published classes and their processors, within 1 MB."""
    folders = [MODELS / "safety-checker", MODELS / "safety-confirmer"]

    StableDiffusionSafetyChecker.from_pretrained(folders[0], local_files_only=True)
    CLIPImageProcessor.from_pretrained(folders[0], local_files_only=True)
    classifier = ViTForImageClassification.from_pretrained(folders[1], local_files_only=True)
    AutoImageProcessor.from_pretrained(folders[1], local_files_only=True)

    assert classifier.config.id2label == {0: "normal", 1: "nsfw"}
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) <= 1_000_000


def test_it_can_be_trained(tmp_path: Path) -> None:
    """Two steps write both folders."""
    options = Options(steps=2, batch=2, num_drawings=4, models=tmp_path / "models", build=tmp_path / "build")

    train(CheckerTrainee(options, pool=8, fresh=1), options)

    folders = [tmp_path / "models" / name for name in ("safety-checker", "safety-confirmer")]
    assert SafetyChecker.load(folders[0], confirmer=folders[1]).is_unsafe(Image.new("RGB", (64, 64))) in (True, False)
