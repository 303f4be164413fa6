"""Command that trains a part of the pocket set: `python -m weights.pocket.train PART`."""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import torch

from weights.pocket.loop import Options, Trainee, train
from weights.pocket.train_sd15 import Sd15Trainee
from weights.pocket.train_upscaler import UpscalerTrainee
from weights.pocket.train_vae import VaeTrainee

HERE = Path(__file__).parent

# In the order they need each other, with the minutes on two cores that the committed files were given.
PARTS: dict[str, tuple[Callable[[Options], Trainee], float]] = {
    "upscaler": (UpscalerTrainee, 15.5),
    "vae": (VaeTrainee, 26),
    "sd15": (Sd15Trainee, 54),
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
    parser.add_argument("--batch", type=int, default=16, help="crops in a step (default: %(default)s)")
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
        trainee, usual_minutes = PARTS[name]
        untimed = chosen.minutes is None and chosen.steps is not None
        options = Options(
            minutes=None if untimed else chosen.minutes or usual_minutes,
            steps=chosen.steps,
            device=chosen.device,
            seed=chosen.seed,
            batch=chosen.batch,
            num_drawings=chosen.drawings,
            models=chosen.models,
            build=chosen.build,
        )
        train(trainee(options), options)


if __name__ == "__main__":
    main()
