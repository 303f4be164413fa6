"""Files of super-resolution networks as people publish them: which network is in one, and that network, loaded.

RRDBNet and Compact are read here; what else spandrel knows is read through it where it is installed (it needs
torchvision, so it is not installed by default).
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from weights.compact import Compact
from weights.rrdbnet import UnsuitableNetwork, is_rrdbnet, rrdbnet_of

SUFFIXES = (".safetensors", ".pth")
_WRAPPERS = ("params_ema", "params-ema", "params", "model_state_dict", "state_dict", "model")
"""Keys under which training scripts put the tensors they saved; the averaged ones first."""


class Network(Protocol):
    """Enlarges (B, 3, H, W), 0..1, by the whole factor `upscale`."""

    upscale: int

    def __call__(self, image: Tensor) -> Tensor: ...


def load_network(file: Path) -> nn.Module:
    """Load the super-resolution network in a file; it has `upscale`, see `Network`.

    Args:
        file: `.safetensors`, or `.pth`, of which only tensors are read (torch's `weights_only`).

    Returns:
        The network in float32, in evaluation mode, on the CPU.

    Raises:
        UnsuitableNetwork: It is none that can be read.
    """
    tensors = read_tensors(file)
    build = next((build for recognises, build in _NETWORKS if recognises(tensors)), None)
    if build is None:
        return _through_spandrel(
            file,
            f"{file.name} is neither an RRDB (ESRGAN, Real-ESRGAN) nor a Compact network. Install spandrel to read "
            "other architectures.",
        )
    try:
        return build(tensors)
    except UnsuitableNetwork as error:  # one of their many variants
        return _through_spandrel(file, str(error))


def find_network(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> Path | None:
    """The one network file in a folder; None where there is none.

    Raises:
        UnsuitableNetwork: There are several.
    """
    files = sorted(file for file in folder.glob("*") if file.suffix in suffixes)
    if len(files) > 1:
        raise UnsuitableNetwork(f"expected one file, found {', '.join(file.name for file in files)}.")
    return files[0] if files else None


def read_tensors(file: Path, *, with_classes: bool = False) -> dict[str, Tensor]:
    """The tensors of a file, without the wrappings that training scripts leave around them.

    Args:
        file: Safetensors, or a pickle, of which only tensors are read.
        with_classes: Accept a pickle that names classes beside its tensors, as the checkpoints of training frameworks
            do; none of them is imported, let alone called.

    Raises:
        UnsuitableNetwork: The file cannot be read, or holds no tensors by name.
    """
    loaded: Any = _safetensors(file) if file.suffix == ".safetensors" else _unpickled(file, with_classes=with_classes)
    while isinstance(loaded, Mapping) and (key := next((key for key in _WRAPPERS if key in loaded), None)):
        loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UnsuitableNetwork(f"{file.name} holds no tensors by name.")
    return {name.removeprefix("module."): tensor for name, tensor in loaded.items()}


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UnsuitableNetwork(f"{file.name} is no safetensors file, or a damaged one: {error}") from error


class _Inert:
    """Stands for a class that a checkpoint names: takes whatever is handed to it and does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _unpickled(file: Path, *, with_classes: bool) -> Any:
    try:
        # Of files from before torch 1.6, which are no archives, torch does not list the classes.
        with_classes = with_classes and zipfile.is_zipfile(file)
        named = torch.serialization.get_unsafe_globals_in_checkpoint(file) if with_classes else []
        with torch.serialization.safe_globals([(_Inert, name) for name in named]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a pickle leads to
        raise UnsuitableNetwork(f"{file.name} holds more than tensors, or is damaged: {error}") from error


def is_compact(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are a Compact network's: nothing but `body.N`, from a convolution to a convolution."""
    return "body.0.weight" in tensors and all(re.fullmatch(r"body\.\d+\.(weight|bias)", name) for name in tensors)


def compact_of(tensors: Mapping[str, Tensor]) -> Compact:
    """Build the Compact network that a file's tensors describe (realesr-general-x4v3 and its like), and fill it.

    Raises:
        UnsuitableNetwork: It is of a variant that is not read here.
    """
    convs = sorted(int(name.split(".")[1]) for name, tensor in tensors.items() if tensor.ndim == 4)
    if len(convs) < 2 or convs[0] != 0:
        raise UnsuitableNetwork("The tensors are not those of a Compact network: there are not enough convolutions.")
    first, last = tensors["body.0.weight"], tensors[f"body.{convs[-1]}.weight"]
    upscale = math.isqrt(last.shape[0] // first.shape[1])
    if first.shape[1] != 3 or last.shape[0] != 3 * upscale**2 or upscale < 1:
        raise UnsuitableNetwork(
            f"Expected a network from 3 channels to 3; this one has {first.shape[1]} and {last.shape[0]} before its "
            "pixels are shuffled."
        )
    try:
        model = Compact(
            num_in_ch=first.shape[1],
            num_out_ch=first.shape[1],
            num_feat=first.shape[0],
            num_conv=len(convs) - 2,
            upscale=upscale,
        )
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except RuntimeError as error:
        raise UnsuitableNetwork(f"The tensors are not those of a Compact network: {error}") from error
    return model.eval()


_NETWORKS: Sequence[tuple[Callable[[Mapping[str, Tensor]], bool], Callable[[Mapping[str, Tensor]], nn.Module]]] = (
    (is_rrdbnet, rrdbnet_of),
    (is_compact, compact_of),
)


class _Spandrel(nn.Module):
    """A network that spandrel loaded, in the words of ours.

    Called through its descriptor, which pads pictures to the sizes that the architecture takes, and cuts them again.
    """

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.model, self.upscale, self._call = descriptor.model, int(descriptor.scale), descriptor

    def forward(self, image: Tensor) -> Tensor:
        """See `Network`."""
        enlarged: Tensor = self._call(image)
        return enlarged


def _through_spandrel(file: Path, otherwise: str) -> nn.Module:
    """The network in a file as spandrel reads it; without spandrel the error says `otherwise`."""
    try:
        import spandrel
    except ImportError as error:
        raise UnsuitableNetwork(otherwise) from error
    try:
        descriptor: Any = spandrel.ModelLoader(device="cpu").load_from_file(file)
    except Exception as error:  # spandrel raises whatever a file leads to
        raise UnsuitableNetwork(f"{file.name} is no network that spandrel reads: {error}") from error
    if not isinstance(descriptor, spandrel.ImageModelDescriptor) or descriptor.input_channels != 3:
        raise UnsuitableNetwork(f"{file.name} does not enlarge colour pictures.")
    return _Spandrel(descriptor).eval()
