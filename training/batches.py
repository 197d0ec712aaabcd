"""What a training step is computed from: its random numbers, and batches of encoded pairs."""

import os

from cli import UserError

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from training.runs import PROCESSES, RANK

ENCODED_AT_ONCE = 16 * 256 * 256  # pixels; the encoder should take less memory than the backward pass
REMEMBERED = 256e6  # bytes of embedded instructions; CLIP ViT-L/14 makes 0.24 MB of each


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


class Instructions:
    """Instructions embedded by the frozen text encoder; up to `REMEMBERED` bytes are not computed twice."""

    def __init__(self, model, device, autocast):
        self.model, self.device, self.autocast, self.known = model, device, autocast, {}
        self.null_text = self([""])  # [1, L, E]

    @torch.no_grad()
    def __call__(self, texts):
        """B texts -> context [B, L, E]."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            with self.autocast():
                contexts = self.model.text_encoder(self.model.tokenizer(new).to(self.device)).float()
            self.known |= dict(zip(new, contexts.unbind(), strict=True))
        found = torch.stack([self.known[text] for text in texts])
        while len(self.known) * found[0].nbytes > REMEMBERED:
            del self.known[next(iter(self.known))]
        return found


@torch.no_grad()
def encode(vae, x, autocast):
    """Images [B, 3, H, W] -> mean and standard deviation of their latents, [B, C, h, w], a few images at a time."""
    latents = []
    for part in x.split(max(1, ENCODED_AT_ONCE // (x.shape[2] * x.shape[3]))):
        with autocast():
            latents.append(vae.encode(part))
    mean = torch.cat([latent.mode().float() for latent in latents])
    return mean.contiguous(), torch.cat([(0.5 * latent.logvar.float()).exp() for latent in latents]).contiguous()


class ImageBatches:
    """Batches from images on disk, read and cropped by worker processes and encoded at every step."""

    def __init__(self, dataset, model, device, autocast, settings, steps, workers):
        self.vae, self.device, self.autocast = model.vae, device, autocast
        self.instructions = Instructions(model, device, autocast)
        keys = batch_keys(len(dataset), settings, steps)
        self.batches = iter(
            DataLoader(Batches(dataset), None, sampler=keys, num_workers=workers, worker_init_fn=leave_group)
        )

    def __call__(self, draws):
        """(latent, image_latent, text) of the rows of a `Draws`, as `ip2p.loss` takes them."""
        draws.integers(1)  # `batch_keys` has drawn the edits from the same generator
        batch = next(self.batches)
        if isinstance(batch, UserError):
            raise batch
        before, after, texts = batch
        mean, deviation = encode(self.vae, torch.cat([before, after]).to(self.device), self.autocast)
        image_latent, mean = mean.chunk(2)
        sample = mean + deviation.chunk(2)[1] * draws.normal(*mean.shape[1:]).to(self.device)
        return sample * self.vae.config.scaling, image_latent, self.instructions(texts)


def batch_keys(count, settings, steps):
    """For each micro-batch of all steps, its keys (edit, example number) of an `EditDataset` of `count` edits."""
    for step in steps:
        for micro in range(settings.grad_accum):
            draws = draws_of(settings, step, micro)
            first = settings.seed * 10**10 + step * draws.total
            examples = range(first + draws.rows.start, first + draws.rows.stop)
            yield list(zip(draws.integers(count).tolist(), examples, strict=True))


class Batches(Dataset):
    """Batches of an `EditDataset` by their keys; an error is returned, or it would arrive as a traceback."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, keys):
        """before [B, 3, H, W], after, and the instructions; or a UserError."""
        try:
            before, after, texts = zip(*[self.dataset[key] for key in keys], strict=True)
            return torch.stack(before), torch.stack(after), list(texts)
        except UserError as error:
            return error


def leave_group(worker):
    """Put a worker into a process group of its own: Ctrl-C ends the training, which needs it until then."""
    os.setpgrp()


class LatentBatches:
    """All pairs of all edits as latents in memory, encoded once; a step draws an edit, then one of its pairs."""

    def __init__(self, dataset, model, device, autocast, flip, first_only=False):
        """flip: every pair is there mirrored, too. first_only: only the first pair of each edit. Raises UserError."""
        self.device, self.instructions = device, Instructions(model, device, autocast)
        self.scaling, self.copies, self.texts, self.first, self.pairs = model.vae.config.scaling, 1 + flip, [], [], []
        means, deviations, shape = [], [], None
        for index, (_, seeds) in enumerate(tqdm(dataset.edits, desc="encoding", leave=False, disable=RANK > 0)):
            found = [pair for k in range(len(seeds)) if (pair := dataset.load_pair(index, k))]
            found = found[:1] if first_only else found
            for before, after, text in found:
                shape = shape or before.shape
                if before.shape != shape:
                    raise UserError("the images of the data set differ in size; use --resolution")
                x = torch.stack([before, after])
                x = torch.cat([x, x.flip(3)]) if flip else x
                mean, deviation = encode(model.vae, x.to(device), autocast)
                means.append(mean.cpu().unflatten(0, (-1, 2)))  # [copies, 2, C, h, w]
                deviations.append(deviation.cpu()[1::2])
                self.texts.append(text)
            if found:
                self.pairs.append(len(found))
                self.first.append(len(self.texts) - len(found))
        if not self.texts:
            raise UserError(f"{dataset.root} holds no whole pair")
        self.means, self.deviations = torch.stack(means), torch.stack(deviations)
        self.first, self.pairs = torch.tensor(self.first), torch.tensor(self.pairs)

    def __call__(self, draws):
        """(latent, image_latent, text) of the rows of a `Draws`, as `ip2p.loss` takes them."""
        edit = draws.integers(len(self.pairs))
        pair = self.first[edit] + (draws.uniform() * self.pairs[edit]).long()
        copy = draws.integers(self.copies)
        image_latent, mean = self.means[pair, copy].to(self.device).unbind(1)
        noise = draws.normal(*mean.shape[1:]).to(self.device)
        sample = mean + self.deviations[pair, copy].to(self.device) * noise
        return sample * self.scaling, image_latent, self.instructions([self.texts[i] for i in pair.tolist()])
