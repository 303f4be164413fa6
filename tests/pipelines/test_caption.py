"""Captions: published folder layouts are read as they are, failures are of one type, and the suffix always fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPTokenizer,
    T5Tokenizer,
)

from pipelines.caption import MAX_PIXELS, Blip2Captioner, Captioner, join_within_window, load_captioner, reduced
from pipelines.errors import CaptionFailed
from tests.pipelines.staging import pocket_models
from weights.pocket.captions import COLOURS
from weights.store import WeightStore

SUFFIX = " high quality, highly detailed, high resolution, sharp"
NUM_QUERIES = 3
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LETTERS = "abcdefghijklmnopqrstuvwxyz,.?"


@pytest.fixture(scope="module")
def captioner(pocket: WeightStore) -> Captioner:
    """The built-in captioner."""
    return load_captioner(pocket.folder("captioner"), device="cpu")


@pytest.fixture(scope="module")
def tokenizer(pocket: WeightStore) -> Any:
    """The CLIP tokenizer that captions have to fit."""
    return CLIPTokenizer.from_pretrained(pocket.folder("sd15") / "tokenizer", local_files_only=True)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP-2 with T5, random weights, laid out as `Salesforce/blip2-flan-t5-xl` is: in several files."""
    folder = tmp_path_factory.mktemp("blip2-flan-t5")
    pieces = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")] + [(piece, -2.0) for piece in f"▁{LETTERS}"]
    processor = Blip2Processor(
        BlipImageProcessor(size={"height": 24, "width": 24}),
        T5Tokenizer(vocab=pieces, extra_ids=0),
        num_query_tokens=NUM_QUERIES,
    )
    text = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    text |= {"vocab_size": 64, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(3)
    model: Any = Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config={**SMALL, "image_size": 24, "patch_size": 6, "initializer_range": 0.3},
            qformer_config={**SMALL, "cross_attention_frequency": 1, "encoder_hidden_size": 16, "vocab_size": 2},
            text_config=text,
            num_query_tokens=NUM_QUERIES,
            image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder, max_shard_size="50KB")
    processor.save_pretrained(folder)
    return folder


def test_plain_pictures_are_called_by_their_colour(captioner: Captioner) -> None:
    """The built-in captioner names the colour of pictures of one colour, and no other."""
    pictures = {
        "red": (200, 20, 20),
        "green": (20, 160, 40),
        "blue": (30, 60, 200),
        "yellow": (230, 210, 40),
        "white": (250, 250, 250),
        "black": (5, 5, 5),
        "grey": (128, 128, 128),
    }

    said = {name: captioner.caption(Image.new("RGB", (160, 90), rgb)).split(", ") for name, rgb in pictures.items()}

    assert {name: [word for word in words if word in COLOURS] for name, words in said.items()} == {
        name: [name] for name in pictures
    }


def test_a_picture_is_captioned_the_same_every_time(captioner: Captioner, photo_crop: Image.Image) -> None:
    """Neither the random state nor what was captioned before has an influence."""
    first = captioner.caption(photo_crop)
    captioner.caption(Image.new("RGB", (64, 64)))
    torch.manual_seed(123)

    assert captioner.caption(photo_crop) == first
    assert first and "\n" not in first


@pytest.mark.parametrize("size", [(1, 1), (3000, 2), (2, 3000), (2000, 1500)])
def test_pictures_of_any_size_have_a_caption(captioner: Captioner, size: tuple[int, int]) -> None:
    """Strips, single pixels and large pictures are described like any other."""
    assert "blue" in captioner.caption(Image.new("RGB", size, (30, 60, 200))).split(", ")


def test_large_pictures_are_reduced_first() -> None:
    """What the captioner is given has at most a megapixel and the picture's shape."""
    small = reduced(Image.new("RGB", (6000, 2000)))

    assert small.width * small.height <= MAX_PIXELS
    assert abs(small.width / small.height - 3) < 0.01
    assert reduced(Image.new("RGB", (640, 480))).size == (640, 480)


def test_an_instruction_does_not_derail_opt(captioner: Captioner, photo_crop: Image.Image) -> None:
    """OPT was never taught to follow instructions: they change nothing."""
    assert captioner.caption(photo_crop, "Describe the picture.") == captioner.caption(photo_crop)


def test_t5_is_told_what_to_say(t5_folder: Path, photo_crop: Image.Image) -> None:
    """With an instruction, the tokens are those of the stock processor and greedy generation with that text."""
    processor = Blip2Processor.from_pretrained(t5_folder, local_files_only=True)
    model: Any = Blip2ForConditionalGeneration.from_pretrained(t5_folder, dtype=torch.float32, local_files_only=True)
    inputs = processor(images=photo_crop, text="what is it?", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False, num_beams=1, no_repeat_ngram_size=3)
    captioner = load_captioner(t5_folder, device="cpu")

    told = captioner.caption(photo_crop, "what is it?", max_tokens=12)

    assert told == " ".join(processor.tokenizer.decode(expected[0], skip_special_tokens=True).split())
    assert told and told != captioner.caption(photo_crop, max_tokens=12)


def test_older_snapshots_are_completed(t5_folder: Path, tmp_path: Path, photo_crop: Image.Image) -> None:
    """A folder without the image token and the number of queries, as published at first, gives the same caption."""
    old = tmp_path / "old"
    old.mkdir()
    for file in t5_folder.iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    config = json.loads((old / "config.json").read_text())
    del config["image_token_index"]
    (old / "config.json").write_text(json.dumps(config))
    processor = json.loads((old / "processor_config.json").read_text())
    (old / "processor_config.json").unlink()
    (old / "preprocessor_config.json").write_text(json.dumps(processor["image_processor"]))

    captions = [load_captioner(folder, device="cpu").caption(photo_crop) for folder in (t5_folder, old)]

    assert captions[0] == captions[1]


def test_blip_is_read_too(tmp_path: Path, photo_crop: Image.Image) -> None:
    """The light stand-in, `Salesforce/blip-image-captioning-base`, has another class and the same interface."""
    vocabulary = {piece: index for index, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", *LETTERS])}
    tokens = {"pad_token_id": 0, "bos_token_id": 4, "eos_token_id": 3, "sep_token_id": 3}
    text = {**SMALL, "encoder_hidden_size": 16, "vocab_size": len(vocabulary), "max_position_embeddings": 64, **tokens}
    vision = {**SMALL, "image_size": 24, "patch_size": 6}
    torch.manual_seed(1)
    model: Any = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(tmp_path)
    image_processor = BlipImageProcessor(size={"height": 24, "width": 24})
    BlipProcessor(image_processor, BertTokenizer(vocab=vocabulary)).save_pretrained(tmp_path)

    caption = load_captioner(tmp_path, device="cpu").caption(photo_crop, max_tokens=5)

    assert caption == load_captioner(tmp_path, device="cpu").caption(photo_crop, max_tokens=5)
    assert caption


def test_a_folder_without_a_captioner_is_one_kind_of_error(tmp_path: Path) -> None:
    """Nothing there, and something else there; the operator's log says where, the caller's does not."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "blip-2"}')

    for name in ("missing", "other", "empty"):
        with (
            structlog.testing.capture_logs() as logs,
            pytest.raises(CaptionFailed, match="captioner cannot be read") as caught,
        ):
            load_captioner(tmp_path / name, device="cpu")
        assert str(tmp_path) not in str(caught.value) and "/" not in str(caught.value)
        assert [line["event"] for line in logs] == ["captioner_failed"]


def test_a_captioner_that_fails_says_so_in_one_line(
    pocket: WeightStore, photo_crop: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong inside arrives as the one exception that recipes turn into a log line."""
    captioner: Any = load_captioner(pocket.folder("captioner"), device="cpu")

    def fail(**_: Any) -> None:
        raise RuntimeError("cannot read /srv/weights/captioner\nwith a long story")

    monkeypatch.setattr(captioner.model, "generate", fail)

    with pytest.raises(CaptionFailed, match=r"^The captioner failed \(RuntimeError\)\.$"):
        captioner.caption(photo_crop)


def test_a_short_caption_keeps_every_word(tokenizer: Any) -> None:
    """Caption and suffix are joined exactly as they are."""
    assert join_within_window("a blue house", SUFFIX, tokenizer) == f"a blue house{SUFFIX}"


def test_a_long_caption_gives_way_to_the_suffix(tokenizer: Any) -> None:
    """The prompt fits into 75 tokens, ends with the suffix, and one word more would not have fitted."""
    words = [f"house{index}," for index in range(60)]

    prompt = join_within_window(" ".join(words), SUFFIX, tokenizer)

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)

    kept = prompt.removesuffix(SUFFIX)
    assert prompt.endswith(SUFFIX) and length(prompt) <= 75
    num_kept = len(kept.split())
    assert 0 < num_kept < len(words) and not kept.endswith(",")
    assert length(" ".join(words[: num_kept + 1]).rstrip(",") + SUFFIX) > 75


def test_a_suffix_that_fills_the_window_stays_whole(tokenizer: Any) -> None:
    """Then there is no caption; the encoder takes long prompts in chunks."""
    suffix = " sharp" * 80

    assert join_within_window("a blue house", suffix, tokenizer) == suffix


def test_brackets_of_a_caption_are_no_emphasis(tokenizer: Any) -> None:
    """What the captioner reads off a sign must not change weights."""
    assert join_within_window("a sign (exit) [2]", " (sharp:1.3)", tokenizer) == "a sign \\(exit\\) \\[2\\] (sharp:1.3)"


def test_the_prompt_fits_every_encoder(tokenizer: Any) -> None:
    """With two tokenizers, the one that needs more tokens decides."""
    pairs = [(first, second) for first, second in [("a", "b")]]
    symbols = [*map(str, LETTERS), *(f"{each}</w>" for each in LETTERS), "ab", "<|startoftext|>", "<|endoftext|>"]
    arguments: dict[str, Any] = {"vocab": {symbol: index for index, symbol in enumerate(symbols)}, "merges": pairs}
    by_letters = CLIPTokenizer(**arguments)
    caption = "overlapping shapes " * 10

    prompt = join_within_window(caption, " sharp", tokenizer, by_letters)

    assert len(prompt) < len(join_within_window(caption, " sharp", tokenizer))
    assert len(by_letters(prompt, add_special_tokens=False).input_ids) <= 75


@pytest.mark.parametrize("num_failures", [1, 2])
def test_room_is_made_for_a_captioner(pocket: WeightStore, monkeypatch: pytest.MonkeyPatch, num_failures: int) -> None:
    """A full device is emptied for it once; where that does not help, it fails as captioners do."""
    models, tried, own = pocket_models(pocket), [], Blip2Captioner.load

    def load(*arguments: Any, **options: Any) -> Captioner:
        tried.append(arguments)
        if len(tried) <= num_failures:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(*arguments, **options)

    monkeypatch.setattr(Blip2Captioner, "load", load)

    if num_failures == 1:
        assert models.captioner() is not None
    else:
        with pytest.raises(CaptionFailed, match="no room"):
            models.captioner()
    assert len(tried) == 2
