"""Averages two trainings of one network: `python -m weights.pocket.blend FIRST SECOND --share 0.8 OUT`.

Pre-upscaler and codec are such means: of a network trained for the least error and of the one that went on from it with
a loss on texture or its balance. In between lies a whole line of trades between the two (network interpolation, ESRGAN,
arXiv 1809.00219, section 3.4).
"""

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def blend(first: Path, second: Path, share: float, out: Path) -> None:
    """Write `second`'s folder to `out` with weights that are `share` of its own and the rest of `first`'s."""
    (start_file,), (end_file,) = (list(folder.glob("*.safetensors")) for folder in (first, second))
    start, end = load_file(start_file), load_file(end_file)
    if start.keys() != end.keys():
        raise ValueError(f"{first} and {second} are not two trainings of one network.")
    shutil.copytree(second, out, dirs_exist_ok=True)
    blended = {name: start[name].lerp(end[name], share).contiguous() for name in start}
    save_file(blended, out / end_file.name, metadata={"format": "pt"})


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
