"""What sampling may leave out: parts of an editor's evaluations, and pairs that will not pass the filter.

Nothing here is exact, so nothing is left out unless asked for.
"""

from dataclasses import dataclass, fields

import torch

GIVE_UP_AT = 0.4  # of the steps: when a pair's clean guesses are looked at


@dataclass(frozen=True)
class Savings:
    """What to leave out; the defaults leave out nothing."""

    cfg_above: float = 0.0  # guidance at noise levels sigma from here ...
    cfg_below: float = float("inf")  # ... to here; elsewhere the full branch alone (Kynkäänniemi et al. 2024)
    null_every: int = 1  # the null branch at every k-th evaluation: its difference from the image branch changes slowly
    deep_every: int = 1  # the UNet's inner levels at every k-th evaluation (Ma et al. 2024, DeepCache)

    @classmethod
    def of(cls, options):
        """Those that a command line asks for (see `cli.add_savings`), or None."""
        asked = {field.name: getattr(options, field.name) for field in fields(cls)}
        return cls(**{name: value for name, value in asked.items() if value}) if any(asked.values()) else None

    def applied_to(self, predict, schedule):
        """`predict(z, t, contexts)` -> eps for the rows [3B] of the full, the image and the null branch, sparingly.

        predict: the same, for the first rows alone, with `deep` as in `predict_eps`. schedule: a `NoiseSchedule`, for
        the times of noise levels. What is returned keeps what a run uses again, so it is for one run.
        """
        low, high = schedule.t([self.cfg_above, self.cfg_below]).tolist()
        number, to_null, deep, deep_branches = -1, None, None, 0

        def sparing(z, t, contexts):
            nonlocal number, to_null, deep, deep_branches
            number += 1
            branches = 1
            if low <= t <= high:
                branches = 3 if to_null is None or number % self.null_every == 0 else 2
            if self.deep_every > 1 and (number % self.deep_every == 0 or branches > deep_branches):
                deep, deep_branches = [[] for _ in z], branches
            rows = len(z) // 3 * branches
            parts = predict(z[:rows], t, contexts[:rows], deep=deep).chunk(branches)
            if branches == 1:
                return parts[0].repeat(3, 1, 1, 1)  # Eq. 3 gives it back
            full, image, *rest = parts
            null = rest[0] if rest else image + to_null
            to_null = null - image
            return torch.cat([full, image, null])

        return sparing


def give_up(model, denoise, denoiser_of, fails, steps):
    """A `denoise(x, sigma)` for pairs that leaves out those that fail at GIVE_UP_AT of the steps.

    fails(images before, images after) -> bool [B], from the clean guesses there. What is given up stays as noisy as it
    is; the others are sampled as before, in a smaller batch. denoiser_of(pairs): makes the denoise of some pairs.
    """
    count, pairs = 0, None

    def giving_up(x, sigma):
        nonlocal count, pairs, denoise
        count += 1
        if pairs is not None:
            guess, rows = x.clone(), pairs.repeat(2)
            guess[rows] = denoise(x[rows], sigma) if rows.any() else x[rows]
            return guess
        guess = denoise(x, sigma)
        if count == round(GIVE_UP_AT * steps):
            pairs = ~fails(*model.decode(guess).chunk(2))
            denoise = denoiser_of(pairs)
        return guess

    return giving_up
