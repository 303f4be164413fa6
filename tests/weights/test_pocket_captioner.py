"""The pocket captioner: its folder is stock, it can be trained, and it names colours as the pixels are counted.

What is counted as right: the caption holds exactly one name of a colour, and that colour covers as many pixels of the
whole picture as any other (the rule of `name_colours`, pixel by pixel), or at most 5 of 100 pixels fewer: where two
colours are that close, either is dominant.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image
from transformers import AutoProcessor, Blip2ForConditionalGeneration

from pipelines.caption import Captioner, load_captioner
from weights.pocket.captions import COLOURS, name_colours
from weights.pocket.data import PHOTOS, Picture, draw_picture
from weights.pocket.loop import Options, train
from weights.pocket.text import known_words
from weights.pocket.train_captioner import CaptionerTrainee, build_tokenizer, caption_of, recolour

FOLDER = PHOTOS.parent / "models" / "captioner"
EVALUATION = Path(__file__).parents[1] / "photos"
SKIMAGE = Path(skimage.__file__).parent / "data"
# None of them was trained on.
EVALUATION_PHOTOS = [
    *(EVALUATION / f"{name}.png" for name in ("clinic", "shuttle", "ceiling")),
    *(SKIMAGE / name for name in ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "retina.jpg")),
    *(SKIMAGE / name for name in ("hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "gravel.png")),
]
CLOSE = 0.05


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    """The committed captioner."""
    return load_captioner(FOLDER, device="cpu")


def wrong(captioner: Captioner, pictures: Iterable[tuple[str, Image.Image]]) -> dict[str, str]:
    """Captions of the pictures whose dominant colour is not named, by the name of the picture, with what is true."""
    mistakes = {}
    for name, image in pictures:
        rgb = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(np.float32) / np.float32(255)
        shares = np.bincount(name_colours(rgb), minlength=len(COLOURS)) / len(rgb)
        caption = captioner.caption(image.convert("RGB"))
        said = [COLOURS.index(word) for word in caption.split(", ") if word in COLOURS]
        if len(said) != 1 or shares[said[0]] < shares.max() - CLOSE:
            mistakes[name] = f"{caption}; most is {COLOURS[int(shares.argmax())]}"
    return mistakes


def test_it_names_the_dominant_colour_of_drawings(captioner: Captioner) -> None:
    """Right for more than 8 of 10 of 60 drawings of three sizes that were not among those it learnt from."""
    sides = (96, 192, 256)
    drawings = [draw_picture(np.random.default_rng([70, index]), sides[index % 3]) for index in range(60)]

    mistakes = wrong(captioner, [(f"{index}", Image.fromarray(each.pixels)) for index, each in enumerate(drawings)])

    assert len(mistakes) <= 0.2 * len(drawings), mistakes


def test_it_names_the_dominant_colour_of_photographs(captioner: Captioner) -> None:
    """Right for more than 8 of 10 photographs that were not trained on, whole, at any aspect."""
    mistakes = wrong(captioner, [(file.name, Image.open(file)) for file in EVALUATION_PHOTOS])

    assert len(mistakes) <= 0.2 * len(EVALUATION_PHOTOS), mistakes


def test_stock_classes_read_the_folder() -> None:
    """Model, tokenizer and image processor load offline with the transformers classes, in 16 bits, within 3 MB."""
    processor = AutoProcessor.from_pretrained(FOLDER, local_files_only=True)
    model = Blip2ForConditionalGeneration.from_pretrained(FOLDER, local_files_only=True)

    assert type(processor).__name__ == "Blip2Processor"
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_200_000
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 3_000_000


def test_each_word_of_a_caption_is_one_token() -> None:
    """Words are learnt as a whole; other text falls into bytes and comes back."""
    tokenizer = build_tokenizer()
    words, _ = known_words()

    assert [word for word in words if len(tokenizer(word).input_ids) > 1] == []
    assert tokenizer.decode(tokenizer("naïve 漢字, blue").input_ids).strip() == "naïve 漢字, blue"


def test_captions_say_what_is_measured() -> None:
    """Kind, colour, brightness and texture, in the order of the denoiser's captions."""
    flat = Picture(np.full((64, 96, 3), (10, 20, 90), np.uint8), "flat colour")

    assert caption_of(flat) == "flat colour, blue, dark, smooth"


def test_recolouring_reaches_every_colour() -> None:
    """From one brown picture come pictures of nearly all colours."""
    brown = np.full((8, 8, 3), (120, 80, 40), np.uint8)
    rng = np.random.default_rng(1)

    names = {caption_of(Picture(recolour(brown, rng), "x")).split(", ")[1] for _ in range(300)}

    assert len(names) >= 10, names


def test_it_can_be_trained(tmp_path: Path) -> None:
    """Two steps write a folder that the captioner of the pipelines reads."""
    options = Options(steps=2, batch=2, num_drawings=4, models=tmp_path / "models", build=tmp_path / "build")

    train(CaptionerTrainee(options, pool=4, fresh=1), options)

    assert (
        load_captioner(tmp_path / "models" / "captioner", device="cpu").caption(Image.new("RGB", (40, 30))) is not None
    )
