"""LoRA on layers that keep their weights: equal to diffusers' own, gone afterwards."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from pipelines.adapters import applied, match
from tests.pipelines.test_full_size import on_meta
from tests.weights.lora_files import ALPHA, RANK, Pair, before_peft, kohya, peft, random_changes, sdxl_kohya, written
from weights.header import UnsuitableFile
from weights.lora import Change, Difference, read_lora
from weights.store import WeightStore


def weights_hash(modules: Iterable[nn.Module]) -> str:
    """SHA-256 of every number of these modules."""
    digest = hashlib.sha256()
    for module in modules:
        for tensor in module.state_dict().values():
            digest.update(tensor.contiguous().numpy(force=True).tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def family(pocket: WeightStore) -> Any:
    from pipelines.sd15 import StableDiffusion15

    return StableDiffusion15.load(
        pocket.folder("sd15"), pocket.folder("controlnet-tile-sd15"), device=torch.device("cpu"), dtype=torch.float32
    )


SPELLINGS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "kohya": lambda changes, config: kohya(changes),
    "kohya, original numbers": kohya,
    "peft": lambda changes, config: peft(changes),
    "before peft": lambda changes, config: before_peft(changes),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_finds_every_layer(family: Any, tmp_path: Path, spelling: str) -> None:
    """Each way to name layers leads to the same layers, with the same products."""
    changes = random_changes(family)
    tensors = SPELLINGS[spelling](changes, family.unet.config)
    path = written(tensors, tmp_path / "lora.safetensors")

    found = match(read_lora(path), family, "Stable Diffusion 1.5")

    names = {
        id(module): (part, name.removeprefix("text_model."))
        for part, root in (("unet", family.unet), ("text_encoder", family.text_encoders[0]))
        for name, module in root.named_modules()
    }
    assert found.num_unknown == 0 and len(found.layers) == len(changes)
    for module, change in found.layers:
        assert isinstance(change, Change)
        pair = changes[names[id(module)]]
        ours = change.scale * (change.up.flatten(1) @ change.down.flatten(1))
        assert torch.allclose(ours, ALPHA / RANK * (pair.up.flatten(1) @ pair.down.flatten(1)), atol=1e-6)


def test_a_file_for_text_encoders_alone_is_taken(family: Any, tmp_path: Path) -> None:
    """A file need not change every part, nor every layer of one."""
    changes = dict(list(random_changes(family, unet=False).items())[:2])

    found = match(read_lora(written(kohya(changes), tmp_path / "x")), family, "Stable Diffusion 1.5")

    assert len(found.layers) == 2


@pytest.mark.parametrize(
    ("family", "spelling"),
    [("sd15", "diffusers' names"), ("sdxl", "diffusers' names"), ("sdxl", "SDXL's own numbers")],
)
def test_every_layer_of_the_published_models_is_found(
    pocket: WeightStore, tmp_path: Path, family: str, spelling: str
) -> None:
    """A file that changes all matrices and convolutions of a full-size model, as kohya's trainer names them."""
    tokenizer = CLIPTokenizer.from_pretrained(pocket.folder("sd15") / "tokenizer", local_files_only=True)
    model, _ = on_meta(family, tokenizer)
    changes = {}
    roots = zip(("unet", "text_encoder", "text_encoder_2"), (model.unet, *model.text_encoders), strict=False)
    for part, root in roots:
        for name, layer in root.named_modules():
            is_embedding = name.startswith(("time_embedding", "add_embedding"))  # kohya's trainer leaves them out
            if isinstance(layer, nn.Linear | nn.Conv2d) and not is_embedding:
                num_out, num_in, *kernel = layer.weight.shape
                pair = Pair(torch.zeros(1, num_in, *kernel), torch.zeros(num_out, 1, *[1] * len(kernel)))
                changes[part, name.removeprefix("text_model.")] = pair
    tensors = kohya(changes) if spelling == "diffusers' names" else sdxl_kohya(changes, layers_per_block=2)

    found = match(read_lora(written(tensors, tmp_path / "lora.safetensors")), model, family)

    assert found.num_unknown == 0
    assert len({id(module) for module, _ in found.layers}) == len(found.layers) == len(changes) > 200


LAYERS = {
    "linear": nn.Linear(6, 5),
    "convolution": nn.Conv2d(6, 5, 3, padding=1),
    "strided": nn.Conv2d(6, 5, 3, stride=2, padding=1),
    "pointwise": nn.Conv2d(6, 5, 1),
}


@pytest.mark.parametrize("as_matrix", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_change_equals_a_changed_weight(kind: str, as_matrix: bool) -> None:
    """What the hook adds is what the product added to the weight would."""
    layer = LAYERS[kind]
    kernel = () if kind == "linear" or (as_matrix and kind == "pointwise") else layer.weight.shape[2:]
    down, up = torch.randn(2, 6, *kernel), torch.randn(5, 2, *[1] * len(kernel))
    x = torch.randn(2, 6) if kind == "linear" else torch.randn(2, 6, 8, 8)
    plain = layer(x)
    product = (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
    with torch.no_grad():
        layer.weight += 0.7 * 0.5 * product
        expected = layer(x)
        layer.weight -= 0.7 * 0.5 * product

    with applied([(layer, Change(down=down, up=up, mid=None, scale=0.5))], 0.7):
        ours = layer(x)

    assert torch.allclose(ours, expected, atol=1e-4) and not torch.allclose(ours, plain, atol=1e-2)


def test_a_decomposed_convolution_is_three(family: Any) -> None:
    """LoCon's third factor lies between the other two and carries the kernel."""
    layer = nn.Conv2d(6, 5, 3, stride=2, padding=1, bias=False)
    down, mid, up = torch.randn(2, 6, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(5, 2, 1, 1)
    x = torch.randn(1, 6, 9, 9)
    product = torch.einsum("or,rskl,si->oikl", up[..., 0, 0], mid, down[..., 0, 0])
    expected = layer(x) + nn.functional.conv2d(x, product, stride=2, padding=1)

    with applied([(layer, Change(down=down, up=up, mid=mid, scale=1.0))], 1.0):
        assert torch.allclose(layer(x), expected, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, stride=2, padding=1), nn.GroupNorm(2, 6), nn.LayerNorm(6)],
    ids=["linear", "convolution", "group norm", "layer norm"],
)
@pytest.mark.parametrize("parts", [("weight", "bias"), ("weight",), ("bias",)], ids="-".join)
def test_a_difference_equals_a_changed_layer(layer: Any, parts: tuple[str, ...]) -> None:
    """Whole weights, biases and normalisations can be added to as well; the layer itself stays as it is."""
    x = torch.randn(2, 6, 9, 9) if isinstance(layer, nn.Conv2d | nn.GroupNorm) else torch.randn(2, 6)
    changes = {part: torch.randn_like(getattr(layer, part)) for part in parts}
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        for part, change in changes.items():
            getattr(changed, part).add_(0.7 * change)

    difference = Difference(weight=changes.get("weight"), bias=changes.get("bias"))
    with applied([(layer, difference)], 0.7):
        ours = layer(x)

    assert torch.allclose(ours, changed(x), atol=1e-5) and not torch.allclose(ours, layer(x), atol=1e-2)


def test_differences_are_found_by_every_name(family: Any, tmp_path: Path) -> None:
    """In kohya's and LyCORIS' names, next to a LoRA of the same layer; a wrong shape is the wrong model."""
    unet = family.unet
    norm, conv = unet.down_blocks[0].resnets[0].norm1, unet.conv_in
    tensors = {
        "lora_unet_down_blocks_0_resnets_0_norm1.w_norm": torch.randn_like(norm.weight),
        "lora_unet_down_blocks_0_resnets_0_norm1.b_norm": torch.randn_like(norm.bias),
        "lora_unet_input_blocks_0_0.diff": torch.randn_like(conv.weight),
        "lora_unet_input_blocks_0_0.diff_b": torch.randn_like(conv.bias),
        "lora_unet_conv_in.lora_down.weight": torch.randn(2, conv.in_channels, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.randn(conv.out_channels, 2, 1, 1),
    }

    found = match(read_lora(written(tensors, tmp_path / "x")), family, "Stable Diffusion 1.5")

    assert sorted(type(change).__name__ for _, change in found.layers) == ["Change", "Difference", "Difference"]
    assert {id(module) for module, _ in found.layers} == {id(norm), id(conv)}
    tensors["lora_unet_input_blocks_0_0.diff_b"] = torch.ones(1)
    with pytest.raises(UnsuitableFile, match="another shape"):
        match(read_lora(written(tensors, tmp_path / "y")), family, "Stable Diffusion 1.5")


def test_scale_zero_is_no_adapter_and_nothing_stays(family: Any, tmp_path: Path) -> None:
    """At scale 0 every bit is the same; after the block, or an error in it, hooks are gone and weights untouched."""
    found = match(read_lora(written(kohya(random_changes(family)), tmp_path / "x")), family, "Stable Diffusion 1.5")
    modules = [family.unet, *family.text_encoders]
    before = weights_hash(modules)
    tokens = torch.arange(20)[None]

    def states() -> Tensor:
        with torch.inference_mode():
            return family.text_encoders[0](tokens).last_hidden_state

    plain = states()
    with applied(found.layers, 0.0):
        assert torch.equal(states(), plain)
    with pytest.raises(KeyError), applied(found.layers, 1.0):
        assert not torch.equal(states(), plain)
        raise KeyError

    assert torch.equal(states(), plain)
    assert weights_hash(modules) == before
    assert not any(module._forward_hooks for root in modules for module in root.modules())


def test_a_file_for_another_family_is_named(family: Any, tmp_path: Path) -> None:
    """Layers that are not there, or have other shapes, say which family the file was made for."""
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    sdxl = {f"{stem}.lora_down.weight": torch.zeros(2, 2048), f"{stem}.lora_up.weight": torch.zeros(640, 2)}
    wider = kohya(random_changes(family))
    for name in [name for name in wider if "down.weight" in name]:
        wider[name] = torch.cat([wider[name], wider[name]], dim=1)

    with pytest.raises(UnsuitableFile, match="made for SDXL, not for Stable Diffusion 1.5"):
        match(read_lora(written(sdxl, tmp_path / "sdxl")), family, "Stable Diffusion 1.5")
    with pytest.raises(UnsuitableFile, match="another shape"):
        match(read_lora(written(wider, tmp_path / "wider")), family, "Stable Diffusion 1.5")


def test_a_few_unknown_layers_are_counted(family: Any, tmp_path: Path) -> None:
    """A file with some layers that the model has not is applied, and the caller can say how many were left out."""
    tensors = kohya(random_changes(family))
    stem = "lora_unet_up_blocks_9_resnets_0_conv1"
    tensors |= {f"{stem}.lora_down.weight": torch.zeros(2, 4, 3, 3), f"{stem}.lora_up.weight": torch.zeros(4, 2, 1, 1)}

    found = match(read_lora(written(tensors, tmp_path / "x")), family, "Stable Diffusion 1.5")

    assert found.num_unknown == 1


def test_a_model_without_a_second_text_encoder_has_no_such_layers() -> None:
    """Changes of SDXL's second text encoder find nothing in a family with one."""
    from weights.lora import Lora

    change = Change(down=torch.zeros(1, 2), up=torch.zeros(2, 1), mid=None, scale=1.0)
    model = SimpleNamespace(unet=nn.Identity(), text_encoders=(nn.Identity(),))

    with pytest.raises(UnsuitableFile, match="not there"):
        match(Lora({"text_encoder_2": {"encoder_layers_0_mlp_fc1": change}}, "SDXL"), model, "Stable Diffusion 1.5")
