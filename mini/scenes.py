"""The miniature's scenes as training data: by number, as pixels, as tensors; and work on them in batches."""

from concurrent.futures import ProcessPoolExecutor

from cli import atomic_write

import numpy as np
import torch
from tqdm import tqdm

from mini.world import random_scene, render


def training_scene(index, test=False):
    """The scene with this number, always the same one; with `test` a held-out one."""
    return random_scene(np.random.default_rng([int(test), index]), test)


def pixels_of(scene):
    """Its pixels [64, 64, 3], uint8."""
    return np.asarray(render(scene))


def scenes(count, folder):
    """(The first `count` training scenes, their pixels uint8 [count, 64, 64, 3]); drawn once and kept in `folder`."""
    path, chosen = folder / f"scenes_{count}.npy", [training_scene(index) for index in range(count)]
    if not path.exists():
        with ProcessPoolExecutor() as pool, atomic_write(path) as beside, open(beside, "wb") as file:
            drawn = tqdm(pool.map(pixels_of, chosen, chunksize=256), total=count, desc="drawing", leave=False)
            np.save(file, np.stack(list(drawn)))
    return chosen, np.load(path, mmap_mode="r")


def to_images(pixels, device="cpu"):
    """Pixels uint8 [B, 64, 64, 3] -> images [B, 3, 64, 64] in [-1, 1]."""
    x = torch.from_numpy(np.array(pixels)).to(device)
    return (x.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def held_out_images(count, device):
    """(`count` held-out scenes, their images [count, 3, 64, 64] in [-1, 1])."""
    chosen = [training_scene(index, test=True) for index in range(count)]
    return chosen, to_images(np.stack([pixels_of(scene) for scene in chosen]), device)


@torch.no_grad()
def in_batches(compute, size, *inputs, desc=None):
    """Call compute(*batch) for batches of the inputs, which are of one length, and join what it returns, tensors."""
    starts = tqdm(range(0, len(inputs[0]), size), desc=desc, unit="batch", leave=False, disable=desc is None)
    return torch.cat([compute(*(values[start : start + size] for values in inputs)) for start in starts])
