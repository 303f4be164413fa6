"""8-bit floating point is refused clearly where it cannot be had."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.errors import ModelsMissing
from pipelines.fp8 import quantize_to_fp8


def test_a_device_without_it_is_named() -> None:
    """A CPU does not compute in 8 bits."""
    with pytest.raises(ModelsMissing, match="this device"):
        quantize_to_fp8(SimpleNamespace(device=torch.device("cpu")))


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao is needed only where the operator asks for it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)

    with pytest.raises(ModelsMissing, match="pip install torchao"):
        quantize_to_fp8(SimpleNamespace(device=torch.device("cuda")))


def test_large_linear_layers_are_quantised_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao is called once, with the layers that are worth it."""
    calls: list[Any] = []
    fake = SimpleNamespace(
        PerRow=lambda: "rows",
        Float8DynamicActivationFloat8WeightConfig=lambda granularity: granularity,
        quantize_=lambda module, config, filter_fn: calls.append((module, config, filter_fn)),
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao.quantization", fake)  # type: ignore[arg-type]
    transformer = SimpleNamespace(device=torch.device("cuda"))

    quantize_to_fp8(transformer)

    (module, config, is_large), linear = calls[0], torch.nn.Linear(2, 2)
    assert module is transformer and config == "rows"
    names = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.norm1.linear", "x_embedder", "proj_out")
    assert [is_large(linear, name) for name in names] == [True, False, False, False]
