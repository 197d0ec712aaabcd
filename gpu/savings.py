"""What an evaluation of an editor may leave out. Nothing here is exact, so nothing is left out unless asked for."""

from dataclasses import dataclass, fields

import torch


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
