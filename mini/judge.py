"""The judge: a small convolutional classifier that reads a scene's attributes from an image, for evaluation only.

It shares neither weights nor architecture with the CLIP that filters the training data. `python -m mini.pretrain judge`
reports its own error.
"""

from dataclasses import replace
from pathlib import Path

from cli import UserError, reported_as

import torch
import torch.nn.functional as F
from torch import nn

from formats.weights import read_tensors, write_tensors
from mini.scenes import in_batches
from mini.world import BACKGROUNDS, COLOURS, MEDIA, SHAPES, SIZES, Scene, Thing

NOTHING = "nothing"
PLACE = {"shape": (NOTHING, *SHAPES), "colour": tuple(COLOURS), "size": tuple(SIZES)}
ATTRIBUTES = {"medium": MEDIA, "background": tuple(BACKGROUNDS)}  # attribute: its classes
ATTRIBUTES |= {f"{side} {name}": classes for side in ("left", "right") for name, classes in PLACE.items()}


def truth(scene):
    """What is right to read from a scene's image: all but its layout, which stands for what has no name."""
    return replace(scene, layout=0)


def labels(scenes):
    """Scenes -> the true classes [B, attributes]; -1 for the colour and the size of nothing."""
    rows = []
    for scene in scenes:
        values = [scene.medium, scene.background]
        for thing in (scene.left, scene.right):
            values += [thing.shape, thing.colour, thing.size] if thing else [NOTHING, None, None]
        classes = zip(values, ATTRIBUTES.values(), strict=True)
        rows.append([-1 if value is None else options.index(value) for value, options in classes])
    return torch.tensor(rows)


class Judge(nn.Module):
    """Images to the attributes' logits."""

    def __init__(self, width=24):
        super().__init__()

        def layer(width_in, width_out, stride):
            convolution = nn.Conv2d(width_in, width_out, 3, stride, padding=1)
            return nn.Sequential(convolution, nn.GroupNorm(8, width_out), nn.SiLU())

        self.features = nn.Sequential(
            layer(3, width, 1),
            layer(width, 2 * width, 2), layer(2 * width, 2 * width, 1),  # 32x32
            layer(2 * width, 4 * width, 2), layer(4 * width, 4 * width, 1),  # 16x16
            layer(4 * width, 4 * width, 2),  # 8x8
        )  # fmt: skip
        self.squeeze = nn.Conv2d(4 * width, 32, 1)
        self.whole = nn.Linear(4 * width, len(MEDIA) + len(BACKGROUNDS))
        classes = sum(map(len, PLACE.values()))
        self.place = nn.Sequential(nn.Linear(32 * 8 * 4, 128), nn.SiLU(), nn.Linear(128, classes))

    def forward(self, x):
        """Images x [B, 3, 64, 64] in [-1, 1] -> logits {attribute: [B, classes]}."""
        h = self.features(x)  # [B, C, 8, 8]
        parts = [self.whole(h.mean((2, 3)))]
        parts += [self.place(half.flatten(1)) for half in self.squeeze(h).chunk(2, dim=3)]
        logits = torch.cat(parts, dim=1).split([len(classes) for classes in ATTRIBUTES.values()], dim=1)
        return dict(zip(ATTRIBUTES, logits, strict=True))

    def loss(self, x, answers):
        """Cross-entropy over all attributes; x as for `forward`, answers [B, attributes] from `labels`."""
        return sum(
            F.cross_entropy(guess.float(), answer, ignore_index=-1, reduction="sum") / (answer >= 0).sum().clamp(min=1)
            for guess, answer in zip(self(x).values(), answers.T, strict=True)
        )

    @torch.no_grad()
    def read(self, x):
        """Images x [B, 3, 64, 64] in [-1, 1] -> the B scenes that they show, their layout 0."""
        answers = [[ATTRIBUTES[name][i] for i in logits.argmax(1).tolist()] for name, logits in self(x).items()]
        scenes = []
        for medium, background, *places in zip(*answers, strict=True):
            things = (None if place[0] == NOTHING else Thing(*place) for place in (places[:3], places[3:]))
            scenes.append(Scene(medium, background, *things, layout=0))
        return scenes

    def save(self, path):
        """Write the weights to a .safetensors file, in float16."""
        write_tensors(path, {name: tensor.half() for name, tensor in self.state_dict().items()})

    @classmethod
    def load(cls, path, device="cpu"):
        """Load the file of `save`. Raises UserError."""
        if not Path(path).exists():
            raise UserError(f"there is no judge at {path}; python -m mini.pretrain judge trains one")
        judge, tensors = cls(), read_tensors(path)[0]
        with reported_as(f"{path} holds no judge of this world"):
            judge.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return judge.eval().requires_grad_(False).to(device)


def right(judge, x, scenes, batch_size=256):
    """Does the judge read every attribute of these B scenes in the images x [B, 3, 64, 64]? Bools [B], in numpy."""
    device = next(judge.parameters()).device

    def compare(x, scenes):
        readings = judge.read(x.to(device))
        return torch.tensor([found == truth(scene) for found, scene in zip(readings, scenes, strict=True)])

    return in_batches(compare, batch_size, x, scenes).numpy()
