"""Transformers in 8-bit floating point by torchao, on cards that compute in it: half the memory.

What torchao publishes is faster than bfloat16 too, but only when compiled; nothing is compiled here.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from pipelines.errors import ModelsMissing

FIRST_CAPABILITY = (8, 9)
"""Ada Lovelace; Hopper is 9.0."""


def quantize_to_fp8(transformer: Any) -> None:
    """Quantise the weights and, from call to call, the inputs of all linear layers, row by row, in place.

    Raises:
        ModelsMissing: The device does not compute in 8 bits, or torchao is not installed.
    """
    device = transformer.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FIRST_CAPABILITY:
        raise ModelsMissing("flux_fp8 is set, but this device does not compute in 8-bit floating point.")
    try:
        torchao = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise ModelsMissing("flux_fp8 is set, but torchao is not installed: pip install torchao") from error
    config = torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow())
    torchao.quantize_(transformer, config, filter_fn=_is_large)


def _is_large(module: torch.nn.Module, name: str) -> bool:
    """Linear layers whose work is worth it; the modulations and embeddings of one vector are not."""
    return isinstance(module, torch.nn.Linear) and "norm" not in name and "embed" not in name and name != "proj_out"
