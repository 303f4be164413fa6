"""Fetching the published models from a hub that behaves as huggingface.co does, and as networks do."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save

from server.__main__ import main
from tests.weights.hub_server import Hub as Server
from tests.weights.hub_server import Repository, serving
from tests.weights.repositories import published, tensors
from tests.weights.test_convert import SMALL, small_checkpoint
from weights import placing
from weights.catalogue import PARTS, Part
from weights.convert import convert_ccsr_v1
from weights.listing import Hub
from weights.lock import faults, read_lock
from weights.placing import NoSpace
from weights.pull import pull

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
UNET = f"{SD15}/unet/diffusion_pytorch_model.fp16.safetensors"
KLEIN = "black-forest-labs/FLUX.2-klein-4B"


class Told:
    """What a pull reports."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done: list[str] = []
        self.wanted = self.present = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def total(self, num_bytes: int, present: int) -> None:
        self.wanted, self.present = num_bytes, present

    def came(self, num_bytes: int) -> None:
        self.present += num_bytes

    def finished(self, part: Part) -> None:
        self.done.append(part.folder)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(published()) as hub:
        yield hub


def fetch(server: Server, root: Path, *names: str, token: str | None = None, update: bool = False) -> list[str]:
    """Pull parts; returns what failed."""
    parts = [PARTS[name] for name in names]
    return pull(parts, root, Hub(server.url, token), Told(), update=update, first_wait_s=0.01)


def test_a_part_is_what_its_loader_opens_and_no_more(server: Server, tmp_path: Path) -> None:
    """Half precision is taken under the name that loaders know; nothing else of a large repository comes."""
    told = Told()

    failures = pull([PARTS["sd15"], PARTS["vae"]], tmp_path, Hub(server.url, None), told)

    assert failures == []
    assert sorted(told.done) == ["sd15", "vae"]
    assert told.present == told.wanted == sum(server.sent.values())
    repository = server.repositories[SD15]
    for path, name in {
        "unet/diffusion_pytorch_model": "unet/diffusion_pytorch_model.fp16",
        "text_encoder/model": "",
    }.items():
        source = f"{name or path + '.fp16'}.safetensors"
        assert (tmp_path / "sd15" / f"{path}.safetensors").read_bytes() == repository.files[source]
    assert f"{SD15}/v1-5-pruned.safetensors" not in server.sent
    assert not (tmp_path / "sd15/vae").exists()
    assert not list(tmp_path.glob(".partial/*"))


def test_the_lock_file_says_what_came(server: Server, tmp_path: Path) -> None:
    """Revision, license, size and SHA-256 are those of the hub and of the bytes."""
    fetch(server, tmp_path, "sd15")

    locked = read_lock(tmp_path)["sd15"]
    repository = server.repositories[SD15]
    assert (locked.repository, locked.revision, locked.license) == (SD15, repository.revision, "creativeml-openrail-m")
    unet = locked.files["unet/diffusion_pytorch_model.safetensors"]
    assert unet.source == "unet/diffusion_pytorch_model.fp16.safetensors"
    assert unet.sha256 == hashlib.sha256(repository.files[unet.source]).hexdigest()
    assert set(locked.files) == {
        str(path.relative_to(tmp_path / "sd15")) for path in (tmp_path / "sd15").rglob("*") if path.is_file()
    }


def test_shards_come_with_their_index(server: Server, tmp_path: Path) -> None:
    """A network in shards is fetched whole."""
    assert fetch(server, tmp_path, "flux2-klein-4b") == []

    names = {path.name for path in (tmp_path / "flux2-klein-4b/text_encoder").iterdir()}
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert names == shards | {"config.json", "model.safetensors.index.json"}
    assert PARTS["flux2-klein-4b"].missing(tmp_path) == []


def test_a_shard_that_is_not_published_is_named(server: Server, tmp_path: Path) -> None:
    """A repository that is not complete is not taken for one that is."""
    del server.repositories[KLEIN].files["text_encoder/model-00002-of-00002.safetensors"]

    (failure,) = fetch(server, tmp_path, "flux2-klein-4b")

    assert f"{KLEIN} has no text_encoder/model.safetensors" in failure


def test_what_is_there_is_not_asked_for(server: Server, tmp_path: Path) -> None:
    """A second pull makes no request at all."""
    fetch(server, tmp_path, "sd15", "vae")
    before = len(server.asked)

    assert fetch(server, tmp_path, "sd15", "vae") == []
    assert len(server.asked) == before


def test_a_damaged_file_alone_comes_again(server: Server, tmp_path: Path) -> None:
    """Where one file was lost, the others are not fetched a second time."""
    fetch(server, tmp_path, "sd15")
    (tmp_path / "sd15/unet/diffusion_pytorch_model.safetensors").write_bytes(b"short")
    server.sent.clear()

    assert fetch(server, tmp_path, "sd15") == []
    assert set(server.sent) == {UNET}
    assert list(faults(tmp_path, read_lock(tmp_path))) == []


def test_an_update_brings_what_has_changed(server: Server, tmp_path: Path) -> None:
    """--update asks for the newest commit, and fetches the files that are different there."""
    fetch(server, tmp_path, "sd15")
    name = "text_encoder/model.fp16.safetensors"
    server.repositories[SD15].files[name] = tensors(99)
    server.sent.clear()

    assert fetch(server, tmp_path, "sd15", update=True) == []
    assert set(server.sent) == {f"{SD15}/{name}"}
    assert read_lock(tmp_path)["sd15"].revision == server.repositories[SD15].revision


@pytest.mark.parametrize(
    "faults_",
    [
        [("cut", 50_000), ("cut", 100_000), ("cut", 0)],
        [("status", 503), ("status", 500), ("status", 429)],
        [("cut", 100_000), ("status", 502), ("cut", 10)],
    ],
    ids=["cut connections", "busy servers", "both"],
)
def test_a_bad_network_costs_no_byte_twice(server: Server, tmp_path: Path, faults_: list[tuple[str, int]]) -> None:
    """A download goes on where it broke off."""
    server.faults[UNET] = faults_

    assert fetch(server, tmp_path, "sd15") == []
    assert server.sent[UNET] == len(server.file(SD15, UNET.removeprefix(f"{SD15}/")))
    ranges = [headers["range"] for host, path, headers in server.asked if host == "cdn" and "range" in headers]
    assert not any(fault == "cut" and size for fault, size in faults_) or ranges


def test_a_hub_that_is_busy_at_first_is_asked_again(server: Server, tmp_path: Path) -> None:
    """A 5xx for the list of files is no reason to give up."""
    server.faults[f"api/{SD15}"] = [("status", 503), ("status", 500)]

    assert fetch(server, tmp_path, "sd15") == []


def test_a_mirror_that_tells_no_sizes(server: Server, tmp_path: Path) -> None:
    """Sizes and hashes come from the headers of each file then, and are compared all the same."""
    server.tells_sizes = False

    assert fetch(server, tmp_path, "sd15") == []
    assert read_lock(tmp_path)["sd15"].revision == server.repositories[SD15].revision
    server.flipped = {f"{KLEIN}/transformer/diffusion_pytorch_model.safetensors"}
    assert "came twice with other contents" in fetch(server, tmp_path, "flux2-klein-4b")[0]


def test_a_host_without_ranges_is_asked_from_the_start(server: Server, tmp_path: Path) -> None:
    """Where a part cannot be had, the file comes whole, and right."""
    server.takes_ranges = False
    server.faults[UNET] = [("cut", 50_000)]

    assert fetch(server, tmp_path, "sd15") == []
    assert list(faults(tmp_path, read_lock(tmp_path))) == []


def test_a_file_that_breaks_off_forever_is_given_up(server: Server, tmp_path: Path) -> None:
    """The other parts come; the message names the file, and what came is kept for the next time."""
    server.faults[UNET] = [("cut", 100_000), *[("cut", 0)] * 20]

    (failure,) = fetch(server, tmp_path, "sd15", "vae")

    assert "sd15: unet/diffusion_pytorch_model.fp16.safetensors" in failure
    assert "again and again" in failure
    assert PARTS["vae"].missing(tmp_path) == []
    server.faults.clear()
    assert fetch(server, tmp_path, "sd15") == []
    assert server.sent[UNET] == len(server.file(SD15, UNET.removeprefix(f"{SD15}/")))


def test_redirects_without_end_fail_one_part_alone(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are a failure that is named, like every other."""
    monkeypatch.setattr(httpx2, "AsyncClient", partial(httpx2.AsyncClient, max_redirects=0))

    (failure,) = fetch(server, tmp_path, "sd15")

    assert failure.startswith("sd15: ") and "redirect" in failure


def test_other_bytes_than_announced_are_not_kept(server: Server, tmp_path: Path) -> None:
    """What does not have the hub's hash is fetched once more, and refused then."""
    server.flipped = {UNET, f"{SD15}/scheduler/scheduler_config.json"}

    (failure,) = fetch(server, tmp_path, "sd15")

    assert "came twice with other contents" in failure
    assert not (tmp_path / "sd15").exists()


def test_the_token_is_shown_to_the_hub_alone(server: Server, tmp_path: Path) -> None:
    """A redirect to the second host does not take it along."""
    server.tokens = {"hf_secret"}

    assert fetch(server, tmp_path, "flux1-dev", token="hf_secret") == []
    shown = {(host, headers.get("authorization")) for host, _, headers in server.asked}
    assert shown == {("hub", "Bearer hf_secret"), ("cdn", None)}


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_a_gated_repository_says_how_to_be_let_in(server: Server, tmp_path: Path, token: str | None) -> None:
    """Without a token, or with one whose account was not let in: where to accept, what to set, and nothing fetched."""
    (failure,) = fetch(server, tmp_path, "flux1-dev", token=token)

    for word in ("FLUX.1 [dev] Non-Commercial License", f"{server.url}/black-forest-labs/FLUX.1-dev", "HF_TOKEN"):
        assert word in failure
    assert ("no token is set" in failure) == (token is None)
    assert not server.sent


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(server: Server, tmp_path: Path) -> None:
    """The sizes are the hub's; the message names what is needed and what is free."""
    server.repositories[SD15].sizes["unet/diffusion_pytorch_model.fp16.safetensors"] = 10**15

    with pytest.raises(NoSpace, match="1000000.0 GB are needed"):
        fetch(server, tmp_path, "sd15", "vae")

    assert not server.sent


def test_unknown_repositories_and_no_hub_at_all_are_told_apart(server: Server, tmp_path: Path) -> None:
    """One line each, with the way out."""
    del server.repositories[KLEIN]

    assert f"does not know the repository {KLEIN}" in fetch(server, tmp_path, "flux2-klein-4b")[0]
    (failure,) = pull([PARTS["vae"]], tmp_path, Hub("http://127.0.0.1:9", None), Told(), first_wait_s=0.001)
    assert "cannot be reached" in failure
    assert "HF_ENDPOINT" in failure


def test_a_commit_that_is_gone_is_resolved_anew(server: Server, tmp_path: Path) -> None:
    """An interrupted pull of a commit that the hub has no more fails once, and the next one takes the newest."""
    server.faults[UNET] = [("cut", 100_000), *[("cut", 0)] * 20]
    fetch(server, tmp_path, "sd15")
    server.faults.clear()
    server.repositories[SD15].files["text_encoder/model.fp16.safetensors"] = tensors(98)
    server.repositories[SD15].files["unet/diffusion_pytorch_model.fp16.safetensors"] = tensors(99, 400_000)

    assert "pull again" in fetch(server, tmp_path, "sd15")[0]
    assert fetch(server, tmp_path, "sd15") == []
    assert list(faults(tmp_path, read_lock(tmp_path))) == []
    assert (tmp_path / "sd15/text_encoder/model.safetensors").read_bytes() == tensors(98)


def test_a_pickle_becomes_safetensors(server: Server, tmp_path: Path) -> None:
    """Where a repository has nothing else, its pickle is converted in a process of its own, and not kept."""
    assert fetch(server, tmp_path, "controlnet-tile-sd15") == []

    folder = tmp_path / "controlnet-tile-sd15"
    assert {path.name for path in folder.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert load_file(folder / "diffusion_pytorch_model.safetensors")["weight"].dtype == torch.float64
    assert "diffusion_pytorch_model.bin" in read_lock(tmp_path)["controlnet-tile-sd15"].made_from


def test_ccsr_is_converted(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published checkpoint becomes the folder that the pre-stage loads, and is not kept beside it."""
    original = save(small_checkpoint())
    server.repositories["Kijai/ccsr-safetensors"].files["real-world_ccsr-fp16.safetensors"] = original

    def convert(part: Part, files: list[Path], made: Path, poll: object) -> Path:
        convert_ccsr_v1(files[0], made, architecture=SMALL)
        return made

    monkeypatch.setattr(placing, "_converted", convert)
    root = tmp_path / "set"

    assert fetch(server, root, "ccsr-v1") == []
    assert PARTS["ccsr-v1"].missing(root) == []
    assert not list(root.rglob("real-world*"))
    (source,) = read_lock(root)["ccsr-v1"].made_from.values()
    assert source.sha256 == hashlib.sha256(original).hexdigest()


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_converted_is_named(server: Server, tmp_path: Path) -> None:
    """The conversion's own words reach the caller; the download is kept."""
    (failure,) = fetch(server, tmp_path, "ccsr-v1")

    assert "Kijai/ccsr-safetensors could not be converted" in failure
    assert "is no complete CCSR checkpoint" in failure


def test_what_was_put_there_by_hand_is_kept(server: Server, tmp_path: Path) -> None:
    """The operator's own pre-upscaler is neither replaced nor joined by another."""
    (tmp_path / "upscaler").mkdir()
    (tmp_path / "upscaler/4x-mine.pth").write_bytes(b"mine")
    told = Told()

    assert pull([PARTS["upscaler"]], tmp_path, Hub(server.url, None), told) == []
    assert [path.name for path in (tmp_path / "upscaler").iterdir()] == ["4x-mine.pth"]
    assert "by hand" in told.notes[0]
    assert not server.asked


# -- the command, in a process that can be killed ----------------------------------------------------------------------


def command(server: Server, root: Path, *arguments: str) -> list[str]:
    """`creative-upscaler weights …` without a supervisor in between."""
    return [sys.executable, "-m", "server", "weights", *arguments]


def environment(server: Server, root: Path, **more: str) -> dict[str, str]:
    """The variables that lead the command to the hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UPSCALER_", "HF_"))}
    data = {"UPSCALER_DATA": str(root.parent / "data"), "UPSCALER_WEIGHTS_DIR": str(root), "HF_ENDPOINT": server.url}
    return kept | data | {"HF_HUB_DISABLE_TELEMETRY": "1"} | more


def start(server: Server, root: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """Start the command."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        command(server, root, *arguments), env=environment(server, root, **more), text=True, **pipes
    )


def run(server: Server, root: Path, *arguments: str, **more: str) -> tuple[int, str, str]:
    """Run the command; status, output and complaint."""
    process = start(server, root, *arguments, **more)
    out, complaint = process.communicate(timeout=120)
    return process.returncode, out, complaint


def on_disk(root: Path) -> int:
    """Bytes of weights that have come so far; files move while they are counted."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            if ".safetensors" in name:
                with contextlib.suppress(FileNotFoundError):
                    total += (Path(folder) / name).stat().st_size
    return total


def wait_until_came(root: Path, num_bytes: int, process: subprocess.Popen[str]) -> None:
    """Wait until so many bytes are on disk."""
    deadline = time.monotonic() + 60
    while on_disk(root) < num_bytes and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_five_kills_cost_no_whole_file(server: Server, tmp_path: Path) -> None:
    """A pull that is killed five times at random points ends complete, and verified; no file came twice."""
    root, dice = tmp_path / "set", random.Random(20)
    parts = ("sd15", "vae", "flux2-klein-4b", "safety-checker")
    sizes = {}
    for name in {PARTS[part].repository for part in parts}:
        files = server.repositories[name].files
        large = {path: tensors(seed, 1_000_000) for seed, path in enumerate(files) if path.endswith(".safetensors")}
        files.update(large)
        sizes |= {f"{name}/{path}": len(content) for path, content in files.items()}
    server.pause_s = 0.005
    for _ in range(5):
        process = start(server, root, "pull", *parts)
        wait_until_came(root, on_disk(root) + dice.randrange(200_000, 1_500_000), process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    status, out, complaint = run(server, root, "pull", *parts)

    assert status == 0, complaint
    assert "4 parts are complete" in out
    assert not list(faults(root, read_lock(root)))
    assert not list(root.glob(".partial/*"))
    times = {name: sent / sizes[name] for name, sent in server.sent.items() if name.endswith(".safetensors")}
    assert len(times) == 8
    assert min(times.values()) >= 1
    assert max(times.values()) < 2
    assert sum(times.values()) < 1.5 * len(times)


def test_ctrl_c_says_what_is_kept(server: Server, tmp_path: Path) -> None:
    """Status 130, one line, and the next pull goes on."""
    server.pause_s = 0.005
    process = start(server, tmp_path / "set", "pull", "sd15")
    wait_until_came(tmp_path, 100_000, process)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)

    assert process.returncode == 130
    assert complaint.strip().splitlines()[-1] == (
        "stopped. What came so far is kept: the same command goes on from there."
    )
    assert "Traceback" not in complaint
    server.pause_s, before = 0.0, sum(server.sent.values())
    assert fetch(server, tmp_path / "set", "sd15") == []
    assert before < sum(server.sent.values()) < before + 900_000


def test_two_pulls_at_once_take_turns(server: Server, tmp_path: Path) -> None:
    """The second waits for the first, says so, and finds all there."""
    server.pause_s, told = 0.02, Told()
    with ThreadPoolExecutor() as threads:
        first = threads.submit(fetch, server, tmp_path, "sd15")
        while not server.sent:
            time.sleep(0.002)
        second = threads.submit(pull, [PARTS["sd15"]], tmp_path, Hub(server.url, None), told)

    assert first.result() == second.result() == []
    assert "another process is changing" in told.notes[0]
    assert all(sent == len(server.file(SD15, name.removeprefix(f"{SD15}/"))) for name, sent in server.sent.items())


def run_here(
    server: Server, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """The command in this process; status, output and complaint."""
    for name, value in environment(server, root).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["creative-upscaler", "weights", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_commands_answer_in_statuses(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Verify finds a flipped byte and names the file; list and unknown names; what each exits with."""
    root = tmp_path / "set"
    command = partial(run_here, server, root, monkeypatch, capsys)
    assert command("verify")[0] == 1
    assert command("pull", "vae", "upscaler")[:2] == (0, f"2 parts are complete in {root}.\n")
    assert command("verify")[0] == 0
    weights = root / "vae/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[1234] ^= 1
    weights.write_bytes(content)

    status, _, complaint = command("verify")
    assert status == 1
    assert "vae/diffusion_pytorch_model.safetensors has changed: SHA-256 is" in complaint
    assert "RealESRGAN" not in complaint
    status, listing, _ = command("list")
    rows = {line.split()[0]: line for line in listing.splitlines() if line.split()}
    assert status == 0
    assert set(PARTS) < set(rows)
    assert "present" in rows["upscaler"]
    assert "missing" in rows["flux1-dev"]
    assert "FLUX.1 [dev] Non-Commercial License" in rows["flux1-dev"]
    told = {part["part"]: part for part in json.loads(command("list", "--json")[1])}
    assert told["vae"]["revision"] == server.repositories["stabilityai/sd-vae-ft-mse"].revision
    assert told["upscaler"]["alternatives"]
    status, _, complaint = command("pull", "fal-ai/creative-upscalr")
    assert (status, len(complaint.splitlines())) == (2, 1)
    assert "fal-ai/creative-upscaler" in complaint
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    status, _, complaint = command("pull", "flux1-dev")
    assert (status, "HF_TOKEN" in complaint) == (1, True)
    server.repositories[KLEIN].sizes["transformer/diffusion_pytorch_model.safetensors"] = 10**15
    status, _, complaint = command("pull", "flux2-klein-4b")
    assert (status, "GB are needed" in complaint) == (1, True)


def test_import_and_prune_answer_in_statuses(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty folder is an error; what is left over is named before it goes, and goes with --yes alone."""
    root = tmp_path / "set"
    command = partial(run_here, server, root, monkeypatch, capsys)
    (tmp_path / "usb/sd-vae-ft-mse").mkdir(parents=True)
    assert command("prune") == (0, "Nothing to delete.\n", "")
    assert command("import", str(tmp_path / "usb"))[0] == 1
    for name, content in server.repositories["stabilityai/sd-vae-ft-mse"].files.items():
        (tmp_path / "usb/sd-vae-ft-mse" / name).write_bytes(content)
    assert command("import", str(tmp_path / "usb"))[0] == 0
    (root / "vae/old.safetensors").write_bytes(bytes(2_000_000))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(root))

    for failing, expected in ((interrupted, 130), (forbidden, 1)):
        with monkeypatch.context() as patched:
            patched.setattr("server.weights_commands.leftovers", failing)
            status, _, complaint = command("prune", "--yes")
        assert (status, len(complaint.splitlines())) == (expected, 1)
    status, out, complaint = command("prune")
    assert (status, "2.000 MB  vae/old.safetensors" in out) == (1, True)
    assert "--yes" in complaint
    assert command("prune", "--yes")[0] == 0
    assert sorted(path.name for path in (root / "vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert not server.asked


def test_a_plan_is_written_before_a_byte_is_fetched(server: Server, tmp_path: Path) -> None:
    """What was resolved at first is what an interrupted pull goes on with, though the repository changed meanwhile."""
    server.faults[UNET] = [("cut", 100_000), *[("cut", 0)] * 20]
    fetch(server, tmp_path, "sd15")

    plan = json.loads((tmp_path / ".partial/sd15/plan.json").read_text())

    assert plan["revision"] == server.repositories[SD15].revision
    assert Repository({}).revision != plan["revision"]
    shutil.rmtree(tmp_path / ".partial")
