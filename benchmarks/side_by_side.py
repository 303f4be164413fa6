"""Draw the README's picture: the input, Lanczos and our result of one photograph, enlarged pieces side by side.

python -m benchmarks.side_by_side [PHOTOGRAPH] [--creativity 0.5] [-o OUT.jpg]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from benchmarks.local import Local
from benchmarks.quality import HELD_OUT, halved
from server.endpoints import ENDPOINTS

PIECE_PX = 420
OUT = Path(__file__).parent / "pictures" / "side-by-side.jpg"


def panel(image: Image.Image, label: str) -> Image.Image:
    """The picture with its name below."""
    labelled = Image.new("RGB", (image.width, image.height + 26), "white")
    labelled.paste(image)
    font = ImageFont.load_default(16)
    ImageDraw.Draw(labelled).text((4, image.height + 3), label, fill="black", font=font)
    return labelled


def main() -> None:
    """Upscale the photograph's half and lay three views of one piece beside each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photograph", nargs="?", type=Path, default=HELD_OUT / "clinic.png")
    parser.add_argument("--endpoint", choices=list(ENDPOINTS), default="fal-ai/creative-upscaler")
    parser.add_argument("--creativity", type=float, default=0.5)
    parser.add_argument("-o", "--out", type=Path, default=OUT)
    parser.add_argument("--left", type=int, default=360)
    parser.add_argument("--top", type=int, default=120)
    arguments = parser.parse_args()
    original = Image.open(arguments.photograph).convert("RGB")
    original = original.crop((0, 0, original.width // 2 * 2, original.height // 2 * 2))
    source = halved(original)
    result = Local().make(arguments.endpoint, source, creativity=arguments.creativity).image
    box = (arguments.left, arguments.top, arguments.left + PIECE_PX, arguments.top + PIECE_PX)
    views = {
        "input": source.resize(original.size, Image.Resampling.NEAREST),
        "Lanczos": source.resize(original.size, Image.Resampling.LANCZOS),
        f"{arguments.endpoint.split('/')[1]}, creativity {arguments.creativity:g}": result,
    }
    panels = [panel(view.crop(box), label) for label, view in views.items()]
    sheet = Image.new("RGB", (sum(p.width for p in panels) + 8 * (len(panels) - 1), panels[0].height), "white")
    for i, piece in enumerate(panels):
        sheet.paste(piece, (i * (PIECE_PX + 8), 0))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.out, quality=92)


if __name__ == "__main__":
    main()
