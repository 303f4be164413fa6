"""Prompts are read as the AUTOMATIC1111 web interface reads them, and encoded without touching the text encoder."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipelines.errors import InvalidParams
from pipelines.prompts import CHUNK_TOKENS, Span, encode_prompts, parse

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.:;!?()[]<>-_'"


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every letter is a token."""
    symbols = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[], model_max_length=77)


@pytest.fixture(scope="module")
def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A random text encoder of two layers."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


def plain(text: str, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> torch.Tensor:
    """Encode as a stock pipeline does."""
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    return text_encoder(ids).last_hidden_state


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a [[b", [("a ", 1.0), ("b", 1 / 1.1**2)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        (r"a\\b", [("a\\b", 1.0)]),
        (r"back\slash", [("back\\slash", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("stray) and ]", [("stray) and ]", 1.0)]),
        ("stray:1.3) colon: here", [("stray:1.3) colon: here", 1.0)]),
        ("(a:1.5) (b:.5) (c:-1) (d: 2. )", [("a", 1.5), (" ", 1.0), ("b", 0.5), (" ", 1.0), ("c", -1.0), (" ", 1.0),
                                          ("d", 2.0)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(worst quality, low quality, normal quality:2)", [("worst quality, low quality, normal quality", 2.0)]),
        ("(((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
         [("house", 1.3 * 1.1**2), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
          ("sky", 1.1**4), (".", 1.1)]),
        ("([a)b]", [("a", 1.0), ("b", 1 / 1.1)]),
        ("", [("", 1.0)]),
        ("()", [("", 1.0)]),
        ("<lora:more_details:0.5> a <LORA:x:2>b", [(" a b", 1.0)]),
        ("(a <lora:x:1> b)", [("a  b", 1.1)]),
    ],
)  # fmt: skip
def test_weights(prompt: str, spans: list[tuple[str, float]]) -> None:
    """Brackets nest and multiply, explicit weights replace the factor, what does not pair up is text."""
    parsed = parse(prompt)

    assert [span.text for span in parsed] == [text for text, _ in spans]
    assert [span.weight for span in parsed] == pytest.approx([weight for _, weight in spans])
    assert not any(span.begins_chunk for span in parsed)


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("a BREAK b", [Span("a "), Span("b", 1.0, True)]),
        ("BREAK a", [Span("a", 1.0, True)]),
        ("a BREAK BREAK b", [Span("a "), Span("", 1.0, True), Span("b", 1.0, True)]),
        ("(a BREAK b:2) c", [Span("a ", 2.0), Span("b", 2.0, True), Span(" c")]),
        ("a BREAK (b)", [Span("a "), Span("", 1.0, True), Span("b", 1.1)]),
        ("BREAKFAST, no break", [Span("BREAKFAST, no break")]),
    ],
)
def test_break(prompt: str, spans: list[Span]) -> None:
    """BREAK as a word of its own begins a chunk, inside brackets too."""
    assert parse(prompt) == spans


@given(st.text(alphabet="ab ()[]:.1-\\<>BREAKlora,", max_size=60))
def test_any_text_parses(prompt: str) -> None:
    """No prompt makes the parser fail, and weights stay finite."""
    assert all(-100 <= span.weight <= 100 for span in parse(prompt))


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param("(" * 3000 + "a", id="brackets"),
        pytest.param("a" + " " * 50000 + "b", id="blanks"),
        pytest.param(":" + "1" * 50000, id="digits"),
        pytest.param("(a:9e9" * 900, id="weights"),
        pytest.param("[(" * 900, id="mixed"),
    ],
)
def test_hostile_prompts_take_no_time(prompt: str) -> None:
    """Piles of brackets, blanks and digits are read in linear time."""
    started = time.process_time()

    assert all(abs(span.weight) <= 100 for span in parse(prompt))
    assert time.process_time() - started < 1


@pytest.mark.parametrize("prompt", ["", "a photo", "x" * 75, "café, 100 % <b> 猫"])
def test_plain_prompts_encode_like_the_text_encoder(
    prompt: str, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> None:
    """Without weights and up to 75 tokens the result is the text encoder's own."""
    encoded = encode_prompts([prompt], tokenizer=tokenizer, text_encoder=text_encoder)

    assert encoded.shape == (1, 77, 32)
    assert torch.allclose(encoded, plain(prompt, tokenizer, text_encoder), atol=1e-6)


def test_prompts_are_padded_to_the_same_number_of_chunks(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """A long and a short prompt share a batch: the short one is followed by chunks of nothing."""
    encoded = encode_prompts(["a " * 160, "b"], tokenizer=tokenizer, text_encoder=text_encoder)

    assert encoded.shape == (2, 3 * 77, 32)
    assert torch.allclose(encoded[1, 77:154], plain("", tokenizer, text_encoder)[0], atol=1e-6)
    assert torch.allclose(encoded[:1, :77], plain("a " * 75, tokenizer, text_encoder), atol=1e-6)


def test_long_prompts_are_cut_at_a_near_comma(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """A full chunk ends at its last comma within 20 tokens, and is cut where it is full otherwise."""

    def encode(prompt: str) -> torch.Tensor:
        return encode_prompts([prompt], tokenizer=tokenizer, text_encoder=text_encoder)

    def chunks(*texts: str) -> torch.Tensor:
        return torch.cat([plain(text, tokenizer, text_encoder) for text in texts], dim=1)

    near, far, last = "a " * 55 + ", ", "a " * 54 + ", ", "a " * 75

    assert torch.allclose(encode(near + "b " * 30), chunks(near, "b " * 30), atol=1e-6)
    assert torch.allclose(encode(far + "b " * 30), chunks(far + "b " * 20, "b " * 10), atol=1e-6)
    assert torch.allclose(encode(last + ", b"), chunks(last, ", b"), atol=1e-6)


def test_break_pads_a_chunk(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """What stands on either side of BREAK is encoded apart; a last BREAK adds nothing."""
    encoded = encode_prompts(["a cat BREAK a dog"], tokenizer=tokenizer, text_encoder=text_encoder)
    trailing = encode_prompts(["a cat BREAK"], tokenizer=tokenizer, text_encoder=text_encoder)

    parts = [plain("a cat", tokenizer, text_encoder), plain("a dog", tokenizer, text_encoder)]
    assert torch.allclose(encoded, torch.cat(parts, dim=1), atol=1e-6)
    assert torch.allclose(trailing, parts[0], atol=1e-6)


def test_weights_keep_the_mean_of_the_chunk(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """Emphasis moves the weighted tokens against the others, not the chunk as a whole."""
    weighted = encode_prompts(["(ab:1.5) c"], tokenizer=tokenizer, text_encoder=text_encoder)[0]
    even = plain("ab c", tokenizer, text_encoder)[0]

    ratio = weighted / even
    assert weighted.mean().item() == pytest.approx(even.mean().item(), rel=1e-4)
    assert torch.allclose(ratio[1:3] / ratio[0, 0], torch.tensor(1.5), rtol=1e-3)
    assert torch.allclose(ratio[3:] / ratio[0, 0], torch.tensor(1.0), rtol=1e-3)


def test_the_default_negative_prompt_is_weighted_by_two(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """The negative prompt that clients send by default is one span of weight 2."""
    prompt = "(worst quality, low quality, normal quality:2)"
    weighted = encode_prompts([prompt], tokenizer=tokenizer, text_encoder=text_encoder)[0]
    even = plain(prompt[1:-3], tokenizer, text_encoder)[0]

    ratio = weighted / even
    assert torch.allclose(ratio[1:30] / ratio[0, 0], torch.tensor(2.0), rtol=1e-3)


def test_weights_of_zero_stay_finite(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """A weight of 0 or below is applied as written and gives numbers."""
    encoded = encode_prompts(["(a:0) (b:-2)"], tokenizer=tokenizer, text_encoder=text_encoder)

    assert bool(encoded.isfinite().all())
    assert bool((encoded[0, 1] == 0).all())


@pytest.mark.parametrize("position", [0, 70, 72, 75, 80])
@pytest.mark.parametrize("num_vectors", [1, 4, 75])
def test_embedding_vectors_never_straddle_chunks(
    position: int, num_vectors: int, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> None:
    """All vectors of a textual inversion stand side by side in one chunk, wherever its name is."""
    vectors = torch.arange(1.0, num_vectors + 1)[:, None].expand(-1, 32) * 1000
    seen: list[torch.Tensor] = []
    watch = text_encoder.encoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )

    encode_prompts(
        ["x " * position + "My-Style y"],
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        embeddings={"my-style": vectors},
    )
    watch.remove()

    rows = [(chunk, place) for chunk, embeds in enumerate(seen) for place in range(77) if embeds[0, place].mean() > 500]
    found = [round(seen[chunk][0, place].mean().item() / 1000) for chunk, place in rows]
    assert found == list(range(1, num_vectors + 1))
    assert len({chunk for chunk, _ in rows}) == 1
    assert rows[-1][1] - rows[0][1] == num_vectors - 1 <= CHUNK_TOKENS


def test_embedding_names_are_whole_words(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """A name inside a longer word is that word; the longest of several names wins."""

    def encode(prompt: str, **embeddings: torch.Tensor) -> torch.Tensor:
        return encode_prompts([prompt], tokenizer=tokenizer, text_encoder=text_encoder, embeddings=embeddings)

    one, two = torch.randn(1, 32), torch.randn(2, 32)

    assert torch.equal(encode("a ſtyle", style=one), encode("a STYLE", style=one))
    assert torch.equal(encode("cats, cat-like", cat=one), encode("cats, cat-like"))
    assert not torch.equal(encode("a cat", cat=one), encode("a cat"))
    assert torch.equal(encode("bad cat", cat=one, **{"bad cat": two}), encode("bad cat", **{"bad cat": two}))


def test_an_embedding_of_any_length_is_used_whole(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """More vectors than a chunk has tokens fill chunks of their own, and the last of them still counts."""
    vectors = torch.randn(160, 32, generator=torch.Generator().manual_seed(4))
    other = vectors.clone()
    other[-1] += 1

    def encode(rows: torch.Tensor) -> torch.Tensor:
        return encode_prompts(["neg"], tokenizer=tokenizer, text_encoder=text_encoder, embeddings={"neg": rows})

    assert encode(vectors).shape[1] == 3 * 77
    assert not torch.equal(encode(vectors)[:, 154:], encode(other)[:, 154:])


def test_prompts_without_end_are_refused(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """A long embedding named often, or BREAK after BREAK, would take all memory and hours."""
    long = torch.randn(750, 32)

    for prompt in ("a " * 2000, "BREAK " * 600):
        with pytest.raises(InvalidParams, match="450 chunks"):
            encode_prompts([prompt], tokenizer=tokenizer, text_encoder=text_encoder, embeddings={"a": long})


def test_nothing_stays_behind(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """After a request with an embedding, failed or not, tokenizer and text encoder are as before."""
    before, size = encode_prompts(["neg"], tokenizer=tokenizer, text_encoder=text_encoder), len(tokenizer)
    weights = {name: value.clone() for name, value in text_encoder.state_dict().items()}

    encode_prompts(["neg"], tokenizer=tokenizer, text_encoder=text_encoder, embeddings={"neg": torch.ones(3, 32)})
    with pytest.raises(ValueError, match="32 numbers"):
        encode_prompts(["neg"], tokenizer=tokenizer, text_encoder=text_encoder, embeddings={"neg": torch.ones(3, 8)})
    with pytest.raises(ValueError, match="expected vectors"):
        encode_prompts(["neg"], tokenizer=tokenizer, text_encoder=text_encoder, embeddings={"neg": torch.ones(0, 32)})

    assert len(tokenizer) == size
    assert all(torch.equal(value, weights[name]) for name, value in text_encoder.state_dict().items())
    assert torch.equal(encode_prompts(["neg"], tokenizer=tokenizer, text_encoder=text_encoder), before)


def test_clip_skip_leaves_out_the_last_layers(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """Skipping a layer normalises the hidden state before it."""
    ids = tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    states = text_encoder(ids, output_hidden_states=True).hidden_states

    encoded = encode_prompts(["a cat"], tokenizer=tokenizer, text_encoder=text_encoder, clip_skip=1)

    assert torch.allclose(encoded, text_encoder.final_layer_norm(states[-2]), atol=1e-6)
