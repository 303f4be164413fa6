"""LoRA, embeddings and base models in the whole pipeline: what they change, and that nothing of them stays."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines.adapters import _Addition
from pipelines.creative_upscaler import CreativeUpscaler, Params
from pipelines.errors import Cancelled, InvalidParams
from pipelines.progress import Report
from tests.conftest import png_bytes
from tests.pipelines.test_creative_upscaler import DEFAULTS, UNLIMITED
from tests.weights.base_files import changed, checkpoint, write_checkpoint, write_folder
from tests.weights.lora_files import kohya, random_changes, written
from weights.fetch import WeightFile
from weights.hub import BaseFiles
from weights.store import WeightStore

QUICK = Params(**(DEFAULTS | {"num_inference_steps": 4, "strength": 0.6}))


def weight_file(path: Path) -> WeightFile:
    """A file as the cache gives it."""
    return WeightFile(path=path, name=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture(scope="module")
def pipeline(pocket: WeightStore) -> CreativeUpscaler:
    return CreativeUpscaler.load(pocket, device="cpu")


@pytest.fixture(scope="module")
def files(pipeline: CreativeUpscaler, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A LoRA, an embedding and a base model that fit the pocket models, as parameters."""
    folder = tmp_path_factory.mktemp("files")
    family = pipeline.models.family("SD_1_5")
    lora = written(kohya(random_changes(family.model, size=1.0)), folder / "lora.safetensors")
    width = family.model.text_encoders[0].config.hidden_size
    torch.manual_seed(5)
    save_file({"emb_params": torch.randn(3, width)}, folder / "oddword.safetensors")
    tensors = checkpoint(family.model, family.canvas.vae.vae)
    base = weight_file(write_checkpoint(changed(tensors), folder / "base.safetensors"))
    return {
        "lora": weight_file(lora),
        "embedding": weight_file(folder / "oddword.safetensors"),
        "base_model": BaseFiles(name="base", files={"checkpoint": base}),
    }


@pytest.fixture(scope="module")
def small() -> bytes:
    """A picture of 32 px with structure."""
    return png_bytes(Image.radial_gradient("L").resize((32, 32)).convert("RGB"))


def run(pipeline: CreativeUpscaler, image: bytes, **changes: Any) -> bytes:
    """The PNG."""
    output = BytesIO()
    pipeline(image, replace(QUICK, **changes), limits=UNLIMITED, output=output, progress=lambda report: None)
    return output.getvalue()


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(BytesIO(png))).astype(float)


def shared(pipeline: CreativeUpscaler) -> list[nn.Module]:
    """Every module that requests share."""
    return [module for resident in pipeline.models._residency._residents.values() for module in resident.modules]


def additions(pipeline: CreativeUpscaler) -> list[Any]:
    """Hooks of LoRA that are still there; transformers leaves some of its own on text encoders."""
    modules = (module for root in shared(pipeline) for module in root.modules())
    return [hook for module in modules for hook in module._forward_hooks.values() if isinstance(hook, _Addition)]


def hash_of(modules: Iterable[nn.Module]) -> str:
    digest = hashlib.sha256()
    for module in modules:
        for tensor in module.state_dict().values():
            digest.update(tensor.contiguous().numpy(force=True).tobytes())
    return digest.hexdigest()


def test_nothing_of_a_request_stays(pipeline: CreativeUpscaler, files: dict[str, Any], small: bytes) -> None:
    """A, then B with LoRA, embedding and another base, then A again: A's files are the same to the byte."""
    before = run(pipeline, small)
    modules = shared(pipeline)
    weights = hash_of(modules)
    for name in files:
        assert run(pipeline, small, prompt="an oddword", **{name: files[name]}) != before
    everything = run(pipeline, small, prompt="an oddword", **files)
    again = run(pipeline, small)

    assert before == again and everything not in (before, again)
    assert hash_of(modules) == weights
    assert additions(pipeline) == []


def test_failed_and_cancelled_requests_leave_nothing(
    pipeline: CreativeUpscaler, files: dict[str, Any], small: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a fault nor a cancellation in the middle of a request with adapters changes a weight or leaves a hook."""
    before = run(pipeline, small)
    modules = shared(pipeline)
    weights = hash_of(modules)

    def stop(report: Report) -> None:
        if report.stage == "denoise" and report.step == 1:
            raise Cancelled

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(Cancelled):
        pipeline(small, replace(QUICK, **files), limits=UNLIMITED, output=BytesIO(), progress=stop)
    with monkeypatch.context() as broken:
        broken.setattr(CreativeUpscaler, "_denoise", fail)
        with pytest.raises(RuntimeError):
            run(pipeline, small, **files)

    assert hash_of(modules) == weights
    assert additions(pipeline) == []
    assert run(pipeline, small) == before


def test_a_lora_works_by_its_scale(pipeline: CreativeUpscaler, files: dict[str, Any], small: bytes) -> None:
    """Scale 0 is no LoRA, bit for bit; the larger the scale, the further the picture is from that."""
    plain = pixels(run(pipeline, small))

    moved = [
        float(np.abs(pixels(run(pipeline, small, lora=files["lora"], lora_scale=scale)) - plain).mean())
        for scale in (0.0, 0.25, 0.5, 1.0)
    ]

    assert moved[0] == 0.0
    assert moved == sorted(moved) and moved[1] > 0


def test_an_embedding_answers_to_its_name_everywhere(
    pipeline: CreativeUpscaler, files: dict[str, Any], small: bytes
) -> None:
    """The file's stem stands for its vectors in prompt, suffix and negative prompt, and nothing else changes."""
    embedding = files["embedding"]

    for field in ("prompt", "prompt_suffix", "negative_prompt"):
        told = {field: "like oddword, sharp"}
        assert run(pipeline, small, **told, embedding=embedding) != run(pipeline, small, **told), field
    assert pixels(run(pipeline, small, embedding=embedding)) == pytest.approx(pixels(run(pipeline, small)))


def test_an_embedding_answers_to_the_word_in_its_file(pipeline: CreativeUpscaler, small: bytes, tmp_path: Path) -> None:
    """A file of diffusers has a word of its own next to its name; the log tells both."""
    width = pipeline.models.family("SD_1_5").model.text_encoders[0].config.hidden_size
    save_file({"<cat-toy>": torch.randn(2, width)}, tmp_path / "learned_embeds.safetensors")
    embedding, remarks = weight_file(tmp_path / "learned_embeds.safetensors"), []

    def listen(report: Report) -> None:
        remarks.append(report.message)

    made = []
    for word in ("<cat-toy>", "learned_embeds"):
        output, params = BytesIO(), replace(QUICK, prompt=f"a {word}, sharp", embedding=embedding)
        pipeline(small, params, limits=UNLIMITED, output=output, progress=listen)
        made.append(pixels(output.getvalue()))

    assert np.array_equal(*made)
    assert "the embedding stands for 'learned_embeds' or '<cat-toy>' in prompts" in remarks


def test_a_checkpoint_and_a_folder_of_the_own_networks_change_nothing(
    pipeline: CreativeUpscaler, small: bytes, tmp_path: Path
) -> None:
    """A base model that holds the server's own numbers gives the server's own picture, from either layout."""
    family = pipeline.models.family("SD_1_5")
    single = write_checkpoint(checkpoint(family.model, family.canvas.vae.vae), tmp_path / "own.safetensors")
    write_folder(family.model, family.canvas.vae.vae, tmp_path / "own")
    folder = {
        "unet": weight_file(tmp_path / "own/unet/diffusion_pytorch_model.safetensors"),
        "vae": weight_file(tmp_path / "own/vae/diffusion_pytorch_model.safetensors"),
        "text_encoder": weight_file(tmp_path / "own/text_encoder/model.safetensors"),
        "scheduler": weight_file(tmp_path / "own/scheduler/scheduler_config.json"),
    }
    wanted = pixels(run(pipeline, small))

    tensors = load_file(tmp_path / "own/unet/diffusion_pytorch_model.safetensors")
    halves = list(tensors)[: len(tensors) // 2], list(tensors)[len(tensors) // 2 :]
    for number, names in enumerate(halves):
        save_file({name: tensors[name] for name in names}, tmp_path / f"{number}.safetensors")
    sharded = folder | {"unet": weight_file(tmp_path / "0.safetensors")}
    shards = {"unet": (weight_file(tmp_path / "1.safetensors"),)}

    bases = [
        BaseFiles(name="single", files={"checkpoint": weight_file(single)}),
        BaseFiles(name="folder", files=folder),
        BaseFiles(name="sharded", files=sharded, shards=shards),
    ]
    for base in bases:
        assert np.array_equal(pixels(run(pipeline, small, base_model=base)), wanted), base.name


def test_sdxl_takes_adapters_too(pipeline: CreativeUpscaler, small: bytes, tmp_path: Path) -> None:
    """Its own checkpoint changes nothing; LoRA under the original numbers and vectors for both encoders do."""
    family = pipeline.models.family("SDXL")
    single = write_checkpoint(checkpoint(family.model, family.canvas.vae.vae), tmp_path / "own.safetensors")
    changes = random_changes(family.model, size=1.0)
    lora = written(kohya(changes, family.model.unet.config), tmp_path / "lora.safetensors")
    widths = [encoder.config.hidden_size for encoder in family.model.text_encoders]
    vectors = {name: torch.randn(2, width) for name, width in zip(("clip_l", "clip_g"), widths, strict=True)}
    save_file(vectors, tmp_path / "oddword.safetensors")
    sdxl = {"family": "SDXL", "prompt": "an oddword"}
    before = run(pipeline, small, **sdxl)

    own = run(pipeline, small, **sdxl, base_model=BaseFiles(name="own", files={"checkpoint": weight_file(single)}))
    adapted = [
        run(pipeline, small, **sdxl, lora=weight_file(lora)),
        run(pipeline, small, **sdxl, embedding=weight_file(tmp_path / "oddword.safetensors")),
    ]

    assert np.array_equal(pixels(own), pixels(before))
    assert all(picture != before for picture in adapted)
    assert run(pipeline, small, **sdxl) == before


def test_a_base_model_without_text_encoder_and_vae_keeps_the_servers(
    pipeline: CreativeUpscaler, small: bytes, tmp_path: Path
) -> None:
    """A file with a UNet alone, and whatever its trainer left in it, is completed; half a text encoder is refused."""
    family = pipeline.models.family("SD_1_5")
    whole = checkpoint(family.model, family.canvas.vae.vae)
    unet_only = {name: tensor for name, tensor in whole.items() if name.startswith("model.diffusion_model.")}
    extras = {"model_ema.decay": torch.ones(()), "model_ema.diffusion_modelout2weight": torch.zeros(4)}
    extras |= {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "betas": torch.ones(1000),
    }
    lacking = {name: tensor for name, tensor in whole.items() if not name.endswith("final_layer_norm.weight")}
    first = BaseFiles(
        name="unet",
        files={"checkpoint": weight_file(write_checkpoint(unet_only | extras, tmp_path / "unet.safetensors"))},
    )
    second = BaseFiles(
        name="half", files={"checkpoint": weight_file(write_checkpoint(lacking, tmp_path / "half.safetensors"))}
    )

    assert np.array_equal(pixels(run(pipeline, small, base_model=first)), pixels(run(pipeline, small)))
    with pytest.raises(InvalidParams, match="lacks the tensor") as caught:
        run(pipeline, small, base_model=second)
    assert caught.value.field == "base_model"


def test_an_unreadable_adapter_is_the_fault_of_its_parameter(
    pipeline: CreativeUpscaler, small: bytes, tmp_path: Path
) -> None:
    """The caller learns which of the files is of no use, and why."""
    save_file({"emb_params": torch.ones(2, 1024)}, tmp_path / "sd2.safetensors")

    with pytest.raises(InvalidParams, match="Stable Diffusion 2") as caught:
        run(pipeline, small, embedding=weight_file(tmp_path / "sd2.safetensors"))
    assert caught.value.field == "embedding"
    with pytest.raises(InvalidParams, match="is a textual inversion") as caught:
        run(pipeline, small, lora=weight_file(tmp_path / "sd2.safetensors"))
    assert caught.value.field == "lora"


def test_a_lora_beyond_all_numbers_is_the_callers_fault(
    pipeline: CreativeUpscaler, files: dict[str, Any], small: bytes
) -> None:
    """A scale that overflows is refused like any other value that is of no use, and nothing of it stays."""
    with pytest.raises(InvalidParams, match="Lower its scale") as caught:
        run(pipeline, small, lora=files["lora"], lora_scale=1e38)

    assert caught.value.field == "lora"
    assert additions(pipeline) == []


def test_an_embedding_without_a_name_is_refused(
    pipeline: CreativeUpscaler, files: dict[str, Any], small: bytes
) -> None:
    """Nothing in a prompt could stand for it; an empty word would stand everywhere."""
    with pytest.raises(InvalidParams, match="has no name") as caught:
        run(pipeline, small, prompt="a cat, a dog", embedding=replace(files["embedding"], name=""))

    assert caught.value.field == "embedding"


def test_a_folder_of_another_family_is_named(pipeline: CreativeUpscaler, small: bytes, tmp_path: Path) -> None:
    """What a UNet was made for is said in words, not by the first tensor that does not fit."""
    tensors = {
        "down_blocks.0.resnets.0.conv1.weight": torch.zeros(1, 1, 3, 3),
        "add_embedding.linear_1.weight": torch.zeros(1, 1),
    }
    save_file(tensors, tmp_path / "unet.safetensors")
    base = BaseFiles(name="xl", files={"unet": weight_file(tmp_path / "unet.safetensors")})

    with pytest.raises(InvalidParams, match="for SDXL; the model_type of this request is SD_1_5") as caught:
        run(pipeline, small, base_model=base)
    assert caught.value.field == "base_model"


@pytest.mark.slow
def test_memory_stays_flat_over_200_requests(pipeline: CreativeUpscaler, files: dict[str, Any], small: bytes) -> None:
    """Requests that alternate between adapters and none do not add up: at most 1 MB per 100."""
    process = psutil.Process()
    quick = {"num_inference_steps": 1, "scale": 1.0, "guidance_scale": 1.0}
    used = []
    for number in range(240):
        run(pipeline, small, prompt="an oddword", **quick, **(files if number % 2 else {}))
        gc.collect()
        used.append(process.memory_info().rss / 2**20)

    slope = np.polyfit(np.arange(200), used[40:], 1)[0] * 100
    assert slope <= 1, f"{slope:.2f} MB per 100 requests"
