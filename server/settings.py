"""Every knob of the server: its unit, its default and one line of meaning.

A value comes from, in this order: the command line, the environment (`UPSCALER_<NAME>`), a TOML file (the one that
`UPSCALER_CONFIG` names, else `upscaler.toml` in the data folder), the default. In the environment a list is
written `a,b` or as JSON.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

DEFAULT_DATA = "~/.local/share/creative-upscaler"
MIN_OPERATOR_KEY = 16
MAX_SOCKET_FOLDER = 70  # bytes; a Unix socket's path may have 107, and file names follow


def _split(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [part.strip() for part in value.split(",") if part.strip()]


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _without_slash(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError("expected http://host[:port][/prefix] or https://host[:port][/prefix]")
    return url.rstrip("/")


def is_loopback(host: str) -> bool:
    """Whether a listening address is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _are_networks(names: list[str]) -> list[str]:
    for name in names:
        try:
            ipaddress.ip_network(name, strict=False)
        except ValueError as error:
            raise ValueError(f"expected addresses or networks such as 10.0.0.0/8, got {name!r}") from error
    return names


def _pairs(value: Any) -> Any:
    if not isinstance(value, str) or value.lstrip().startswith("{"):
        return json.loads(value) if isinstance(value, str) else value
    return dict(part.split("=", 1) for part in _split(value))


Names = Annotated[list[str], NoDecode, BeforeValidator(_split)]
Secrets = Annotated[dict[str, SecretStr], NoDecode, BeforeValidator(_pairs)]
Folder = Annotated[Path, AfterValidator(_absolute)]
BaseURL = Annotated[str, AfterValidator(_without_slash)]


class Settings(BaseSettings):
    """What the operator decides; built once at start and passed on."""

    model_config = SettingsConfigDict(env_prefix="UPSCALER_", extra="forbid", frozen=True)

    data: Folder = Field(Path(DEFAULT_DATA), validate_default=True, description="Folder of everything that is kept.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port for plain HTTP; 0 turns it off.")
    tls_port: int = Field(8443, ge=0, le=65535, description="Port for HTTPS; 0 turns it off.")
    fal_proxy_port: int = Field(
        0, ge=0, le=65535, description="Port of a CONNECT proxy for clients that keep fal's host names; 0 turns it off."
    )
    tls_cert: Folder | None = Field(None, description="Certificate chain (PEM) to serve instead of our own.")
    tls_key: Folder | None = Field(None, description="Private key (PEM) of `tls_cert`.")
    tls_names: Names = Field(
        default_factory=list, description="More names for our certificate, such as this service's in a compose network."
    )
    public_url: BaseURL | None = Field(None, description="Base of the URLs in answers; else taken from the request.")
    trusted_proxies: Annotated[Names, AfterValidator(_are_networks)] = Field(
        default_factory=list, description="Addresses or networks whose X-Forwarded-Proto/-Host are believed."
    )
    api_keys: Names = Field(default_factory=list, description="Keys that callers must present; none leaves it open.")
    operator_key: SecretStr | None = Field(
        None, description="Key of the operator's commands; else one is made and kept in the data folder."
    )
    allow_unauthenticated: bool = Field(False, description="Listen beyond this machine although there is no key.")

    weights: Literal["pocket", "full", "auto"] = Field("auto", description="Which set of weights serves.")
    weights_dir: Folder | None = Field(
        None, description="Folder of the full weights; else `weights/full` in the data folder."
    )
    flux_profile: Literal["auto", "flux1-dev", "flux2-klein-4b"] = Field(
        "auto",
        description="Full models of flux-vision-upscaler; auto is flux1-dev where its license is accepted, else klein.",
    )
    accept_flux1_dev_license: bool = Field(
        False, description="You have read and accept the FLUX.1 [dev] Non-Commercial License of flux1-dev's models."
    )
    flux_fp8: bool = Field(
        False, description="Run full Flux transformers in 8-bit floating point; needs torchao and an Ada or Hopper GPU."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="What models compute in; auto is float16 on a GPU, bfloat16 on a CPU that has it."
    )
    device_memory_gb: float | None = Field(
        None, gt=0, description="GB of 2^30 bytes for models on a device; else 70 % of a GPU, half of a CPU's memory."
    )
    host_memory_gb: float | None = Field(
        None, ge=0, description="GB of 2^30 bytes in host memory for models off their GPU; else a quarter of it."
    )
    slots: int | Literal["auto"] = Field("auto", description="Slots to run; auto is one per GPU, one on a CPU.")
    max_attempts: int = Field(3, ge=1, description="Times a request is tried when its slot dies under it.")
    cancel_grace_s: float = Field(30.0, gt=0, description="Seconds a slot has to stop before it is killed.")
    run_silence_s: float = Field(
        600.0, gt=0, description="Seconds without a sign of a run, such as a step, before its slot is killed."
    )

    max_body_mb: float = Field(64.0, gt=0, description="Largest request body, MB of 2^20 bytes.")
    max_upload_mb: float = Field(1024.0, gt=0, description="Largest uploaded file, MB of 2^20 bytes.")
    max_download_mb: float = Field(50.0, gt=0, description="Largest input picture fetched by URL, MB of 2^20 bytes.")
    max_input_mp: float = Field(32.0, gt=0, description="Largest input, megapixels of 10^6.")
    max_output_mp: float = Field(64.0, gt=0, description="Largest result, megapixels of 10^6.")
    max_large_input_mp: float = Field(128.0, gt=0, description="Largest input with override_size_limits, megapixels.")
    max_large_output_mp: float = Field(512.0, gt=0, description="Largest result with override_size_limits, megapixels.")
    max_crystal_output_mp: float = Field(100.0, gt=0, description="Largest result of crystal-upscaler, megapixels.")
    tiff_from_mp: float | None = Field(
        None,
        gt=0,
        description="Results of crystal-upscaler from so many megapixels on are BigTIFF; unset, none.",
    )
    restore_faces_px: int = Field(
        128,
        ge=0,
        description="Faces up to so many px high are restored where the weights have a `face-restorer`; 0, none.",
    )
    clarity_loras: Names = Field(
        default_factory=list,
        description="Detail LoRAs of clarity-upscaler, each a safetensors file or `file:weight`.",
    )

    fetch_allow_hosts: Names = Field(
        default_factory=list,
        description="Hosts (`host` or `host:port`) fetched from although their address is private.",
    )
    fetch_timeout_s: float = Field(60.0, gt=0, description="Seconds that fetching an input may take in all.")
    fetch_tokens: Secrets = Field(
        default_factory=dict,
        description="Tokens for gated weights, `host=token,host=token`; a token is shown to exactly its host.",
    )
    hub_url: BaseURL | None = Field(
        None, description="Model hub of base models; else HF_ENDPOINT, else https://huggingface.co."
    )
    max_weights_mb: float = Field(
        16384.0, gt=0, description="Largest LoRA, embedding or base model fetched by URL, MB of 2^20 bytes."
    )
    weights_timeout_s: float = Field(1800.0, gt=0, description="Seconds that fetching a request's weights may take.")
    weights_cache_gb: float = Field(
        50.0, gt=0, description="GB of 2^30 bytes for fetched weights on disk; the least recently used go first."
    )
    allow_pickles: bool = Field(
        False, description="Accept .pt, .ckpt and .bin files of weights; each is converted in a process of its own."
    )
    storage_url: str | None = Field(
        None, description="Blob store, e.g. s3://bucket/prefix; else `files` in the data folder."
    )
    retention_s: float = Field(86400.0, gt=0, description="Seconds a finished request and its files are kept.")
    upload_retention_s: float = Field(2592000.0, gt=0, description="Seconds an uploaded file is kept unless it says.")
    webhook_timeout_s: float = Field(15.0, gt=0, description="Seconds a webhook's receiver has to answer.")
    webhook_max_tries: int = Field(12, ge=1, description="Deliveries of a webhook before it is given up.")
    webhook_allow_private: bool | None = Field(
        None,
        description="Whether webhooks may go to private addresses; unset, only while `host` is a loopback address.",
    )
    client_patience_s: float = Field(
        30.0, gt=0, description="Seconds a client may take for a request's head, or stay below 500 bytes a second."
    )
    drain_s: float = Field(
        10.0, ge=0, description="Seconds that running requests have to end at shutdown, before they are queued again."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Constructor, environment, TOML file: in this order."""
        overrides = init_settings.init_kwargs if isinstance(init_settings, InitSettingsSource) else {}
        data = Path(overrides.get("data") or os.environ.get("UPSCALER_DATA") or DEFAULT_DATA).expanduser()
        config = Path(os.environ.get("UPSCALER_CONFIG") or data / "upscaler.toml").expanduser()
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, config)

    @model_validator(mode="after")
    def _check_ports(self) -> Settings:
        if self.fal_proxy_port and not self.tls_port:
            raise ValueError("fal_proxy_port leads to tls_port, which is off: set tls_port as well")
        return self

    @model_validator(mode="after")
    def _check_operator(self) -> Settings:
        if self.operator_key is not None and len(self.operator_key.get_secret_value()) < MIN_OPERATOR_KEY:
            raise ValueError(f"operator_key must have at least {MIN_OPERATOR_KEY} characters")
        if self.operator_key is not None and self.operator_key.get_secret_value() in self.api_keys:
            raise ValueError("operator_key must not be one of api_keys: callers would be operators")
        return self

    @model_validator(mode="after")
    def _check_certificate(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("tls_key", "tls_cert") if self.tls_cert is None else ("tls_cert", "tls_key")
            raise ValueError(f"{given} is of no use without {missing}: set both, or neither for a certificate of ours")
        return self

    @model_validator(mode="after")
    def _check_license(self) -> Settings:
        if self.flux_profile == "flux1-dev" and not self.accept_flux1_dev_license:
            raise ValueError(
                "flux_profile flux1-dev is FLUX.1-dev with an upscaler ControlNet, both under the FLUX.1 [dev] "
                "Non-Commercial License: read it on the models' pages and set accept_flux1_dev_license "
                "(UPSCALER_ACCEPT_FLUX1_DEV_LICENSE=true), or set flux_profile to flux2-klein-4b (Apache-2.0)"
            )
        return self

    @property
    def full_flux_profile(self) -> str:
        """The models of flux-vision-upscaler in the full set."""
        if self.flux_profile != "auto":
            return self.flux_profile
        return "flux1-dev" if self.accept_flux1_dev_license else "flux2-klein-4b"

    @property
    def may_call_private(self) -> bool:
        """Whether webhooks may go to private addresses: strangers must not reach the operator's network through us."""
        return is_loopback(self.host) if self.webhook_allow_private is None else self.webhook_allow_private

    @property
    def run_dir(self) -> Path:
        """Where sockets and `server.json` lie; a short folder elsewhere when the data lies too deep for sockets."""
        folder = self.data / "run"
        if len(os.fsencode(folder)) <= MAX_SOCKET_FOLDER:
            return folder
        digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"upscaler-{os.getuid()}-{digest}"

    @property
    def full_weights_dir(self) -> Path:
        """Where the full set of weights lies."""
        return self.weights_dir or self.data / "weights" / "full"

    @property
    def fetched_weights_dir(self) -> Path:
        """Where weights that callers name by URL are kept."""
        return self.data / "weights" / "fetched"

    @property
    def base_models_dir(self) -> Path:
        """Where the operator puts base models that callers may name."""
        return self.data / "weights" / "base"

    @property
    def hub(self) -> str:
        """The model hub."""
        return self.hub_url or _without_slash(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")

    @property
    def ledger_path(self) -> Path:
        """The database of all requests."""
        return self.data / "ledger.sqlite3"

    @property
    def operator_key_path(self) -> Path:
        """Where the operator's key is, unless it is a setting."""
        return self.data / "operator.key"

    @property
    def files_dir(self) -> Path:
        """The local blob store."""
        return self.data / "files"

    @property
    def uploads_dir(self) -> Path:
        """Parts of uploads that are not complete yet."""
        return self.data / "uploads"

    @property
    def tls_dir(self) -> Path:
        """Our certificates and their keys."""
        return self.data / "tls"

    @property
    def trust_dir(self) -> Path:
        """What clients trust: our authority without its key, so that this folder can be shared."""
        return self.tls_dir / "trust"

    def make_folders(self) -> None:
        """Create the folders that roles need, readable by this user only."""
        for folder in (self.data, self.run_dir, self.files_dir):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
