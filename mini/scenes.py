"""The miniature's scenes as training data: always the same ones, their pixels, and work on them in batches."""

from concurrent.futures import ProcessPoolExecutor

from cli import atomic_write

import numpy as np
import torch
from tqdm import tqdm

from mini.world import random_scene, render


def scenes(count, test=False):
    """The first `count` scenes of training, always the same ones; with `test` held-out ones."""
    return [random_scene(np.random.default_rng([int(test), index]), test) for index in range(count)]


def pixels_of(scenes):
    """Their pixels, uint8 [count, 64, 64, 3]."""
    return np.stack([np.asarray(render(scene)) for scene in scenes])


def kept_pixels(scenes, path):
    """The pixels of many scenes, drawn by all cores the first time and kept in a file."""
    if not path.exists():
        with ProcessPoolExecutor() as pool, atomic_write(path) as beside, open(beside, "wb") as file:
            drawn = tqdm(pool.map(render, scenes, chunksize=256), total=len(scenes), desc="drawing", leave=False)
            np.save(file, np.stack([np.asarray(image) for image in drawn]))
    return np.load(path, mmap_mode="r")


def to_images(pixels, device="cpu"):
    """Pixels uint8 [B, 64, 64, 3] -> images [B, 3, 64, 64] in [-1, 1]."""
    x = torch.from_numpy(np.array(pixels)).to(device)
    return (x.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def in_batches(compute, size, *inputs, desc=None):
    """Call compute(*batch) for batches of the inputs, which are of one length, and join what it returns, tensors."""
    starts = tqdm(range(0, len(inputs[0]), size), desc=desc, unit="batch", leave=False, disable=desc is None)
    return torch.cat([compute(*(values[start : start + size] for values in inputs)) for start in starts])
