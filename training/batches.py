"""What a training step is computed from: its random numbers, and batches of encoded pairs.

A source of batches is called with `Draws` and returns (latents [3, B, C, h, w], B instructions): the mean of the input
image's latent, then mean and standard deviation of the edited image's, all unscaled.
"""

import os
import signal

from cli import UserError

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset import other_way_round
from training.runs import PROCESSES, RANK

ENCODED_AT_ONCE = 16 * 256 * 256  # pixels; the encoder should take less memory than the backward pass


class Draws:
    """All randomness of a step: drawn for the total batch from (seed, step); each process keeps its own rows."""

    def __init__(self, seed, step, total, rows):
        """rows: a slice of range(total)."""
        self.step, self.total, self.rows = step, total, rows
        self.generator = torch.Generator().manual_seed(seed * 1_000_003 + step)

    def normal(self, *shape):
        """Standard normal numbers [B, *shape]."""
        return torch.randn(self.total, *shape, generator=self.generator)[self.rows]

    def uniform(self):
        """Uniform numbers in [0, 1), [B]."""
        return torch.rand(self.total, generator=self.generator)[self.rows]

    def integers(self, high):
        """Whole numbers from 0 to `high` - 1, [B]."""
        return torch.randint(high, (self.total,), generator=self.generator)[self.rows]


def draws_of(settings, step, micro):
    """The Draws of this process's rows in a micro-batch of a step."""
    total = settings.batch_size * settings.grad_accum * PROCESSES
    first = (micro * PROCESSES + RANK) * settings.batch_size
    return Draws(settings.seed, step, total, slice(first, first + settings.batch_size))


@torch.no_grad()
def encode_pairs(vae, autocast, before, after):
    """Images [B, 3, H, W] before and after -> latents [3, B, C, h, w], as above, a few images at a time."""
    x, latents = torch.cat([before, after]).to(vae.quant_conv.weight.device), []
    for part in x.split(max(1, ENCODED_AT_ONCE // (x.shape[2] * x.shape[3]))):
        with autocast():
            latents.append(vae.encode(part))
    mean = torch.cat([latent.mode().float() for latent in latents])
    deviation = torch.cat([(0.5 * latent.logvar.float()).exp() for latent in latents])
    return torch.stack([*mean.chunk(2), deviation.chunk(2)[1]]).contiguous()


class ImageBatches:
    """Images on disk, read and cropped by worker processes and encoded at every step."""

    def __init__(self, dataset, encode, settings, workers):
        """encode(before, after): `encode_pairs`. The steps are asked for in order, from any step on."""
        self.dataset, self.encode, self.settings, self.workers, self.batches = dataset, encode, settings, workers, None

    def __call__(self, draws):
        """The batch of the rows of a `Draws`."""
        draws.integers(1)  # `keys` has drawn the edits from the same generator
        if self.batches is None:
            options = {"num_workers": self.workers, "worker_init_fn": leave_group}
            self.batches = iter(DataLoader(self.dataset, batch_sampler=self.keys(draws.step), **options))
        try:
            before, after, texts = next(self.batches)
        except (UserError, RuntimeError) as error:  # a worker's comes with its traceback, and its own words last
            died = "" if isinstance(error, UserError) else "a process that reads images failed; try --workers 0: "
            raise UserError(died + str(error).rpartition("Error: ")[2]) from error
        return self.encode(before, after), texts

    def keys(self, start):
        """For each micro-batch from step `start` on, its keys (edit, example number) of the `EditDataset`."""
        for step in range(start, self.settings.max_steps):
            for micro in range(self.settings.grad_accum):
                draws = draws_of(self.settings, step, micro)
                first = self.settings.seed * 10**10 + step * draws.total
                examples = range(first + draws.rows.start, first + draws.rows.stop)
                yield list(zip(draws.integers(len(self.dataset)).tolist(), examples, strict=True))


def leave_group(worker):
    """Keep Ctrl-C from a worker, in a process group of its own: the training, which it ends, needs it until then."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    else:  # on Windows
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class LatentBatches:
    """All pairs of all edits as latents in memory, encoded once; a step draws an edit, then one of its pairs."""

    def __init__(self, dataset, encode, flip=False, first_only=False):
        """flip: every pair is there mirrored, too. first_only: only the first pair of each edit. Raises UserError."""
        latents, self.texts, counts = [], [], []
        for index, (_, seeds) in enumerate(tqdm(dataset.edits, desc="encoding", leave=False, disable=RANK > 0)):
            pairs = [pair for k in range(len(seeds)) if (pair := dataset.load_pair(index, k))]
            pairs = pairs[:1] if first_only else pairs
            for before, after, text in pairs:
                copies = [torch.stack([x, x.flip(2)] if flip else [x]) for x in (before, after)]
                latents.append(encode(*copies).cpu())
                self.texts.append([text, other_way_round(text)])
                if latents[-1].shape != latents[0].shape:
                    raise UserError("the images of the data set differ in size; use --resolution")
            if pairs:
                counts.append(len(pairs))
        self.latents = torch.stack(latents, dim=1)  # [3, pairs, copies, C, h, w]
        self.counts = torch.tensor(counts)  # of pairs, for each edit
        self.first = self.counts.cumsum(0) - self.counts

    def __call__(self, draws):
        """The batch of the rows of a `Draws`."""
        edit = draws.integers(len(self.counts))
        pair = self.first[edit] + (draws.uniform() * self.counts[edit]).long()
        copy = draws.integers(self.latents.shape[2])
        texts = [self.texts[i][k] for i, k in zip(pair.tolist(), copy.tolist(), strict=True)]
        return self.latents[:, pair, copy], texts
