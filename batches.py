"""What a training step is computed from: which pairs, and which random numbers.

All examples that a run computes stand in one order, and what chance says of an example follows from the seed and its
position there. So it does not matter who computes it: a run that was stopped, or goes on with another number of
processes, sees what it would have seen, and no pair comes twice or is left out.
"""

import hashlib
import os
from functools import lru_cache

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cli import UserError

PIXELS_AT_ONCE = 64 * 64 * 64  # of pictures to encode before a training, which should not take its memory
PIXELS_IN_STEP = 16 * 256 * 256  # the same within a step: the encoder should take less than the training's own way back
TEXTS_AT_ONCE = 64
REMEMBERED = 1e9  # bytes of embedded instructions at most; CLIP ViT-L/14 makes 0.24 MB of each


class Draws:
    """The random numbers of some examples; those of an example depend on nothing but the seed and its position."""

    def __init__(self, seed, positions):
        """positions: whole numbers, the examples' places in the order of all that a run computes."""
        self.seed, self.positions = seed, torch.as_tensor(positions)
        self.generators = [torch.Generator().manual_seed(chance(seed, at)) for at in self.positions.tolist()]

    def __len__(self):
        """How many examples."""
        return len(self.generators)

    def normal(self, *shape):
        """Standard normal numbers [B, *shape]."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])

    def uniform(self):
        """Uniform numbers in [0, 1), [B]."""
        return torch.cat([torch.rand(1, generator=generator) for generator in self.generators])

    def whole(self, high):
        """Whole numbers from 0 to `high` - 1, [B]."""
        return torch.cat([torch.randint(high, (1,), generator=generator) for generator in self.generators])

    def order(self, count):
        """Which of `count` examples of a data set, [B]: in every epoch each of them once, in an order of its own."""
        epochs, places = self.positions // count, self.positions % count
        chosen = torch.empty_like(places)
        for epoch in epochs.unique().tolist():
            chosen[epochs == epoch] = permutation(self.seed, epoch, count)[places[epochs == epoch]]
        return chosen

    def keys(self, count):
        """The same for an `EditDataset` that augments: a list of (place in the data set, seed of the augmentation)."""
        seeds = [chance(self.seed, at, "crop") for at in self.positions.tolist()]
        return list(zip(self.order(count).tolist(), seeds, strict=True))


def chance(*what):
    """A seed for something, unlike the seed for anything else."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=7).digest())


@lru_cache(maxsize=2)
def permutation(seed, epoch, count):
    """The order of `count` examples in an epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(chance(seed, epoch, "epoch")))


class Contexts:
    """Instructions embedded by a text encoder, none of them twice as long as it is remembered."""

    def __init__(self, model, device, precision):
        """model: a `checkpoint.Model`; precision: as for `LatentPairs`."""
        self.model, self.device, self.precision, self.known = model, device, precision, {}
        self.null_text = self([""])  # [1, L, E]

    @torch.no_grad()
    def __call__(self, texts):
        """A list of B texts -> context [B, L, E]."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        found = {text: self.known[text] for text in texts if text not in new}
        for first in range(0, len(new), TEXTS_AT_ONCE):
            part = new[first : first + TEXTS_AT_ONCE]
            with self.precision():
                contexts = self.model.text_encoder(self.model.tokenizer(part).to(self.device))
            found.update(zip(part, contexts.float(), strict=True))
        self.known.update(found)
        most = REMEMBERED / self.null_text.nbytes if len(self.known) > 1 else 1
        while len(self.known) > most:  # those that were met first go first
            del self.known[next(iter(self.known))]
        return torch.stack([found[text] for text in texts])


class LatentPairs:
    """A data set as latents, encoded once and kept in memory: for pictures of one size, without random crops.

    With `flip`, every pair is there twice, as it is and mirrored.
    """

    def __init__(self, model, pairs, device, precision, flip=True):
        """model: a `checkpoint.Model`, pairs: an `EditDataset` of pictures of one size, or UserError is raised.

        precision: makes the context in which the autoencoder, which is frozen, computes; half precision is enough.
        """
        self.device, self.contexts, self.texts = device, Contexts(model, device, precision), []
        self.scaling, shape = model.vae.config.scaling, pairs[0][0].shape
        before, after, spread = [], [], []
        at_once = max(1, PIXELS_AT_ONCE // (shape[1] * shape[2]))
        for first in tqdm(range(0, len(pairs), at_once), desc="encoding", leave=False):
            part = [pairs[i] for i in range(first, min(first + at_once, len(pairs)))]
            x_before, x_after, texts = stack(part, shape)
            self.texts += texts
            for mirrored in (False, True)[: 1 + flip]:
                x = torch.cat([x_before, x_after]).to(device)
                with torch.no_grad(), precision():
                    latent = model.vae.encode(x.flip(3) if mirrored else x)
                condition, target = latent.mode().chunk(2)
                before.append(condition.half().cpu())
                after.append(target.half().cpu())
                spread.append((0.5 * latent.logvar.chunk(2)[1]).exp().half().cpu())
        # [pairs, 1 or 2, C, h, w]: as it is, mirrored
        self.before, self.after, self.spread = (
            torch.cat([torch.stack(parts[i : i + 1 + flip], dim=1) for i in range(0, len(parts), 1 + flip)])
            for parts in (before, after, spread)
        )

    def batch(self, draws):
        """(latent, image_latent, text) of a step's rows, as `ip2p.loss` takes them."""
        chosen, noise = draws.order(len(self.texts)), draws.normal(*self.after.shape[2:])
        mirrored = draws.whole(self.before.shape[1])  # Sec. A.1: horizontal flips, p 0.5
        after, spread, image_latent = (x[chosen, mirrored].float() for x in (self.after, self.spread, self.before))
        latent = (after + spread * noise) * self.scaling  # a sample, scaled
        text = self.contexts([self.texts[i] for i in chosen.tolist()])
        return latent.to(self.device), image_latent.to(self.device), text  # the picture's: the mode, unscaled


class PicturePairs:
    """A data set as pictures, augmented, and encoded when their turn comes; processes read them ahead of time."""

    def __init__(self, model, pairs, device, precision, all_draws, workers):
        """pairs: an `EditDataset` with a resolution; all_draws: the `Draws` of every batch that will be asked for."""
        self.model, self.device, self.precision = model, device, precision
        self.contexts = Contexts(model, device, precision)
        keys = (draws.keys(len(pairs)) for draws in all_draws)
        settings = {"batch_size": None, "num_workers": workers, "worker_init_fn": leave_group}
        self.batches = iter(DataLoader(Batches(pairs), sampler=keys, pin_memory=device != "cpu", **settings))

    def batch(self, draws):
        """(latent, image_latent, text) of a step's rows, as `ip2p.loss` takes them."""
        read = next(self.batches)
        if isinstance(read, UserError):
            raise read
        before, after, texts = read
        with self.precision():
            mean, logvar = encode(self.model.vae, torch.cat([before, after]).to(self.device))
        image_latent, mean = mean.float().chunk(2)
        deviation = (0.5 * logvar.float().chunk(2)[1]).exp()
        sample = mean + deviation * draws.normal(*mean.shape[1:]).to(self.device)
        return sample * self.model.vae.config.scaling, image_latent, self.contexts(texts)


@torch.no_grad()
def encode(vae, x):
    """Pictures [B, 3, H, W] -> mean and logvar of their latents, each [B, C, h, w], a few pictures at a time."""
    parts = [vae.encode(part) for part in x.split(max(1, PIXELS_IN_STEP // (x.shape[2] * x.shape[3])))]
    both = torch.cat([latent.mode() for latent in parts]), torch.cat([latent.logvar for latent in parts])
    return tuple(values.contiguous() for values in both)  # whatever memory layout the encoder's last layer left


class Batches(Dataset):
    """Lists of keys instead of single ones; an error is handed on as a value, or it would arrive as a traceback."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __getitem__(self, keys):
        """A batch as `stack` makes it, or the UserError that came instead."""
        try:
            return stack([self.pairs[key] for key in keys])
        except UserError as error:
            return error


def leave_group(worker):
    """Put a reading process into a group of its own: when the others are told to stop, the training still needs it."""
    os.setpgrp()


def stack(pairs, shape=None):
    """Pairs as a batch: before [B, 3, H, W], after, and the instructions. Raises UserError where the shapes differ."""
    before, after, texts = zip(*pairs, strict=True)
    if any(x.shape != (shape or before[0].shape) for x in before + after):
        raise UserError("the pictures of the data set differ in size; one size for all is needed")
    return torch.stack(before), torch.stack(after), list(texts)
