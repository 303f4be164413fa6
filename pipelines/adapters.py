"""LoRA for one request: layers say more while it runs, and no weight is changed.

Fusing a LoRA into the weights and taking it out again does not give the weights back: in 16 bits a sixth of them has
changed after one round. So a layer's output is added to instead, by a hook that is gone when the request is over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from weights.header import UnsuitableFile
from weights.ldm import unet_name, unet_prefixes
from weights.lora import TEXT_ENCODERS, UNET, Change, Lora, on_device

MIN_MATCHED = 0.5
"""Least share of a file's layers that the model must have: below it, the file was made for another model."""


class Adaptable(Protocol):
    """A family of models whose layers can be added to."""

    @property
    def unet(self) -> Any: ...
    @property
    def text_encoders(self) -> Sequence[nn.Module]: ...


class Match(NamedTuple):
    """The layers of a model that a LoRA changes, and how many of its layers the model has not."""

    layers: list[tuple[nn.Module, Change]]
    num_unknown: int


def match(lora: Lora, model: Adaptable, family: str) -> Match:
    """Find the layers of a model that a LoRA was made for.

    Raises:
        UnsuitableFile: It was made for another model: layers are missing or have other shapes. `family` is what the
            model is called in the message.
    """
    made_for = f"was made for {lora.family or 'another model'}, not for {family}"
    layers = []
    for part, changes in lora.parts.items():
        names = _names(part, model)
        for name, change in changes.items():
            module = names.get(name)
            if module is None:
                continue
            if not _fits(module, change):
                raise UnsuitableFile(f"{made_for}: {name!r} has another shape")
            layers.append((module, change))
    unknown = lora.num_layers - len(layers)
    if len(layers) < MIN_MATCHED * lora.num_layers:
        raise UnsuitableFile(f"{made_for}: {unknown} of its {lora.num_layers} layers are not there")
    return Match(layers, unknown)


@contextmanager
def applied(layers: Sequence[tuple[nn.Module, Change]], scale: float) -> Iterator[None]:
    """Let layers add their changes, times `scale`, until the end of the block, however it ends.

    A scale of 0 adds nothing at all, so results are those without, bit for bit.
    """
    with ExitStack() as hooks:
        for module, change in layers if scale else ():
            weight = module.weight
            assert isinstance(weight, Tensor)
            addition = _Addition(on_device(change, weight.device, weight.dtype), scale * change.scale)
            hooks.callback(module.register_forward_hook(addition).remove)
        yield


class _Addition:
    """A forward hook: `output + factor · up(mid(down(input)))`."""

    def __init__(self, change: Change, factor: float) -> None:
        self._down, self._mid, self._up, self._factor = change.down, change.mid, change.up, factor

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if isinstance(module, nn.Conv2d):
            geometry: dict[str, Any] = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
            if self._mid is None:
                x = F.conv2d(x, self._as_kernel(self._down), **geometry)
            else:
                x = F.conv2d(F.conv2d(x, self._as_kernel(self._down)), self._mid, **geometry)
            added = F.conv2d(x, self._as_kernel(self._up))
        else:
            added = F.linear(F.linear(x, self._down.flatten(1)), self._up.flatten(1))
        return output + added * self._factor

    @staticmethod
    def _as_kernel(matrix: Tensor) -> Tensor:
        return matrix if matrix.ndim == 4 else matrix[:, :, None, None]


def _names(part: str, model: Adaptable) -> dict[str, nn.Module]:
    """The layers of a part under every spelling of their names, with `_` for dots."""
    if part in TEXT_ENCODERS:
        index = TEXT_ENCODERS.index(part)
        if index >= len(model.text_encoders):
            return {}
        return {
            name.removeprefix("text_model.").replace(".", "_"): module
            for name, module in model.text_encoders[index].named_modules()
        }
    assert part == UNET
    found: dict[str, nn.Module] = {}
    prefixes = unet_prefixes(model.unet.config)
    for name, module in model.unet.named_modules():
        found[name.replace(".", "_")] = module
        if (original := unet_name(name, prefixes)) is not None:
            found[original.replace(".", "_")] = module
    return found


def _fits(module: nn.Module, change: Change) -> bool:
    """Whether a change has the shapes of a layer, which must be a matrix or a convolution."""
    num_in, num_out = change.down.shape[1], change.up.shape[0]
    if isinstance(module, nn.Linear):
        # A 1 x 1 convolution is a matrix to the files of others.
        is_matrix = change.mid is None and change.down[0:1, 0:1].numel() == 1
        return is_matrix and (num_in, num_out) == (module.in_features, module.out_features)
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        return False
    kernel = change.down if change.mid is None else change.mid
    size = tuple(kernel.shape[2:]) or (1, 1)
    return (num_in, num_out) == (module.in_channels, module.out_channels) and size == tuple(module.kernel_size)
