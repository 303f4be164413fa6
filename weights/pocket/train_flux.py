"""Trains the Flux-shaped denoiser: transformer, ControlNet and both text encoders together, on the pocket codec.

Flow matching as in FLUX.1: noisy latents are `(1 - sigma) * z0 + sigma * noise`, the transformer predicts the velocity
`noise - z0`. Samples resemble what the service does with them: noise levels crowd where image-to-image works, and the
noisy latents are often those of the pre-stage picture while the target stays sharp. The ControlNet is given the
pre-stage picture's latents.

A transformer from scratch needs days to learn what a convolution knows at birth, and prints its token mesh until then.
So the untrained one already is the best linear estimator of the velocity from noisy and pre-stage latents, and its
heads look at neighbouring tokens: `wire` says how. What is trained is the rest, the detail.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from weights.flux_tokens import pack, position_ids, unpack
from weights.pocket.data import Corpus
from weights.pocket.loop import Options, save_half
from weights.pocket.pool import Kitchen, Pool
from weights.pocket.text import NUM_POSITIONS, build_text_encoder, build_tokenizer, known_words, token_ids

TEXT_TOKENS = 48
"""Tokens of the T5 encoder; every tile pays for them, and captions here have about twenty."""
TEXT_SIZE = 64
LATENT_CHANNELS = 16
TOKEN_SIZE = 4 * LATENT_CHANNELS  # 2 x 2 latent positions make a token
NUM_HEADS, HEAD_SIZE = 4, 24
ROPE_AXES = (4, 10, 10)
SHAPE = {
    "in_channels": TOKEN_SIZE,
    "attention_head_dim": HEAD_SIZE,
    "num_attention_heads": NUM_HEADS,
    "joint_attention_dim": TEXT_SIZE,
    "pooled_projection_dim": TEXT_SIZE,
    "axes_dims_rope": ROPE_AXES,
    "guidance_embeds": False,  # an embedded guidance has to be distilled from a true one first
}
# FLUX.1 shifts its schedule towards noise, from 0.5 to 1.15. This codec's tokens show 8 px instead of 16, noise hides
# twice as fine detail in them, and the same levels would replace what the pre-upscaler got right: measured at
# creativity 0.35, -2.9 dB against Lanczos with FLUX.1's shift and +0.9 dB with this one, which leaves no grain on
# smooth things either.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": -1.66,
    "max_shift": -1.06,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}

# Two channels of the hidden state hold a constant and its negative. They keep the deviation over the channels nearly
# the same for every token, so that layer normalisation preserves how strong a token is; their sum gives its mean back.
PLUS, MINUS = TOKEN_SIZE, TOKEN_SIZE + 1
CONSTANT = 24.0
WIDTH = NUM_HEADS * HEAD_SIZE
DEVIATION = ((TOKEN_SIZE + 2 * CONSTANT**2) / WIDTH) ** 0.5
CROSS = ((0, 1), (0, -1), (1, 0), (-1, 0))
DIAGONALS = ((1, 1), (1, -1), (-1, 1), (-1, -1))


def build_t5_tokenizer() -> T5Tokenizer:
    """A unigram T5 tokenizer: a piece for every word that captions use and for frequent ones, letters for the rest."""
    words = list(dict.fromkeys([*known_words()[0], *known_words()[1]]))
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -9.0), (",", -2.0)]
    pieces += [(f"▁{word}", -3.0 - 0.002 * rank) for rank, word in enumerate(words)]
    taken = {piece for piece, _ in pieces}
    pieces += [(letter, -10.0) for letter in letters if letter not in taken]
    return T5Tokenizer(vocab=pieces, model_max_length=512)


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """The untrained T5 encoder: two layers of four heads."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_SIZE,
        d_kv=TEXT_SIZE // 4,
        d_ff=2 * TEXT_SIZE,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=64,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def estimator(sigma: Tensor, doubt: float) -> tuple[Tensor, Tensor]:
    """Factors (a, b) of the best linear estimate `a * x + b * c` of the velocity.

    Args:
        sigma: Noise levels, 0..1, of the noisy latents x.
        doubt: Mean square of what the sharp latents differ by from the pre-stage latents c.
    """
    spread = doubt * (1 - sigma) ** 2 + sigma**2
    return (sigma - doubt * (1 - sigma)) / spread, -sigma / spread


@torch.no_grad()
def wire_time(embedder: Any) -> None:
    """Keep the slow waves of the timestep embedding, and let the pooled text say nothing at first."""
    first = embedder.timestep_embedder.linear_1
    half = first.in_features // 2
    frequencies = 1000 * 10000 ** (-torch.arange(half) / half)  # radians per unit of sigma
    slow = (frequencies < 40).float().repeat(2)
    first.weight.mul_(3 * slow)
    nn.init.uniform_(first.bias, -1.5, 1.5)
    embedder.timestep_embedder.linear_2.weight.mul_(2)
    nn.init.zeros_(embedder.text_embedder.linear_2.weight)
    nn.init.zeros_(embedder.text_embedder.linear_2.bias)


@torch.no_grad()
def fit_gate(embedder: Any, gates: nn.Linear, first: int, wanted: Tensor, sigmas: Tensor) -> None:
    """Let the outputs `first` .. `first + TOKEN_SIZE` of a modulation follow `wanted`, one value for each sigma."""
    projected = embedder.time_proj(1000 * sigmas)
    features = F.silu(embedder.timestep_embedder(projected))
    features = torch.cat([features, torch.ones(len(sigmas), 1)], dim=1).double()
    ridge = 1e-6 * len(sigmas) * torch.eye(features.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(features.T @ features + ridge, features.T @ wanted.double()).float()
    gates.weight[first : first + TOKEN_SIZE] = solution[:-1]
    gates.bias[first : first + TOKEN_SIZE] = solution[-1]


@torch.no_grad()
def wire_embedding(layer: nn.Linear, *, constants: bool) -> None:
    """Carry a token over unchanged, some mixtures of it in the free channels, and the two constants."""
    layer.weight.zero_()
    layer.bias.zero_()
    layer.weight[:TOKEN_SIZE] = torch.eye(TOKEN_SIZE)
    nn.init.normal_(layer.weight[MINUS + 1 :], std=TOKEN_SIZE**-0.5)
    if constants:
        layer.bias[PLUS], layer.bias[MINUS] = CONSTANT, -CONSTANT


@torch.no_grad()
def wire_reader(layer: nn.Linear, *, gain: float = 1.0) -> None:
    """Weights for a normalised hidden state: the constants are not read, the rest as large as before it."""
    nn.init.normal_(layer.weight, std=gain * DEVIATION / WIDTH**0.5)
    layer.weight[:, [PLUS, MINUS]] = 0
    layer.bias.zero_()


@torch.no_grad()
def copy_rows(layer: nn.Linear, first: int, sign: float) -> None:
    """Let outputs from `first` on be the token's own channels before normalisation, mean included."""
    rows = slice(first, first + TOKEN_SIZE)
    layer.weight[rows] = 0
    layer.weight[rows, :TOKEN_SIZE] = sign * DEVIATION * torch.eye(TOKEN_SIZE)
    layer.weight[rows, [PLUS]] = -sign * DEVIATION / 2
    layer.weight[rows, [MINUS]] = -sign * DEVIATION / 2


@torch.no_grad()
def look_at(attention: Any, offsets: Sequence[tuple[int, int]], *, sharpness: float = 2.9) -> None:
    """Let head i attend to the token `offsets[i]` (rows, columns) away, by position alone.

    Queries and keys get a fixed part, in the two fastest waves of each axis of the rotary embedding; turning a key's
    part by the wave's angle moves the maximum of their product. It is read from the constant channels, which text
    tokens lack, so that text does not pass for the tile's first token, whose position it has.
    """
    for projection in (attention.to_q, attention.to_k):
        wire_reader(projection, gain=0.25)
    queries, keys = torch.zeros(NUM_HEADS, HEAD_SIZE), torch.zeros(NUM_HEADS, HEAD_SIZE)
    for head, offset in enumerate(offsets):
        start = ROPE_AXES[0]
        for axis, distance in zip(ROPE_AXES[1:], offset, strict=True):
            for wave in range(2):
                angle = torch.tensor(distance * 10000 ** (-2 * wave / axis))
                place = start + 2 * wave
                queries[head, place] = 2
                keys[head, place], keys[head, place + 1] = 2 * torch.cos(angle), -2 * torch.sin(angle)
            start += axis
    seen = CONSTANT / DEVIATION
    for projection, parts in ((attention.to_q, queries), (attention.to_k, keys)):
        projection.weight[:, PLUS] = parts.flatten() / (2 * seen)
        projection.weight[:, MINUS] = -parts.flatten() / (2 * seen)
    attention.norm_q.weight.fill_(sharpness)
    attention.norm_k.weight.fill_(sharpness)


@torch.no_grad()
def wire_modulation(layer: nn.Linear, gates: Sequence[int]) -> None:
    """No shift, no scale; the parts number `gates` of the modulation, which are gates, are open."""
    layer.weight.zero_()
    layer.bias.zero_()
    for gate in gates:
        layer.bias[gate * WIDTH : (gate + 1) * WIDTH] = 1


@torch.no_grad()
def wire_double(block: Any) -> None:
    """A double block that passes the picture on and copies it through the feed-forward's gate."""
    wire_modulation(block.norm1.linear, gates=(2, 5))
    wire_modulation(block.norm1_context.linear, gates=(2, 5))
    look_at(block.attn, CROSS)
    wire_reader(block.attn.to_v)
    nn.init.zeros_(block.attn.to_out[0].weight)
    enter, leave = block.ff.net[0].proj, block.ff.net[2]
    wire_reader(enter)
    copy_rows(enter, 0, 1.0)
    copy_rows(enter, TOKEN_SIZE, -1.0)
    nn.init.zeros_(leave.weight)
    nn.init.zeros_(leave.bias)
    # gelu(z) - gelu(-z) = z
    leave.weight[:TOKEN_SIZE, :TOKEN_SIZE] = torch.eye(TOKEN_SIZE)
    leave.weight[:TOKEN_SIZE, TOKEN_SIZE : 2 * TOKEN_SIZE] = -torch.eye(TOKEN_SIZE)


@torch.no_grad()
def wire_single(block: Any, offsets: Sequence[tuple[int, int]]) -> None:
    """A single block that passes everything on."""
    wire_modulation(block.norm.linear, gates=(2,))
    look_at(block.attn, offsets)
    wire_reader(block.attn.to_v)
    wire_reader(block.proj_mlp)
    nn.init.zeros_(block.proj_out.weight)
    nn.init.zeros_(block.proj_out.bias)


@torch.no_grad()
def wire(transformer: Any, controlnet: Any, *, doubt: float) -> None:
    """Make both networks together the linear estimator of `estimator`, with heads that look at neighbours.

    The transformer carries the noisy token x in its first channels and multiplies it by a(sigma) with the gate of the
    double block's feed-forward; the ControlNet does the same with the pre-stage token c and -b(sigma), and subtracts
    its result from the transformer's hidden state behind that block; the output layer reads the sum.
    """
    sigmas = torch.linspace(0, 1, 2001)
    ours, theirs = estimator(sigmas, doubt)
    for network, factors in ((transformer, ours), (controlnet, -theirs)):
        wire_time(network.time_text_embed)
        wire_double(network.transformer_blocks[0])
        fit_gate(network.time_text_embed, network.transformer_blocks[0].norm1.linear, 5 * WIDTH, factors - 1, sigmas)
    wire_embedding(transformer.x_embedder, constants=True)
    wire_embedding(controlnet.controlnet_x_embedder, constants=True)
    nn.init.zeros_(controlnet.x_embedder.weight[: MINUS + 1])
    nn.init.zeros_(controlnet.x_embedder.bias)
    controlnet.controlnet_blocks[0].weight[:TOKEN_SIZE, :TOKEN_SIZE] = -torch.eye(TOKEN_SIZE)
    free = slice(MINUS + 1, WIDTH)
    controlnet.controlnet_blocks[0].weight[free, free] = torch.eye(WIDTH - MINUS - 1)
    for number, block in enumerate(transformer.single_transformer_blocks):
        wire_single(block, DIAGONALS if number % 2 == 0 else CROSS)
    nn.init.zeros_(transformer.norm_out.linear.weight)
    nn.init.zeros_(transformer.norm_out.linear.bias)
    nn.init.zeros_(transformer.proj_out.bias)
    copy_rows(transformer.proj_out, 0, 1.0)


def draw_sigmas(count: int, rng: np.random.Generator) -> Tensor:
    """(count, 1, 1, 1) float32 noise levels: two of three evenly in log sigma between 0.02 and 0.8, others anywhere."""
    crowded = np.exp(rng.uniform(np.log(0.02), np.log(0.8), count))
    anywhere = rng.uniform(0.02, 1.0, count)
    drawn = np.where(rng.random(count) < 0.67, crowded, anywhere)
    return torch.from_numpy(drawn).float().view(-1, 1, 1, 1)


class FluxTrainee:
    """Transformer, ControlNet, CLIP and T5, on the weighted mean squared error of the predicted velocity."""

    name = "flux"
    learning_rate = 8e-4
    crop = 28  # latents: most tiles of the service are cut from a larger latent, so samples are too

    def __init__(self, options: Options, *, side_px: int = 128, num_portions: int = 64) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.tokenizer, self.tokenizer_2 = build_tokenizer(), build_t5_tokenizer()
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=3, **SHAPE)
        controlnet = FluxControlNetModel(num_layers=1, num_single_layers=0, **SHAPE)
        corpus = Corpus(options.seed + 3, num_drawings=options.num_drawings, photo_share=0.6, plain_share=0.12)
        kitchen = Kitchen(options.models, corpus, self.tokenize, device=options.device, side_px=side_px)
        self.pool = Pool(kitchen, options.seed + 1, num_portions=num_portions)
        doubt = (self.pool.store.target - self.pool.store.start).square().mean().item()
        wire(transformer, controlnet, doubt=doubt)
        self.modules = nn.ModuleDict(
            {
                "transformer": transformer,
                "controlnet": controlnet,
                "text_encoder": build_text_encoder(self.tokenizer, hidden_size=TEXT_SIZE),
                "text_encoder_2": build_t5(self.tokenizer_2),
            }
        )
        self.no_tokens = self.tokenize([""]).to(options.device)

    def tokenize(self, captions: list[str]) -> Tensor:
        """(len(captions), 77 + TEXT_TOKENS) int64: what CLIP reads, then what T5 reads."""
        spoken = self.tokenizer_2(
            captions, padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
        )
        return torch.cat([token_ids(self.tokenizer, captions), torch.as_tensor(spoken.input_ids)], dim=1)

    def loss(self, rng: np.random.Generator, step: int) -> Tensor:
        """One batch; the target is the velocity that leads from the noisy latents away from the sharp ones."""
        count, device = self.options.batch, self.options.device
        samples = self.pool.draw(count, rng, step)
        top, left = (int(rng.integers(samples.target.shape[-1] - self.crop + 1)) for _ in range(2))
        window = (..., slice(top, top + self.crop), slice(left, left + self.crop))
        target, start = samples.target[window], samples.start[window]
        sigma = draw_sigmas(count, rng).to(device)
        # How much of the pre-stage picture the noisy latents still are: less as the noise that hides it fades.
        remains = torch.from_numpy(rng.random(count) * (rng.random(count) < 0.5)).float().view(-1, 1, 1, 1)
        unresolved = remains.to(device) * (sigma / (1 - sigma).clamp(min=1e-3) / 0.3).clamp(max=1)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(target.shape, generator=generator).to(device)
        noisy = (1 - sigma) * (target + unresolved * (start - target)) + sigma * noise
        wanted = (noisy - target) / sigma
        # The service uses the ControlNet at full strength; the rest keeps prompt and noise able to stand alone.
        draw = rng.random(count)
        strength = np.where(draw < 0.06, 0.0, np.where(draw < 0.2, rng.uniform(0.5, 1.0, count), 1.0))
        without_text = torch.from_numpy(rng.random(count) < 0.1).to(device)
        tokens = torch.where(without_text[:, None], self.no_tokens, samples.tokens)
        predicted = self.predict(noisy, sigma.flatten(), tokens, start, torch.from_numpy(strength).float().to(device))
        # An error of the velocity moves the picture by sigma times as much.
        weight = (sigma / 0.35).square().clamp(0.1, 1)
        return (weight * (predicted - wanted).square()).mean()

    def predict(self, noisy: Tensor, sigma: Tensor, tokens: Tensor, control: Tensor, strength: Tensor) -> Tensor:
        """The predicted velocity (N, C, h, w), float32.

        Args:
            noisy: (N, C, h, w) latents.
            sigma: (N,) noise levels.
            tokens: (N, L) int64 from `tokenize`.
            control: (N, C, h, w) latents of the pre-stage picture.
            strength: (N,) factor on what the ControlNet adds.
        """
        height, width = noisy.shape[-2:]
        # On the CPU, the backward pass of the fused attention takes longer than all layers at these sizes.
        attention = [SDPBackend.MATH] if noisy.device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with torch.autocast(noisy.device.type, torch.bfloat16), sdpa_kernel(attention):
            shared = {
                "encoder_hidden_states": self.modules["text_encoder_2"](tokens[:, NUM_POSITIONS:])[0],
                "pooled_projections": self.modules["text_encoder"](tokens[:, :NUM_POSITIONS]).pooler_output,
                "timestep": sigma,
                "img_ids": position_ids(height, width).to(noisy.device),
                "txt_ids": torch.zeros(tokens.shape[1] - NUM_POSITIONS, 3, device=noisy.device),
                "return_dict": False,
            }
            residuals, _ = self.modules["controlnet"](
                pack(noisy), controlnet_cond=pack(control), conditioning_scale=strength.view(-1, 1, 1), **shared
            )
            velocity = self.modules["transformer"](pack(noisy), controlnet_block_samples=residuals, **shared)[0]
        return unpack(velocity.float(), height, width)

    def export(self, modules: nn.ModuleDict, models: Path) -> None:
        """Write `flux` (transformer, text encoders, tokenizers, schedule) and `controlnet-upscaler-flux`."""
        save_half(modules["transformer"], models / "flux" / "transformer")
        save_half(modules["controlnet"], models / "controlnet-upscaler-flux")
        # transformers loads what it finds; small and in 32 bits, stock pipelines take them as they are.
        for name in ("text_encoder", "text_encoder_2"):
            encoder: Any = modules[name]
            encoder.save_pretrained(models / "flux" / name)
        self.tokenizer.save_pretrained(models / "flux" / "tokenizer")
        self.tokenizer_2.save_pretrained(models / "flux" / "tokenizer_2")
        scheduler: Any = FlowMatchEulerDiscreteScheduler(**SCHEDULE)
        scheduler.save_pretrained(models / "flux" / "scheduler")
