"""Averages two trainings of one network: `python -m weights.pocket.blend FIRST SECOND --share 0.8 OUT`.

The pre-upscaler is such a mean: of the network trained for the least error and of the one that went on from it with
the texture loss. In between lies a whole line of trades between the two (network interpolation, ESRGAN,
arXiv 1809.00219, section 3.4).
"""

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

FILE = "model.safetensors"


def blend(first: Path, second: Path, share: float, out: Path) -> None:
    """Write `second`'s folder to `out` with weights that are `share` of its own and the rest of `first`'s."""
    start, end = load_file(first / FILE), load_file(second / FILE)
    if start.keys() != end.keys():
        raise ValueError(f"{first} and {second} are not two trainings of one network.")
    shutil.copytree(second, out, dirs_exist_ok=True)
    save_file({name: start[name].lerp(end[name], share).contiguous() for name in start}, out / FILE)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=0.8)
    arguments = parser.parse_args()
    blend(arguments.first, arguments.second, arguments.share, arguments.out)


if __name__ == "__main__":
    main()
