"""Command that trains a part of the pocket set: `python -m weights.pocket.train PART`."""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from weights.pocket.loop import Options, Trainee, train
from weights.pocket.train_captioner import CaptionerTrainee
from weights.pocket.train_ccsr import CcsrTrainee
from weights.pocket.train_checker import CheckerTrainee
from weights.pocket.train_decoder import DecoderTrainee
from weights.pocket.train_flux import FluxTrainee
from weights.pocket.train_sd15 import Sd15Trainee
from weights.pocket.train_sdxl import SdxlTrainee
from weights.pocket.train_upscaler import UpscalerTrainee
from weights.pocket.train_vae import VaeTrainee

HERE = Path(__file__).parent


class Part(NamedTuple):
    """What learns a part, and the minutes on a CPU and the batch that the committed files were given."""

    trainee: Callable[[Options], Trainee]
    minutes: float
    batch: int


# In the order they need each other.
PARTS: dict[str, Part] = {
    "upscaler": Part(UpscalerTrainee, 15.5, 16),
    "vae": Part(VaeTrainee, 10.5, 16),
    "sd15": Part(Sd15Trainee, 42, 8),
    "decoder": Part(DecoderTrainee, 12, 6),
    "sdxl": Part(SdxlTrainee, 19, 8),
    "ccsr": Part(CcsrTrainee, 14, 8),
    "flux": Part(FluxTrainee, 50, 8),
    "captioner": Part(CaptionerTrainee, 38, 32),
    "checker": Part(CheckerTrainee, 25, 32),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m weights.pocket.train", description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "all"], help="what to train; a part needs those listed before it")
    parser.add_argument("--minutes", type=float, help="training time of each part; default: as the committed files")
    parser.add_argument("--steps", type=int, help="optimizer steps of each part, instead of minutes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="decides pictures and noise (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="crops in a step; default: as the committed files")
    parser.add_argument("--drawings", type=int, default=1200, help="procedural pictures (default: %(default)s)")
    parser.add_argument("--models", type=Path, default=HERE / "models", help="where the parts are written")
    parser.add_argument("--build", type=Path, default=Path("build/pocket"), help="where checkpoints lie")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Train the part named on the command line, or all of them one after the other."""
    chosen = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(chosen.threads)
    for name in PARTS if chosen.part == "all" else [chosen.part]:
        part = PARTS[name]
        untimed = chosen.minutes is None and chosen.steps is not None
        options = Options(
            minutes=None if untimed else chosen.minutes or part.minutes,
            steps=chosen.steps,
            device=chosen.device,
            seed=chosen.seed,
            batch=chosen.batch or part.batch,
            num_drawings=chosen.drawings,
            models=chosen.models,
            build=chosen.build,
        )
        train(part.trainee(options), options)


if __name__ == "__main__":
    main()
