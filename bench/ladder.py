"""The ladder: a step of an edit from its textbook form to its fast form, one trick a rung, with diffusers beside it.

    python -m bench --only ladder

A step is one call of the UNet with the three branches of Eq. 3 as one batch. `our_rungs` shows every trick as one line.
In each round every rung has one turn, and ratios are taken within the round, since the speed of machines drifts. The
floor is the time that the step's operations would take at the best rate of a large matrix product, measured alongside.
"""

# Nothing heavy is imported here, since bench.py answers --help and mistakes at once.
import copy
import functools
import os
import tempfile
import time
from statistics import median
from typing import NamedTuple

from cli import UserError

from bench.sides import (
    OURS,
    THEIRS,
    TOLERANCE,
    blank_model,
    first_output,
    forget_peak,
    gigabytes,
    held,
    made,
    own_process,
    peak,
    relative_error,
    say,
    seconds_each,
    step_inputs,
    timed,
)

LABELS = {  # the rungs from the bottom up; a "+" has all that is above it in the table
    "reference": "reference attention",
    "fused": "+ fused attention",
    "compiled": "+ compiled",
    "channels_last": "+ channels_last",
    "graphs": "+ CUDA graphs",
    "diffusers": "diffusers",
    "diffusers_compiled": "diffusers, compiled",
    "diffusers_graphs": "diffusers, CUDA graphs",
}
GRAPHS = ("graphs", "diffusers_graphs")
COMPILED = ("compiled", "channels_last", "diffusers_compiled", *GRAPHS)  # on CUDA alone: on a CPU it does not pay
STEPS = 100  # of an edit
BESIDE = ("text", "encode", "decode")  # what an edit runs once, beside its steps
LEGEND = f"""\
Each rung with a "+" has one trick more than the one above it. Step times are medians over the rounds, in each of which
every rung has one turn. A ratio is the time of the rung through that of another in the same round, so below 1 the rung
is faster: the median over the rounds, and from the least to the most. An edit is {STEPS} such steps, and text encoder,
VAE encoder and decoder once, never compiled: these times were measured, their sum was not. Step memory is what a step
takes at most beyond what is held between steps (weights, inputs): on a CPU roughly, since the system's allocator keeps
some, or all; CUDA graphs hold theirs for good, so it is not told. The first call of a compiled rung compiles it: of
each side, the first one begins with an empty cache, and others find some of their code there. The difference is the
relative one between the outputs of the rung and of the first.
TFLOP/s are the operations of the step as the textbook has it, whichever of them a rung saves; an addition counts as
one, a multiplication as another. The ceiling is the best rate of a large square matrix product in the same number
format; on CUDA, float32 means TF32 there, which torch's convolutions use as well.""".splitlines()


class Rung(NamedTuple):
    """One rung, measured."""

    name: str
    first: float  # seconds of the first call
    error: float  # relative difference between its output and the first rung's
    turns: list  # one a round: (seconds a step, bytes beyond what is held between steps, or None)

    @property
    def step(self):
        """The median seconds of a step."""
        return median(seconds for seconds, _ in self.turns)


class Ladder(NamedTuple):
    """All that was measured."""

    rungs: list
    beside: dict  # {side: seconds of an edit beside its steps}
    flops: int  # of a step
    ceiling: float  # FLOP/s

    @property
    def floor(self):
        """The seconds of a step at the ceiling."""
        return self.flops / self.ceiling


def chosen(listed, device):
    """The rungs to measure, in the ladder's order. listed: names, or None for all. Raises UserError."""
    possible = [name for name in LABELS if device == "cuda" or name not in COMPILED]
    if listed is None:
        return possible
    if unknown := [name for name in listed if name not in possible]:
        raise UserError(f"--rungs knows {', '.join(possible)} here, not {unknown[0]!r}")
    return [name for name in possible if name in listed]


def side_of(name):
    """Whose a rung is."""
    return THEIRS if name.startswith(THEIRS) else OURS


def measure(names, settings, runs):
    """Measure the rungs in turns -> Ladder. Raises UserError if the output of one differs from the first one's."""
    with (
        tempfile.TemporaryDirectory(prefix="ip2p-bench-") as cache,
        own_process() as ours,
        own_process() as theirs,
        own_process() as product,
    ):
        processes = {OURS: ours, THEIRS: theirs}

        def on_its_side(function, name, *arguments):
            return processes[side_of(name)].submit(function, name, settings, *arguments).result()

        firsts, outputs, errors = {}, {}, {}
        for name in names:
            say(f"{LABELS[name]}: the first call{', which compiles for minutes' if name in COMPILED else ''}")
            firsts[name], outputs[name] = on_its_side(first_call, name, cache)
            errors[name] = relative_error(outputs[name], outputs[names[0]])
            if not errors[name] <= TOLERANCE[settings.dtype]:
                raise UserError(
                    f"{LABELS[name]}: the output differs by {errors[name]:.1e} from that of "
                    f"{LABELS[names[0]]}; the times mean nothing"
                )
        beside = {side: time_beside(processes[side], side, settings) for side in dict.fromkeys(map(side_of, names))}
        turns, rates = {name: [] for name in names}, []
        for number in range(runs):
            for name in names:
                turns[name].append(on_its_side(turn, name))
                say(f"round {number + 1} of {runs}, {LABELS[name]}: {short(1e3 * turns[name][-1][0])} ms")
            rates.append(product.submit(product_rate, settings).result())
    rungs = [Rung(name, firsts[name], errors[name], turns[name]) for name in names]
    return Ladder(rungs, beside, step_flops(settings), max(rates))


def time_beside(process, side, settings):
    """The seconds of what an edit runs once, on one side."""
    seconds = 0
    for part in BESIDE:
        say(f"{side}: {part}, which an edit runs once")
        process.submit(first_output, side, part, settings).result()  # warms up
        seconds += process.submit(timed, side, part, settings).result()[0]
    return seconds


# ---- in a side's process ----


@functools.cache
def prepared_rungs(side, settings):
    """Make one side's network, once -> {name of a rung: the function () -> eps [3, C, H, W]}."""
    import torch

    network, configs, noise = made(side, "unet", settings)
    inputs = step_inputs(configs, noise, settings)
    rungs = our_rungs(network, *inputs) if side == OURS else their_rungs(network, *inputs)
    return {name: torch.no_grad()(run) for name, run in rungs.items()}


def our_rungs(unet, z, t, context):
    """The functions of our rungs; from one to the next, one thing changes."""
    import torch

    from attention import fused, reference

    nhwc, z_nhwc = in_channels_last(unet), z.to(memory_format=torch.channels_last)
    fast, fast_nhwc, graphs = compiled_thrice(unet, nhwc)
    return {
        "reference": lambda: unet(z, t, context, reference),
        "fused": lambda: unet(z, t, context, fused),
        "compiled": lambda: fast(z, t, context),
        "channels_last": lambda: fast_nhwc(z_nhwc, t, context),
        "graphs": lambda: graphs(z_nhwc, t, context),
    }


def compiled_thrice(network, nhwc):
    """A network compiled, the same in channels_last, and that as CUDA graphs."""
    import torch

    compiled = functools.partial(torch.compile, dynamic=False, fullgraph=True)
    return compiled(network), compiled(nhwc), compiled(nhwc, mode="reduce-overhead")


def their_rungs(unet, z, t, context):
    """The functions of diffusers' rungs: its UNet as it is, and as its documentation makes it fast."""
    import torch

    network, latent = in_channels_last(unet), z.to(memory_format=torch.channels_last)
    _, fast, graphs = compiled_thrice(unet, network)
    return {
        "diffusers": lambda: unet(z, t, context).sample,
        "diffusers_compiled": lambda: fast(latent, t, context).sample,
        "diffusers_graphs": lambda: graphs(latent, t, context).sample,
    }


def in_channels_last(network):
    """A copy whose convolutions have their weights in that layout; all other weights are the network's own."""
    import torch

    shared = {id(weight): weight for weight in network.parameters() if weight.dim() != 4}
    return copy.deepcopy(network, shared).to(memory_format=torch.channels_last)


def first_call(name, settings, cache):
    """(seconds of a rung's first call, its output as an array). cache: a folder for what the compiler makes."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(cache, side_of(name))
    run = prepared_rungs(side_of(name), settings)[name]
    start = time.perf_counter()
    output = run().float().cpu().numpy()
    seconds = time.perf_counter() - start
    if name in GRAPHS:  # which are recorded at the second call
        run()
        run()
    return seconds, output


def turn(name, settings):
    """(seconds a step of a rung takes, bytes it takes beyond what is held before, or None where it is not known)."""
    run = prepared_rungs(side_of(name), settings)[name]
    forget_peak(settings.device)
    before = held(settings.device)
    seconds = seconds_each(run, settings.device)
    most = peak(settings.device)
    return seconds, None if name in GRAPHS or most is None else most - before


# ---- the floor ----


def product_rate(settings):
    """FLOP/s of a large square matrix product."""
    import torch

    if settings.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, which convolutions use from the start
    side = 512 if settings.small else 8192 if settings.device == "cuda" else 4096
    a, b = torch.randn(2, side, side, generator=torch.Generator().manual_seed(0)).to(
        settings.device, getattr(torch, settings.dtype)
    )
    run = functools.partial(torch.mm, a, b)
    run()  # warms up
    return 2 * side**3 / seconds_each(run, settings.device)


def step_flops(settings):
    """The floating-point operations of a step with reference attention, counted without doing them."""
    import torch

    from attention import reference

    model, nowhere = blank_model(settings.small), "meta"  # where tensors have shapes alone
    configs = model.unet.config, model.vae.config, model.text_encoder.config
    inputs = step_inputs(configs, functools.partial(torch.empty, device=nowhere), settings._replace(device=nowhere))
    return flops(functools.partial(model.unet.to(nowhere), *inputs, reference))


def flops(function):
    """The floating-point operations of the matrix products and convolutions in a call."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


# ---- what is printed ----


def report(ladder):
    """The ladder in Markdown: lines."""
    bases = [ladder.rungs[0], *(rung for rung in ladder.rungs[1:] if side_of(rung.name) == THEIRS)]
    ratios = " | ".join(f"through {LABELS[rung.name]}" for rung in bases)
    columns = f"a step | an edit | {ratios} | step memory | TFLOP/s | of the ceiling | first call"
    lines = [
        "## The ladder: a UNet step, batch 3, from the textbook form to the fast form",
        "",
        f"| | {columns} | difference |",
        "|---" * (columns.count("|") + 3) + "|",
    ]
    for rung in ladder.rungs:
        rate = ladder.flops / rung.step
        cells = [
            LABELS[rung.name],
            f"{short(1e3 * rung.step)} ms",
            f"{short(STEPS * rung.step + ladder.beside[side_of(rung.name)])} s",
            *(ratio_text(base, rung) for base in bases),
            gigabytes(max((count for _, count in rung.turns if count is not None), default=None)),
            short(rate / 1e12),
            f"{rate / ladder.ceiling:.0%}",
            f"{short(rung.first)} s",
            f"{rung.error:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    beside = ", ".join(f"{short(seconds)} s ({side})" for side, seconds in ladder.beside.items())
    return [
        *lines,
        "",
        f"- {floor_text(ladder)}",
        f"- an edit beside its steps: {beside}",
        "",
        *LEGEND,
    ]


def ratio_text(base, rung):
    """The times of a rung through those of another, a round each: the median, and from the least to the most."""
    ratios = [a / b for (a, _), (b, _) in zip(rung.turns, base.turns, strict=True)]
    return f"**{median(ratios):.3f}** ({min(ratios):.3f} to {max(ratios):.3f})"


def floor_text(ladder):
    """The floor in words."""
    operations, rate = short(ladder.flops / 1e12), short(ladder.ceiling / 1e12)
    return f"the floor: {short(1e3 * ladder.floor)} ms, for {operations} TFLOP at the ceiling of {rate} TFLOP/s"


def short(number):
    """Three digits for people, or all that stand before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
