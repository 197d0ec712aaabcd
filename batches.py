"""What a training step is computed from: which pairs, and which random numbers.

Both follow from (seed, step) alone. Whoever computes a part of a batch, one process of many or one piece of several,
draws for the whole batch and takes its own rows. So a run that was stopped, or goes on with another number of
processes, sees what it would have seen, and no pair comes twice or is left out.
"""

from functools import lru_cache

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from errors import UserError

ENCODED_AT_ONCE = 64
REMEMBERED = 1e9  # bytes of embedded instructions at most; CLIP ViT-L/14 makes 0.24 MB of each


class Draws:
    """The random numbers of some rows of a step's batch."""

    def __init__(self, seed, step, total, rows=slice(None)):
        """total: the examples of the step's whole batch; rows: the slice of it that is wanted."""
        self.seed, self.total, self.rows = seed, total, rows
        self.generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        self.positions = torch.arange(step * total, (step + 1) * total)[rows]  # in the order of all examples of a run

    def __len__(self):
        """How many rows."""
        return len(self.positions)

    def normal(self, *shape):
        """Standard normal numbers [rows, *shape]."""
        return torch.randn(self.total, *shape, generator=self.generator)[self.rows]

    def uniform(self):
        """Uniform numbers in [0, 1), [rows]."""
        return torch.rand(self.total, generator=self.generator)[self.rows]

    def whole(self, high):
        """Whole numbers from 0 to `high` - 1, [rows]."""
        return torch.randint(high, (self.total,), generator=self.generator)[self.rows]

    def order(self, count):
        """Which of `count` examples, [rows]: in every epoch each of them once, in an order of the epoch's own."""
        epochs, places = self.positions // count, self.positions % count
        chosen = torch.empty_like(places)
        for epoch in epochs.unique().tolist():
            chosen[epochs == epoch] = permutation(self.seed, epoch, count)[places[epochs == epoch]]
        return chosen


@lru_cache(maxsize=2)
def permutation(seed, epoch, count):
    """The order of `count` examples in an epoch."""
    generator = torch.Generator().manual_seed((seed + 1) * 1_000_000_007 + epoch)
    return torch.randperm(count, generator=generator)


class Contexts:
    """Instructions embedded by a text encoder, none of them twice as long as it is remembered."""

    def __init__(self, model, device):
        """model: a `checkpoint.Model`."""
        self.model, self.device, self.known = model, device, {}
        self.null_text = self([""])  # [1, L, E]

    @torch.no_grad()
    def __call__(self, texts):
        """A list of B texts -> context [B, L, E]."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        found = {text: self.known[text] for text in texts if text not in new}
        for first in range(0, len(new), ENCODED_AT_ONCE):
            part = new[first : first + ENCODED_AT_ONCE]
            found.update(zip(part, self.model.text_encoder(self.model.tokenizer(part).to(self.device)), strict=True))
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
        self.device, self.contexts, self.texts = device, Contexts(model, device), []
        self.scaling, shape = model.vae.config.scaling, pairs[0][0].shape
        before, after, spread = [], [], []
        for first in tqdm(range(0, len(pairs), ENCODED_AT_ONCE), desc="encoding", leave=False):
            part = [pairs[i] for i in range(first, min(first + ENCODED_AT_ONCE, len(pairs)))]
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
        self.contexts = Contexts(model, device)
        keys = (
            list(zip(draws.order(len(pairs)).tolist(), draws.positions.tolist(), strict=True)) for draws in all_draws
        )
        loader = DataLoader(
            Batches(pairs), batch_size=None, sampler=keys, num_workers=workers, pin_memory=device != "cpu"
        )
        self.batches = iter(loader)

    def batch(self, draws):
        """(latent, image_latent, text) of a step's rows, as `ip2p.loss` takes them."""
        read = next(self.batches)
        if isinstance(read, UserError):
            raise read
        before, after, texts = read
        with torch.no_grad(), self.precision():
            latent = self.model.vae.encode(torch.cat([before, after]).to(self.device))
        image_latent, mean = latent.mode().float().chunk(2)
        deviation = (0.5 * latent.logvar.float().chunk(2)[1]).exp()
        sample = mean + deviation * draws.normal(*mean.shape[1:]).to(self.device)
        return sample * self.model.vae.config.scaling, image_latent, self.contexts(texts)


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


def stack(pairs, shape=None):
    """Pairs as a batch: before [B, 3, H, W], after, and the instructions. Raises UserError where the shapes differ."""
    before, after, texts = zip(*pairs, strict=True)
    if any(x.shape != (shape or before[0].shape) for x in before + after):
        raise UserError("the pictures of the data set differ in size; one size for all is needed")
    return torch.stack(before), torch.stack(after), list(texts)
