"""Prompt-to-Prompt: two captions, two pictures, and everything the captions share stays where it is (Sec. 3.1.2).

Both pictures start from the same noise and meet the same ancestral noise. During a first share p of the steps the
second picture also borrows the first one's self-attention maps, which hold the layout (Hertz et al. 2022, as the
authors of InstructPix2Pix ran it). Borrowing a map is attention with the first picture's q and k and the second one's
v, so no map is ever held in memory.
"""

import torch

from attention import fused
from diffusion import euler_ancestral

P_RANGE = (0.1, 0.9)  # Sec. 3.1.2: p ~ U(0.1, 0.9) for every pair


class SharedSelfAttention:
    """An `attend` function for batches [null before, null after, text before, text after], B pairs in each part.

    While a pair is controlled, the queries and keys of its second picture are those of its first. The unconditional
    half borrows from its own half. Step i of n is controlled when p > i / (n - 1), as in the released code; `step` is
    counted up by `next_step`, the sampler's callback.
    """

    def __init__(self, share, steps):
        """share [B]: p of every pair, steps: of the sampler."""
        self.share, self.steps, self.step = share, steps, 0

    def next_step(self, step, sigma, denoised):
        """To be called once a step."""
        self.step = step + 1

    def __call__(self, q, k, v, layer):
        """Attention as in attention.py; the first pictures never depend on the control."""
        if not layer.cross:
            controlled = self.share > self.step / max(1, self.steps - 1)  # [B]
            q, k = self.borrow(q, controlled), self.borrow(k, controlled)
        return fused(q, k, v)

    @staticmethod
    def borrow(x, controlled):
        """Queries or keys [4B, H, N, D] -> the same, where `controlled` [B] the second picture's from the first."""
        before, after = x.unflatten(0, (2, 2, -1)).unbind(1)  # [2, B, H, N, D]: without and with text
        after = torch.where(controlled[:, None, None, None], before, after)
        return torch.stack([before, after], dim=1).flatten(0, 2)


class PairNoise:
    """All random numbers of a batch of pairs; row i is what seed i alone would draw, whatever the batch.

    In the released code's order: the initial noise, p, the guidance scale, then one noise a step for both pictures.
    """

    def __init__(self, seeds, shape, guidance, p=P_RANGE, device="cpu"):
        """seeds: B whole numbers, shape (C, h, w) of a latent, guidance and p: the ranges to draw from."""
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device
        self.first = self.draw()
        self.p = self.uniform(*p)
        self.guidance = self.uniform(*guidance)

    def draw(self):
        """Standard normal noise [2B, C, h, w], equal for both pictures of a pair: before..., after..."""
        rows = [torch.randn(1, *self.shape, generator=g, device=self.device) for g in self.generators]
        return torch.cat(rows).repeat(2, 1, 1, 1)

    def uniform(self, low, high):
        """One uniform number a pair [B]."""
        draws = [torch.rand(1, generator=g, device=self.device) for g in self.generators]
        return low + (high - low) * torch.cat(draws)

    def __iter__(self):
        """The noise of every step."""
        while True:
            yield self.draw()


@torch.no_grad()
def sample_pairs(model, before, after, noise, steps=None, sampler=euler_ancestral):
    """B caption pairs -> (pictures before, pictures after), each [B, 3, H, W], about in [-1, 1].

    model: a `TextToImage`, before and after: lists of B captions, noise: a `PairNoise` of B seeds.
    """
    steps = steps or model.sampling.steps
    sigmas = model.schedule.sigmas(steps)
    attend = SharedSelfAttention(noise.p, steps)
    guidance = noise.guidance.repeat(2)[:, None, None, None]
    denoise = model.denoiser(model.encode_text([*before, *after]), guidance, attend)
    latent = sampler(denoise, noise.first * sigmas[0].item(), sigmas, iter(noise), attend.next_step)
    return model.decode(latent).chunk(2)
