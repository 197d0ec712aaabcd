"""sample.py --best: sample a small grid of scales and seeds, and choose. The paper tunes scales by hand (Sec. 4).

A signal tells how good each of an edit's candidates is. With the captions of the image before and after it is CLIP's
directional similarity, among the candidates whose image similarity is not below the least that the filter of Sec. 3.1.2
accepts. Without captions it is the agreement of the candidates: failures differ, and successes resemble each other.
"""

from itertools import cycle, islice

import torch

from dataset import Filter
from formats import hub
from formats.checkpoint import load_clip
from images import to_tensor

SCALES = (1, 1), (1.3, 1), (1, 0.85), (1.3, 1.2)  # times s_T and s_I, one after another; then the same with other seeds


def candidates(count, text_guidance, image_guidance, seed):
    """[(s_T, s_I, seed), ...]: the given ones first, then the others of SCALES, each round with a new seed."""
    rounds = ((s_t * text_guidance, s_i * image_guidance) for s_t, s_i in cycle(SCALES))
    return [(min(100, s_t), min(100, s_i), seed + number // len(SCALES))
            for number, (s_t, s_i) in enumerate(islice(rounds, count))]  # fmt: skip


def agreement(images):
    """How near each of N images [N, 3, H, W] is to the others: [N], minus the mean L1 distance."""
    flat = images.flatten(1)
    return -torch.cdist(flat, flat, p=1).mean(dim=1) / flat.shape[1]


def directional(image, direction, floor):
    """Directional similarities [N]; below all others where the image similarity [N] is below the floor."""
    return torch.where(image >= floor, direction, image - floor - 1)  # a direction is at least -1


class Chooser:
    """Chooses among candidates by a signal."""

    def __init__(self, captions=None, clip="clip", device="cpu"):
        """captions: of the image before and after, or None; clip: a folder or a name, which only they need."""
        if captions:
            folder = hub.find(clip, "clip")
            (self.clip, tokenizer), self.floor = load_clip(folder, device), Filter.read(folder).image_image
            self.ids = tokenizer(captions).to(device)
        self.captions = captions

    def signal(self, before, images):
        """How good N candidates are, RGB images as large as the one before: [N], the larger the better."""
        x = torch.stack([to_tensor(image) for image in images])
        if not self.captions:
            return agreement(x)
        shown = [(some.to(self.ids.device) + 1) / 2 for some in (to_tensor(before).expand_as(x), x)]
        found = self.clip.edit_similarities(*shown, *self.ids[:, None].expand(2, len(x), -1))
        return directional(found["clip_sim_image"], found["clip_sim_dir"], self.floor)

    def choose(self, before, images):
        """The number of the best candidate."""
        return int(self.signal(before, images).argmax())
