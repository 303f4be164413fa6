"""LoRA for one request: layers say more while it runs, and no weight is changed.

Fusing a LoRA into the weights and taking it out again does not give the weights back: in 16 bits a sixth of them has
changed after one round. So a layer's output is added to instead, by a hook that is gone when the request is over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weights.header import UnsuitableFile
from weights.ldm import unet_name, unet_prefixes
from weights.lora import TEXT_ENCODERS, UNET, Change, Difference, Lora

MIN_MATCHED = 0.5
"""Least share of a file's layers that the model must have: below it, the file was made for another model."""


class Adaptable(Protocol):
    """A family of models whose layers can be added to."""

    @property
    def unet(self) -> Any: ...
    @property
    def text_encoders(self) -> Sequence[nn.Module]: ...


Layer = tuple[nn.Module, Change | Difference]
"""A layer, and what is added to it."""


class Match(NamedTuple):
    """The layers of a model that a LoRA changes, and how many of its layers the model has not."""

    layers: list[Layer]
    num_unknown: int


def match(lora: Lora, model: Adaptable, family: str) -> Match:
    """Find the layers of a model that a LoRA was made for.

    Raises:
        UnsuitableFile: It was made for another model: layers are missing or have other shapes. `family` is what the
            model is called in the message.
    """
    made_for = f"was made for {lora.family or 'another model'}, not for {family}"
    layers: list[Layer] = []
    for part in sorted(lora.parts.keys() | lora.differences.keys()):
        names = _names(part, model)
        changes: list[tuple[str, Change | Difference]] = [*lora.parts.get(part, {}).items()]
        for name, change in changes + [*lora.differences.get(part, {}).items()]:
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
def applied(layers: Sequence[Layer], scale: float) -> Iterator[None]:
    """Let layers add their changes, times `scale`, until the end of the block, however it ends.

    A scale of 0 adds nothing at all, so results are those without, bit for bit.
    """
    with ExitStack() as hooks:
        for module, change in layers if scale else ():
            weight = module.weight
            assert isinstance(weight, Tensor)
            hooks.callback(module.register_forward_hook(_Addition(change, scale, like=weight)).remove)
        yield


class _Addition:
    """A forward hook: `output + scale · change(input)`."""

    def __init__(self, change: Change | Difference, scale: float, *, like: Tensor) -> None:
        def there(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(like.device, like.dtype)

        self._factor = scale
        if isinstance(change, Change):
            self._factor *= change.scale
            self._down, self._mid, self._up = there(change.down), there(change.mid), there(change.up)
            self._added = self._low_rank
        else:
            self._bias = there(change.bias)
            self._weight = torch.zeros_like(like) if change.weight is None else there(change.weight).view_as(like)
            self._added = self._difference

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self._added(module, inputs[0]) * self._factor

    def _low_rank(self, module: nn.Module, x: Tensor) -> Tensor:
        if not isinstance(module, nn.Conv2d):
            return F.linear(F.linear(x, self._down.flatten(1)), self._up.flatten(1))
        if self._mid is None:
            x = F.conv2d(x, _as_kernel(self._down), **_geometry(module))
        else:
            x = F.conv2d(F.conv2d(x, _as_kernel(self._down)), self._mid, **_geometry(module))
        return F.conv2d(x, _as_kernel(self._up))

    def _difference(self, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, self._weight, self._bias, module.eps)
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, self._weight, self._bias, module.eps)
        if isinstance(module, nn.Conv2d):
            return F.conv2d(x, self._weight, self._bias, **_geometry(module))
        return F.linear(x, self._weight, self._bias)


def _as_kernel(matrix: Tensor) -> Tensor:
    return matrix if matrix.ndim == 4 else matrix[:, :, None, None]


def _geometry(module: nn.Conv2d) -> dict[str, Any]:
    return {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}


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


def _fits(module: nn.Module, change: Change | Difference) -> bool:
    """Whether a change has the shapes of a layer, which must be a matrix, a convolution or, whole, a normalisation."""
    if isinstance(change, Difference):
        return _fits_whole(module, change)
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


def _fits_whole(module: nn.Module, change: Difference) -> bool:
    if not isinstance(module, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm):
        return False
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return False
    num_out = module.weight.shape[0]
    weight, bias = change.weight, change.bias
    # A 1 x 1 convolution is a matrix to the files of others.
    shapes = (tuple(module.weight.shape), tuple(side for side in module.weight.shape if side != 1))
    return (weight is None or tuple(weight.shape) in shapes) and (bias is None or tuple(bias.shape) == (num_out,))
