"""Which numbers stand at an axis."""

import math


def ticks(low, high, most=7, whole=False):
    """At most `most` + 1 round numbers between two: multiples of 1, 2 or 5 times a power of ten, or whole ones."""
    power = 10.0 ** max(math.floor(math.log10((high - low) / most)), 0 if whole else -99)
    unit = next(unit for unit in (power, 2 * power, 5 * power, 10 * power) if (high - low) / unit <= most)
    return [round(unit * i, 12) for i in range(math.ceil(low / unit), math.floor(high / unit) + 1)]


def log_ticks(low, high):
    """Round numbers between two for a log scale: powers of ten, their 2 and 5 fold; evenly spaced where few fit."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    found = [10.0**power * factor for power in powers for factor in ((1, 2, 5) if len(powers) < 5 else (1,))]
    found = [value for value in found if low <= value <= high]
    return found if len(found) > 2 else ticks(low, high)
