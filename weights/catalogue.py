"""The published models of the full set: where each comes from, which of its files the pipelines open, what it may do.

A part is one folder of the set. Loaders ask for parts by the names here (`WeightStore.folder`), downloads and imports
fill exactly the files that are listed here, and the README's table is made from here. Names of files are the
repositories' own; where one has several spellings (half precision first), the first that is there is taken, and a file
may be split into shards with an index. Revisions and hashes are not written here: they are recorded when files come.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GB = 10**9
CREATIVE, CLARITY = "fal-ai/creative-upscaler", "fal-ai/clarity-upscaler"
FLUX_VISION, CRYSTAL = "fal-ai/flux-vision-upscaler", "clarityai/crystal-upscaler"


@dataclass(frozen=True)
class File:
    """A file that a loader opens.

    Attributes:
        path: Where it opens it, relative to the part's folder.
        sources: Its names in the repository, best first.
        optional: Whether loaders do without.
    """

    path: str
    sources: tuple[str, ...] = ()
    optional: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which it is looked for; without sources it is called alike everywhere."""
        return self.sources or (self.path,)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One model: a folder of the full set, from one repository.

    Attributes:
        folder: Its name for loaders, and its place in the set.
        title: What it is, for people.
        repository: On the model hub.
        files: What loaders open.
        size_bytes: What a download takes, about.
        license: As its repository or card says.
        commercial: Whether that allows commercial use.
        gated: Whether its owner wants to be asked before it is downloaded.
        alternatives: Other models for the same place.
        converted: Name of the conversion that turns `files` into the folder; empty: they are the folder.
        made: Files that the conversion makes.
        marks: Values in its configs by which a folder of unknown name is recognised; None stands for a missing one.
        named: What the path of such a folder must contain besides, as a regular expression.
        any_of: Any such file in the folder (glob) does as well.
    """

    folder: str
    title: str
    repository: str
    files: tuple[File, ...]
    size_bytes: int
    license: str
    commercial: str
    gated: bool = False
    alternatives: str = ""
    converted: str = ""
    made: tuple[str, ...] = ()
    marks: Mapping[str, Mapping[str, tuple[Any, ...]]] = field(default_factory=dict)
    named: str = ""
    any_of: tuple[str, ...] = ()

    @property
    def needed(self) -> list[str]:
        """The files without which no loader can use the folder."""
        return list(self.made) or [file.path for file in self.files if not file.optional]

    def missing(self, root: Path) -> list[str]:
        """Files that the folder lacks, relative to the set's folder `root`."""
        folder = root / self.folder
        if any(next(folder.glob(pattern), None) for pattern in self.any_of):
            return []
        return [f"{self.folder}/{name}" for path in self.needed for name in _lacking(folder, path)]


class IncompleteSource(Exception):
    """A repository or folder lacks files of a part; `files` are their best names."""

    def __init__(self, part: Part, files: list[str]) -> None:
        super().__init__(f"{part.repository} has no {', '.join(files)}")
        self.part, self.files = part, files


def choose(part: Part, names: Collection[str]) -> dict[str, str]:
    """The files to take for a part, out of the names in a repository: path in the part's folder to name there.

    Raises:
        IncompleteSource: Something that loaders need is not among the names.
    """
    chosen: dict[str, str] = {}
    lacking = []
    for file in part.files:
        found = next(filter(None, (_as_is_or_in_shards(file.path, name, names) for name in file.names)), None)
        if found is not None:
            chosen |= found
        elif not file.optional:
            lacking.append(file.names[0])
    if lacking:
        raise IncompleteSource(part, lacking)
    return chosen


def _as_is_or_in_shards(path: str, name: str, names: Collection[str]) -> dict[str, str] | None:
    """A file under one of its names: whole, or as an index with all its shards; None if it is not there."""
    if name in names:
        return {path: name}
    index = f"{name}.index.json"
    if index not in names:
        return None
    stem, suffix = name.rsplit(".", 1)
    shard = re.compile(rf"{re.escape(stem)}-\d+-of-(\d+)\.{suffix}")
    shards = {found: int(match[1]) for found in names if (match := shard.fullmatch(found))}
    if not shards or len(shards) != max(shards.values()):
        return None
    folder = path.rpartition("/")[0]
    return {
        f"{path}.index.json": index,
        **{f"{folder}/{found.rpartition('/')[2]}".lstrip("/"): found for found in sorted(shards)},
    }


def _lacking(folder: Path, path: str) -> list[str]:
    """What is not there of a file that may lie in shards."""
    if (folder / path).is_file():
        return []
    index = folder / f"{path}.index.json"
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return [path]
    beside = path.rpartition("/")[0]
    names = [f"{beside}/{shard}".lstrip("/") for shard in sorted(shards)]
    return [name for name in names if not (folder / name).is_file()]


def is_recognised(part: Part, configs: Mapping[str, Any], path: str) -> bool:
    """Whether configs (by their path in the part's folder) and the path of a folder are those of a part."""
    if re.search(part.named, path) is None:
        return False
    for name, keys in part.marks.items():
        config = configs.get(name)
        if not isinstance(config, Mapping) or any(_plain(config.get(key)) not in keys[key] for key in keys):
            return False
    return True


def _plain(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


# -- what loaders open -------------------------------------------------------------------------------------------------


def weights(name: str, *, half: bool = False, pickle: bool = False) -> File:
    """Tensors: in half precision where the repository has that, as a pickle (to be converted) where it has no other."""
    sources = [f"{name}.safetensors"]
    if half:
        sources.insert(0, f"{name}.fp16.safetensors")
    if pickle:
        sources.append(f"{name}.bin")
    return File(f"{name}.safetensors", tuple(sources))


def network(folder: str, *, half: bool = False) -> tuple[File, ...]:
    """A network of diffusers in a folder."""
    return File(f"{folder}/config.json"), weights(f"{folder}/diffusion_pytorch_model", half=half)


def text_model(folder: str, *, half: bool = False) -> tuple[File, ...]:
    """A network of transformers in a folder."""
    return File(f"{folder}/config.json"), weights(f"{folder}/model", half=half)


def tokenizer(folder: str = "") -> tuple[File, ...]:
    """A tokenizer: its vocabulary has one of several forms."""
    prefix = f"{folder}/" if folder else ""
    forms = (
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "spiece.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    )
    return File(f"{prefix}tokenizer_config.json"), *(File(prefix + form, optional=True) for form in forms)


SCHEDULER = File("scheduler/scheduler_config.json")
VISION_FILES = (
    File("config.json"),
    weights("model"),
    *tokenizer(),
    File("generation_config.json", optional=True),
    File("preprocessor_config.json", optional=True),
    File("processor_config.json", optional=True),
)
RESTRICTED = "yes, with use restrictions"

_ALL = (
    Part(
        folder="sd15",
        title="Stable Diffusion 1.5",
        repository="stable-diffusion-v1-5/stable-diffusion-v1-5",
        files=(
            *network("unet", half=True),
            *text_model("text_encoder", half=True),
            *tokenizer("tokenizer"),
            SCHEDULER,
        ),
        size_bytes=int(1.97 * GB),
        license="CreativeML OpenRAIL-M",
        commercial=RESTRICTED,
        alternatives="any Stable Diffusion 1.5 model in diffusers' layout: Realistic Vision V6.0, epiCRealism",
        marks={"unet/config.json": {"_class_name": ("UNet2DConditionModel",), "addition_embed_type": (None,)}},
    ),
    Part(
        folder="vae",
        title="VAE of Stable Diffusion 1.5",
        repository="stabilityai/sd-vae-ft-mse",
        files=(File("config.json"), weights("diffusion_pytorch_model")),
        size_bytes=int(0.335 * GB),
        license="MIT",
        commercial="yes",
        alternatives="the VAE of the base model",
        marks={
            "config.json": {
                "_class_name": ("AutoencoderKL",),
                "latent_channels": (4,),
                "scaling_factor": (None, 0.18215),
            }
        },
    ),
    Part(
        folder="controlnet-tile-sd15",
        title="tile ControlNet for Stable Diffusion 1.5",
        repository="lllyasviel/control_v11f1e_sd15_tile",
        files=(File("config.json"), weights("diffusion_pytorch_model", half=True, pickle=True)),
        size_bytes=int(1.45 * GB),
        license="OpenRAIL",
        commercial=RESTRICTED,
        marks={"config.json": {"_class_name": ("ControlNetModel",), "addition_embed_type": (None,)}},
        named="tile",
    ),
    Part(
        folder="sdxl",
        title="Stable Diffusion XL",
        repository="stabilityai/stable-diffusion-xl-base-1.0",
        files=(
            *network("unet", half=True),
            *text_model("text_encoder", half=True),
            *text_model("text_encoder_2", half=True),
            *tokenizer("tokenizer"),
            *tokenizer("tokenizer_2"),
            SCHEDULER,
        ),
        size_bytes=int(6.8 * GB),
        license="CreativeML OpenRAIL++-M",
        commercial=RESTRICTED,
        alternatives="SG161222/RealVisXL_V5.0 (OpenRAIL++)",
        marks={"unet/config.json": {"_class_name": ("UNet2DConditionModel",), "addition_embed_type": ("text_time",)}},
    ),
    Part(
        folder="sdxl/vae",
        title="VAE of Stable Diffusion XL",
        repository="madebyollin/sdxl-vae-fp16-fix",
        files=(File("config.json"), weights("diffusion_pytorch_model")),
        size_bytes=int(0.335 * GB),
        license="MIT",
        commercial="yes",
        alternatives="the VAE of the base model",
        marks={"config.json": {"_class_name": ("AutoencoderKL",), "scaling_factor": (0.13025,)}},
    ),
    Part(
        folder="controlnet-tile-sdxl",
        title="tile ControlNet for Stable Diffusion XL",
        repository="xinsir/controlnet-tile-sdxl-1.0",
        files=(File("config.json"), weights("diffusion_pytorch_model")),
        size_bytes=int(2.5 * GB),
        license="Apache-2.0",
        commercial="yes",
        alternatives="TTPlanet/TTPLanet_SDXL_Controlnet_Tile_Realistic (OpenRAIL)",
        marks={"config.json": {"_class_name": ("ControlNetModel",), "addition_embed_type": ("text_time",)}},
        named="tile",
    ),
    Part(
        folder="upscaler",
        title="pre-upscaler Real-ESRGAN x4plus",
        repository="Comfy-Org/Real-ESRGAN_repackaged",
        files=(File("RealESRGAN_x4plus.safetensors"),),
        size_bytes=int(0.067 * GB),
        license="BSD-3-Clause",
        commercial="yes",
        alternatives="4x-LSDIR, 4x-Nomos8kSC (CC BY 4.0); 4x-UltraSharp (CC BY-NC-SA 4.0: not commercial)",
        any_of=("*.safetensors", "*.pth"),
    ),
    Part(
        folder="ccsr-v1",
        title="CCSR version 1",
        repository="Kijai/ccsr-safetensors",
        files=(File("real-world_ccsr-fp16.safetensors"),),
        size_bytes=int(3.44 * GB),
        license="Apache-2.0, on Stable Diffusion 2.1 (CreativeML OpenRAIL++-M)",
        commercial=RESTRICTED,
        alternatives="CCSR version 2 as ccsr-v2/, converted by hand",
        converted="ccsr-v1",
        made=(
            "ccsr.json",
            "empty_prompt.safetensors",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "controlnet/config.json",
            "controlnet/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
        ),
    ),
    Part(
        folder="captioner",
        title="captioner BLIP-2",
        repository="Salesforce/blip2-flan-t5-xl",
        files=VISION_FILES,
        size_bytes=int(15.8 * GB),
        license="MIT, with Flan-T5 (Apache-2.0)",
        commercial="yes",
        alternatives="Salesforce/blip-image-captioning-base (BSD-3-Clause, 1 GB); Salesforce/blip2-opt-2.7b (with OPT: "
        "not commercial)",
        marks={"config.json": {"model_type": ("blip-2", "blip")}},
    ),
    Part(
        folder="safety-checker",
        title="safety checker of Stable Diffusion",
        repository="stable-diffusion-v1-5/stable-diffusion-v1-5",
        files=(
            File("config.json", ("safety_checker/config.json",)),
            File(
                "model.safetensors",
                ("safety_checker/model.fp16.safetensors", "safety_checker/model.safetensors"),
            ),
            File("preprocessor_config.json", ("feature_extractor/preprocessor_config.json",)),
        ),
        size_bytes=int(0.61 * GB),
        license="CreativeML OpenRAIL-M",
        commercial=RESTRICTED,
        marks={"config.json": {"architectures": ("StableDiffusionSafetyChecker",)}},
    ),
    Part(
        folder="safety-confirmer",
        title="classifier that confirms the safety checker",
        repository="Falconsai/nsfw_image_detection",
        files=(File("config.json"), weights("model"), File("preprocessor_config.json")),
        size_bytes=int(0.343 * GB),
        license="Apache-2.0",
        commercial="yes",
        alternatives="AdamCodd/vit-base-nsfw-detector (Apache-2.0)",
        marks={"config.json": {"architectures": ("ViTForImageClassification",)}},
    ),
    Part(
        folder="flux1-dev",
        title="FLUX.1 [dev]",
        repository="black-forest-labs/FLUX.1-dev",
        files=(
            *network("transformer"),
            *text_model("text_encoder"),
            *text_model("text_encoder_2"),
            *tokenizer("tokenizer"),
            *tokenizer("tokenizer_2"),
            *network("vae"),
            SCHEDULER,
        ),
        size_bytes=int(33.7 * GB),
        license="FLUX.1 [dev] Non-Commercial License",
        commercial="no (its pictures yes)",
        gated=True,
        alternatives="flux2-klein-4b",
        marks={"transformer/config.json": {"_class_name": ("FluxTransformer2DModel",)}},
    ),
    Part(
        folder="controlnet-upscaler-flux1-dev",
        title="upscaler ControlNet for FLUX.1 [dev]",
        repository="jasperai/Flux.1-dev-Controlnet-Upscaler",
        files=(File("config.json"), weights("diffusion_pytorch_model")),
        size_bytes=int(3.58 * GB),
        license="FLUX.1 [dev] Non-Commercial License",
        commercial="no (its pictures yes)",
        marks={"config.json": {"_class_name": ("FluxControlNetModel",)}},
    ),
    Part(
        folder="flux2-klein-4b",
        title="FLUX.2 [klein] 4B",
        repository="black-forest-labs/FLUX.2-klein-4B",
        files=(
            *network("transformer"),
            *text_model("text_encoder"),
            *tokenizer("tokenizer"),
            *network("vae"),
            SCHEDULER,
            File("model_index.json", optional=True),
        ),
        size_bytes=int(15.9 * GB),
        license="Apache-2.0",
        commercial="yes",
        alternatives="flux1-dev",
        marks={"transformer/config.json": {"_class_name": ("Flux2Transformer2DModel",)}},
    ),
    Part(
        folder="vision-captioner",
        title="captioner Qwen3-VL 2B",
        repository="Qwen/Qwen3-VL-2B-Instruct",
        files=VISION_FILES,
        size_bytes=int(4.3 * GB),
        license="Apache-2.0",
        commercial="yes",
        alternatives="HuggingFaceTB/SmolVLM-256M-Instruct (Apache-2.0, 0.5 GB)",
        marks={"config.json": {"model_type": ("qwen3_vl", "idefics3")}},
    ),
)

PARTS: Mapping[str, Part] = {part.folder: part for part in _ALL}
"""Every part that can be had from a hub, by its folder."""
BY_HAND: Mapping[str, str] = {
    "ccsr-v2": "CCSR version 2 in place of version 1: its networks and `ccsr.json`",
    "face-restorer": "RestoreFormer++ (Apache-2.0) for small faces of crystal-upscaler: RestoreFormer++.ckpt of "
    "github.com/wzhouxiff/RestoreFormerPlusPlus",
    "face-detector": "another cascade (XML of OpenCV) than the built-in one",
}
"""Parts that only an operator can put into the set, and what they are for."""
OWN_PARTS = BY_HAND.keys() | {"upscaler-compact-x2", "flux", "controlnet-upscaler-flux"}
"""Parts that loaders know besides `PARTS`: those, and the pocket set's."""


# -- which endpoint uses which -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """Parts that an endpoint cannot do without, and those whose absence a request is told of."""

    required: tuple[str, ...]
    optional: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """Both."""
        return self.required + self.optional


_SD15 = ("sd15", "vae", "controlnet-tile-sd15")
_SAFETY = ("safety-checker", "safety-confirmer")
FLUX_PROFILES: Mapping[str, tuple[str, ...]] = {
    "flux1-dev": ("flux1-dev", "controlnet-upscaler-flux1-dev"),
    "flux2-klein-4b": ("flux2-klein-4b",),
}
"""Parts of the profiles of flux-vision-upscaler."""
DEFAULT_FLUX_PROFILE = "flux2-klein-4b"

ENDPOINT_PARTS: Mapping[str, Needs] = {
    CREATIVE: Needs(_SD15, ("upscaler", "ccsr-v1", "captioner", *_SAFETY, "sdxl", "sdxl/vae", "controlnet-tile-sdxl")),
    CLARITY: Needs(_SD15, ("upscaler", *_SAFETY)),
    CRYSTAL: Needs(_SD15, ("upscaler",)),
    FLUX_VISION: Needs((), ("upscaler", "vision-captioner", *_SAFETY)),
}
"""Without the parts of flux-vision-upscaler's profile: see `needs_of`."""


class UnknownName(Exception):
    """Neither an endpoint nor a part has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"There is no endpoint or part {name!r}. Endpoints: {', '.join(ENDPOINT_PARTS)}. Parts: {', '.join(PARTS)}."
        )
        self.name = name


def needs_of(endpoint: str, flux_profile: str = DEFAULT_FLUX_PROFILE) -> Needs:
    """The parts that an endpoint uses."""
    needs = ENDPOINT_PARTS[endpoint]
    return Needs(FLUX_PROFILES[flux_profile], needs.optional) if endpoint == FLUX_VISION else needs


def parts_for(names: Sequence[str], flux_profile: str = DEFAULT_FLUX_PROFILE) -> list[Part]:
    """The parts that are meant by ids or short names of endpoints, or names of parts; all endpoints' without names.

    Raises:
        UnknownName: See there.
    """
    wanted: list[str] = []
    for name in names or ENDPOINT_PARTS:
        endpoint = next((each for each in ENDPOINT_PARTS if name in (each, each.partition("/")[2])), None)
        if endpoint is not None:
            wanted += needs_of(endpoint, flux_profile).all
        elif name in PARTS:
            wanted.append(name)
        else:
            raise UnknownName(name)
    return [PARTS[name] for name in dict.fromkeys(wanted)]


def endpoints_using(folder: str) -> list[str]:
    """The endpoints that use a part, in any profile."""
    return [
        endpoint
        for endpoint in ENDPOINT_PARTS
        if any(folder in needs_of(endpoint, profile).all for profile in FLUX_PROFILES)
    ]
