"""Draw one caption, and seven changes of it by Prompt-to-Prompt, with the bundled Stable Diffusion.

    python examples/demo.py runs/demo.png

Such pairs are what an editor learns from: the same seed, the same noise, and shared attention keep what is not changed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from checkpoint import load  # noqa: E402
from errors import UserError, run_program  # noqa: E402
from images import enlarge, grid, save_png, to_image  # noqa: E402
from p2p import PairNoise, sample_pairs  # noqa: E402
from text2image import TextToImage  # noqa: E402

CAPTION = "a painting of a large pink house and a small green tree by the sea"
CHANGES = {
    "make it night": "a painting of a large pink house and a small green tree at night",
    "paint the house blue": "a painting of a large blue house and a small green tree by the sea",
    "turn the tree into a star": "a painting of a large pink house and a small green star by the sea",
    "make it a mosaic": "a mosaic of a large pink house and a small green tree by the sea",
    "make the tree bigger": "a painting of a large pink house and a large green tree by the sea",
    "remove the tree": "a painting of a large pink house by the sea",
    "put it in the snow": "a painting of a large pink house and a small green tree in the snow",
}
SEED = 3


def main():
    """Write the sheet to the file that the command line names."""
    if len(sys.argv) != 2:
        raise UserError("say where to: python examples/demo.py FILE.png")
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    model = TextToImage(load(ROOT / "models" / "mini" / "sd"))
    side = model.sampling.resolution // model.vae.config.factor
    shape = (model.vae.config.latent_channels, side, side)
    noise = PairNoise([SEED] * len(CHANGES), shape, guidance=(3.0, 3.0), p=(0.5, 0.5))
    before, after = sample_pairs(model, [CAPTION] * len(CHANGES), list(CHANGES.values()), noise)
    pictures = [enlarge(to_image(x), 192) for x in (before[0], *after)]
    save_png(grid(pictures, 4, [CAPTION, *CHANGES]), out)
    print(out)


if __name__ == "__main__":
    run_program(main)
