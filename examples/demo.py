"""Edit the bundled scene by several instructions, and write a sheet of the results: the first figure of the README.

    python examples/demo.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cli import run_program  # noqa: E402

from images import enlarge, grid, open_image, save_png  # noqa: E402
from ip2p import InstructPix2Pix  # noqa: E402

OUT = "runs/demo.png"
INSTRUCTIONS = (
    "make it night", "paint the house blue", "turn the house into a mushroom", "make it a mosaic",
    "make the tree bigger", "remove the tree", "put it in the snow",
)  # fmt: skip


def main():
    """Write the sheet."""
    model = InstructPix2Pix.load(ROOT / "models" / "mini" / "editor")
    scene = open_image(ROOT / "examples" / "scene.png")
    images = [scene, *(model.edit(scene, instruction, seed=3) for instruction in INSTRUCTIONS)]
    save_png(grid([enlarge(image, 192) for image in images], 4, ["before", *INSTRUCTIONS]), OUT)
    print(OUT)


if __name__ == "__main__":
    run_program(main)
