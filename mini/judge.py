"""The judge: a small convolutional classifier that reads a scene's attributes from an image, for evaluation only.

It shares neither weights nor architecture with the CLIP that filters the training data.
"""

from cli import reported_as

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from formats.weights import read_tensors, write_tensors
from mini.world import OPTIONS

THING = {"shape": ("nothing", *OPTIONS["shape"]), "colour": OPTIONS["colour"], "size": OPTIONS["size"]}
ATTRIBUTES = {"medium": OPTIONS["medium"], "background": OPTIONS["background"]}  # attribute: its classes
ATTRIBUTES |= {f"{side} {name}": classes for side in ("left", "right") for name, classes in THING.items()}


def labels(scenes):
    """Scenes -> the true classes [B, attributes]; -1 for the colour and the size of nothing."""
    rows = []
    for scene in scenes:
        values = [scene.medium, scene.background]
        for thing in (scene.left, scene.right):
            values += vars(thing).values() if thing else ("nothing", None, None)
        classes = zip(values, ATTRIBUTES.values(), strict=True)
        rows.append([-1 if value is None else options.index(value) for value, options in classes])
    return torch.tensor(rows)


class Judge(nn.Module):
    """Images to the attributes' logits."""

    def __init__(self):
        super().__init__()
        layers = [(3, 24, 2), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1), (96, 96, 2)]  # width in, out, stride
        self.features = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(width, out, 3, stride, padding=1), nn.GroupNorm(8, out), nn.SiLU())
            for width, out, stride in layers
        ))  # fmt: skip
        self.squeeze = nn.Conv2d(96, 32, 1)
        self.whole = nn.Linear(96, len(OPTIONS["medium"]) + len(OPTIONS["background"]))
        self.place = nn.Sequential(nn.Linear(32 * 8 * 4, 128), nn.SiLU(), nn.Linear(128, sum(map(len, THING.values()))))

    def forward(self, x):
        """Images x [B, 3, 128, 128] in [-1, 1] -> logits {attribute: [B, classes]}."""
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
        """Images x [B, 3, 128, 128] in [-1, 1] -> the classes that they show, [B, attributes]."""
        return torch.stack([logits.argmax(1) for logits in self(x).values()], dim=1)

    def save(self, path):
        """Write the weights to a .safetensors file, in float16."""
        write_tensors(path, {name: tensor.half() for name, tensor in self.state_dict().items()})

    @classmethod
    def load(cls, path, device="cpu"):
        """Load the file of `save`. Raises UserError."""
        judge = cls()
        with reported_as(f"{path} holds no judge of this world"):
            judge.load_state_dict(read_tensors(path)[0])  # to float32
        return judge.eval().requires_grad_(False).to(device)


def right(judge, x, scenes):
    """Does the judge read every attribute of these B scenes in the images x [B, 3, 128, 128]? Bools [B], in numpy."""
    device, answers = next(judge.parameters()).device, labels(scenes)
    classes = in_batches(lambda x: judge.read(x.to(device)).cpu(), 256, x)
    return ((classes == answers) | (answers == -1)).all(dim=1).numpy()


@torch.no_grad()
def in_batches(compute, size, *inputs, desc=None):
    """Call compute(*batch) for batches of the inputs, which are of one length, and join what it returns, tensors."""
    starts = tqdm(range(0, len(inputs[0]), size), desc=desc, unit="batch", leave=False, disable=desc is None)
    return torch.cat([compute(*(values[start : start + size] for values in inputs)) for start in starts])
