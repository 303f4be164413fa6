"""Names and shapes of a CCSR checkpoint, as the original latent diffusion and OpenCLIP code builds its modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Shapes = dict[str, tuple[int, ...]]


def conv(name: str, inputs: int, outputs: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


def linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def res_block(name: str, inputs: int, outputs: int, time: int) -> Shapes:
    shapes = norm(f"{name}.in_layers.0", inputs) | conv(f"{name}.in_layers.2", inputs, outputs)
    shapes |= linear(f"{name}.emb_layers.1", time, outputs)
    shapes |= norm(f"{name}.out_layers.0", outputs) | conv(f"{name}.out_layers.3", outputs, outputs)
    return shapes | (conv(f"{name}.skip_connection", inputs, outputs, 1) if inputs != outputs else {})


def transformer(name: str, channels: int, text: int) -> Shapes:
    """A SpatialTransformer with linear projections and one block."""
    shapes = norm(f"{name}.norm", channels)
    shapes |= linear(f"{name}.proj_in", channels, channels) | linear(f"{name}.proj_out", channels, channels)
    block = f"{name}.transformer_blocks.0"
    for attention, width in (("attn1", channels), ("attn2", text)):
        shapes |= linear(f"{block}.{attention}.to_q", channels, channels, bias=False)
        shapes |= linear(f"{block}.{attention}.to_k", width, channels, bias=False)
        shapes |= linear(f"{block}.{attention}.to_v", width, channels, bias=False)
        shapes |= linear(f"{block}.{attention}.to_out.0", channels, channels)
    shapes |= linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
    shapes |= linear(f"{block}.ff.net.2", 4 * channels, channels)
    for number in (1, 2, 3):
        shapes |= norm(f"{block}.norm{number}", channels)
    return shapes


class Encoder:
    """The first half of a UNet, as UNetModel and ControlNet build it; keeps the channels of its skips."""

    def __init__(self, inputs: int, widths: Sequence[int], attention: Sequence[bool], layers: int, text: int) -> None:
        self.time = 4 * widths[0]
        self.shapes = linear("time_embed.0", widths[0], self.time) | linear("time_embed.2", self.time, self.time)
        self.shapes |= conv("input_blocks.0.0", inputs, widths[0])
        self.skips = [widths[0]]
        channels = widths[0]
        for level, width in enumerate(widths):
            for _ in range(layers):
                name = f"input_blocks.{len(self.skips)}"
                self.shapes |= res_block(f"{name}.0", channels, width, self.time)
                if attention[level]:
                    self.shapes |= transformer(f"{name}.1", width, text)
                channels = width
                self.skips.append(channels)
            if level < len(widths) - 1:
                self.shapes |= conv(f"input_blocks.{len(self.skips)}.0.op", channels, channels)
                self.skips.append(channels)
        self.shapes |= res_block("middle_block.0", channels, channels, self.time)
        self.shapes |= transformer("middle_block.1", channels, text)
        self.shapes |= res_block("middle_block.2", channels, channels, self.time)


def unet(widths: Sequence[int], attention: Sequence[bool], layers: int, text: int, latents: int) -> Shapes:
    encoder = Encoder(latents, widths, attention, layers, text)
    shapes, channels, place = encoder.shapes, widths[-1], 0
    for level in reversed(range(len(widths))):
        for layer in range(layers + 1):
            name, rest = f"output_blocks.{place}", 1
            shapes |= res_block(f"{name}.0", channels + encoder.skips.pop(), widths[level], encoder.time)
            channels = widths[level]
            if attention[level]:
                shapes |= transformer(f"{name}.1", channels, text)
                rest = 2
            if level > 0 and layer == layers:
                shapes |= conv(f"{name}.{rest}.conv", channels, channels)
            place += 1
    return shapes | norm("out.0", widths[0]) | conv("out.2", widths[0], latents)


def controlnet(widths: Sequence[int], attention: Sequence[bool], layers: int, text: int, latents: int) -> Shapes:
    encoder = Encoder(2 * latents, widths, attention, layers, text)
    shapes = encoder.shapes
    for number, channels in enumerate(encoder.skips):
        shapes |= conv(f"zero_convs.{number}.0", channels, channels, 1)
    return shapes | conv("middle_block_out.0", widths[-1], widths[-1], 1)


def vae_block(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = norm(f"{name}.norm1", inputs) | conv(f"{name}.conv1", inputs, outputs)
    shapes |= norm(f"{name}.norm2", outputs) | conv(f"{name}.conv2", outputs, outputs)
    return shapes | (conv(f"{name}.nin_shortcut", inputs, outputs, 1) if inputs != outputs else {})


def vae_middle(name: str, channels: int) -> Shapes:
    shapes = vae_block(f"{name}.mid.block_1", channels, channels) | vae_block(f"{name}.mid.block_2", channels, channels)
    shapes |= norm(f"{name}.mid.attn_1.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= conv(f"{name}.mid.attn_1.{part}", channels, channels, 1)
    return shapes


def vae_encoder(widths: Sequence[int], layers: int, latents: int) -> Shapes:
    shapes, channels = conv("encoder.conv_in", 3, widths[0]), widths[0]
    for level, width in enumerate(widths):
        for layer in range(layers):
            shapes |= vae_block(f"encoder.down.{level}.block.{layer}", channels, width)
            channels = width
        if level < len(widths) - 1:
            shapes |= conv(f"encoder.down.{level}.downsample.conv", channels, channels)
    shapes |= vae_middle("encoder", channels) | norm("encoder.norm_out", channels)
    return shapes | conv("encoder.conv_out", channels, 2 * latents) | conv("quant_conv", 2 * latents, 2 * latents, 1)


def vae(widths: Sequence[int], layers: int, latents: int) -> Shapes:
    shapes, channels = vae_encoder(widths, layers, latents), widths[-1]
    shapes |= conv("post_quant_conv", latents, latents, 1) | conv("decoder.conv_in", latents, channels)
    shapes |= vae_middle("decoder", channels)
    for level in reversed(range(len(widths))):
        for layer in range(layers + 1):
            shapes |= vae_block(f"decoder.up.{level}.block.{layer}", channels, widths[level])
            channels = widths[level]
        if level > 0:
            shapes |= conv(f"decoder.up.{level}.upsample.conv", channels, channels)
    return shapes | norm("decoder.norm_out", channels) | conv("decoder.conv_out", channels, 3)


def open_clip(width: int, layers: int, vocabulary: int) -> Shapes:
    shapes: Shapes = {
        "token_embedding.weight": (vocabulary, width),
        "positional_embedding": (77, width),
        "text_projection": (width, width),
        "logit_scale": (),
        "attn_mask": (77, 77),
    }
    for layer in range(layers):
        row = f"transformer.resblocks.{layer}"
        shapes |= norm(f"{row}.ln_1", width) | norm(f"{row}.ln_2", width)
        shapes |= {f"{row}.attn.in_proj_weight": (3 * width, width), f"{row}.attn.in_proj_bias": (3 * width,)}
        shapes |= linear(f"{row}.attn.out_proj", width, width)
        shapes |= linear(f"{row}.mlp.c_fc", width, 4 * width) | linear(f"{row}.mlp.c_proj", 4 * width, width)
    return shapes | norm("ln_final", width)


def ccsr_checkpoint(
    *, unet_config: Mapping[str, Any], vae_config: Mapping[str, Any], text_width: int, text_layers: int, vocabulary: int
) -> Shapes:
    """All tensors of a checkpoint by name, the unused ones too."""

    def prefixed(prefix: str, shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
        return ((prefix + name, shape) for name, shape in shapes.items())

    widths, latents = unet_config["block_out_channels"], vae_config["latent_channels"]
    kinds = unet_config.get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    attention, layers = ["Attn" in kind for kind in kinds], unet_config.get("layers_per_block", 2)
    text = unet_config["cross_attention_dim"]
    vae_widths, vae_layers = vae_config["block_out_channels"], vae_config["layers_per_block"]
    return dict(
        [
            *prefixed("model.diffusion_model.", unet(widths, attention, layers, text, latents)),
            *prefixed("control_model.", controlnet(widths, attention, layers, text, latents)),
            *prefixed("first_stage_model.", vae(vae_widths, vae_layers, latents)),
            *prefixed("cond_encoder.", vae_encoder(vae_widths, vae_layers, latents)),
            *prefixed("cond_stage_model.model.", open_clip(text_width, text_layers, vocabulary)),
            ("decoder_loss.logvar", ()),
            ("betas", (1000,)),
            ("alphas_cumprod_inter", (45,)),
        ]
    )
