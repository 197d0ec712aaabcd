"""The diagram of the UNet is what the script draws of the UNet that there is."""

from docs.draw_unet import OUT, draw
from unet import INSTRUCT_PIX2PIX


def test_the_diagram_is_up_to_date():
    assert OUT.read_text(encoding="utf-8") == draw(INSTRUCT_PIX2PIX, 64), "run python docs/draw_unet.py"
