"""A judge of the miniature's pictures: it reads a scene's attributes off its pixels, to measure generated ones by.

It is a small convolutional network with one head for the medium, one for the background, and one each for the left
and the right place. It shares nothing with the CLIP that filters the training data, neither weights nor kind of
network, and its own error is measured and reported (`mini.pretrain judge`).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from cli import UserError
from formats.weights import read_tensors, write_tensors
from mini.world import BACKGROUNDS, COLOURS, MEDIA, SHAPES, SIZES

NOTHING = "nothing"
ATTRIBUTES = {  # what is read, and the answers there are
    "medium": MEDIA,
    "background": tuple(BACKGROUNDS),
    **{
        f"{side} {name}": options
        for side in ("left", "right")
        for name, options in [("shape", (NOTHING, *SHAPES)), ("colour", tuple(COLOURS)), ("size", tuple(SIZES))]
    },
}


@dataclass(frozen=True)
class Reading:
    """What the judge sees in a picture; a place is (shape, colour, size), or None where nothing stands."""

    medium: str
    background: str
    left: tuple[str, str, str] | None
    right: tuple[str, str, str] | None


def truth(scene):
    """The Reading that is right for a scene of world.py."""
    places = [thing and (thing.shape, thing.colour, thing.size) for thing in (scene.left, scene.right)]
    return Reading(scene.medium, scene.background, *places)


def labels(scenes):
    """Scenes -> the numbers of the right answers [B, attributes]; -1 for the colour and the size of nothing."""
    rows = []
    for scene in scenes:
        row = [MEDIA.index(scene.medium), list(BACKGROUNDS).index(scene.background)]
        for thing in (scene.left, scene.right):
            if thing is None:
                row += [0, -1, -1]
            else:
                row += [
                    1 + SHAPES.index(thing.shape),
                    list(COLOURS).index(thing.colour),
                    list(SIZES).index(thing.size),
                ]
        rows.append(row)
    return torch.tensor(rows)


class Judge(nn.Module):
    """Pictures to the attributes' logits."""

    def __init__(self, width=24):
        super().__init__()

        def layer(width_in, width_out, stride):
            return nn.Sequential(
                nn.Conv2d(width_in, width_out, 3, stride, padding=1), nn.GroupNorm(8, width_out), nn.SiLU()
            )

        self.features = nn.Sequential(
            layer(3, width, 1),
            layer(width, 2 * width, 2),
            layer(2 * width, 2 * width, 1),
            layer(2 * width, 4 * width, 2),
            layer(4 * width, 4 * width, 1),
            layer(4 * width, 4 * width, 2),
        )
        self.squeeze = nn.Conv2d(4 * width, 32, 1)
        self.whole = nn.Linear(4 * width, len(MEDIA) + len(BACKGROUNDS))
        answers = 1 + len(SHAPES) + len(COLOURS) + len(SIZES)
        self.place = nn.Sequential(nn.Linear(32 * 8 * 4, 128), nn.SiLU(), nn.Linear(128, answers))

    def forward(self, x):
        """Pictures x [B, 3, 64, 64] in [-1, 1] -> logits {attribute: [B, answers]}."""
        h = self.features(x)  # [B, C, 8, 8]
        parts = [self.whole(h.mean((2, 3)))]
        parts += [self.place(half.flatten(1)) for half in self.squeeze(h).chunk(2, dim=3)]
        logits = torch.cat(parts, dim=1).split([len(options) for options in ATTRIBUTES.values()], dim=1)
        return dict(zip(ATTRIBUTES, logits, strict=True))

    def loss(self, x, answers):
        """Cross-entropy over all attributes; x as for `forward`, answers [B, attributes] from `labels`."""
        logits = self(x).values()
        return sum(
            F.cross_entropy(guess.float(), answer, ignore_index=-1, reduction="sum") / (answer >= 0).sum().clamp(min=1)
            for guess, answer in zip(logits, answers.T, strict=True)
        )

    @torch.no_grad()
    def read(self, x):
        """Pictures x [B, 3, 64, 64] in [-1, 1] -> B Readings."""
        best = {name: logits.argmax(1).tolist() for name, logits in self(x).items()}
        readings = []
        for number in range(len(x)):
            answer = {name: options[best[name][number]] for name, options in ATTRIBUTES.items()}
            places = [
                None
                if answer[f"{side} shape"] == NOTHING
                else (answer[f"{side} shape"], answer[f"{side} colour"], answer[f"{side} size"])
                for side in ("left", "right")
            ]
            readings.append(Reading(answer["medium"], answer["background"], *places))
        return readings

    def save(self, path, dtype=torch.float16):
        """Write the weights to a .safetensors file."""
        write_tensors(path, {name: tensor.to(dtype) for name, tensor in self.state_dict().items()})

    @classmethod
    def load(cls, path):
        """Read a judge from `save`'s file. Raises UserError."""
        if not Path(path).exists():
            raise UserError(f"there is no judge at {path}; python -m mini.pretrain judge trains one")
        judge, tensors = cls(), read_tensors(path)[0]
        try:
            judge.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        except RuntimeError as error:
            raise UserError(f"{path} holds no judge of this world: {' '.join(str(error).split())[:200]}") from error
        return judge.eval().requires_grad_(False)
