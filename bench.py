"""Speed and memory of our networks and loaders against those of diffusers and transformers, with equal weights.

And of a Prompt-to-Prompt pair against the same with attention maps held in memory, as the papers' code has it.

    python bench.py --runs 3 > benchmarks/cpu.md

Machines are shared and their speed drifts, so the two sides take turns (ours, theirs, ours, theirs, ...) and the RATIO
of each pair counts, not the seconds. Each side runs in a process of its own, so that its peak memory is its own. The
weights are random, which changes no time; both sides must give the same output before anything is timed.
"""

# Nothing heavy is imported before the arguments are read, so that --help and mistakes are answered at once.
import argparse
import datetime
import functools
import gc
import importlib.util
import itertools
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

from errors import UserError, run_program

sys.path.append(str(Path(__file__).resolve().parent / "tests"))

OURS, THEIRS, MAPS = "ours", "diffusers", "with maps"
NETWORKS = {  # what it is, our call, their call
    "unet": ("UNet step, batch 3", lambda net, *inputs: net(*inputs), lambda net, *inputs: net(*inputs).sample),
    "encode": ("VAE encoder", lambda net, x: net.encode(x).mode(), lambda net, x: net.encode(x).latent_dist.mode()),
    "decode": ("VAE decoder", lambda net, z: net.decode(z), lambda net, z: net.decode(z).sample),
    "text": ("text encoder", lambda net, ids: net(ids), lambda net, ids: net(ids).last_hidden_state),
}
PAIRS = {  # Prompt-to-Prompt, beside the same with attention maps in memory
    "p2p-layer": "one layer of self-attention",
    "p2p": "UNet step, batch 4: one pair",
}
LOADS = {"file": "load one file", "folder": "load a folder"}
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}  # most that two outputs may differ, relatively
LEGEND = """\
Times and ratios are medians; a ratio is ours through theirs in one pair of runs, so below 1 we are faster.
Peak memory is what the process holds at most, the programs (0.3 GB) and memory-mapped files included; for
networks on CUDA it is what PyTorch allocates there. The difference is the relative one between the outputs,
or between the weights that were loaded.""".splitlines()
SHORT = 0.5  # seconds; what is faster is repeated for so long, and averaged


class Settings(NamedTuple):
    """What a measuring process has to know."""

    device: str
    dtype: str
    size: int  # pixels of the picture's side
    small: bool  # tiny networks, to try this program


class Row(NamedTuple):
    """One line of the table."""

    what: str
    runs: list  # of pairs (ours, theirs), each (seconds, peak bytes or None)
    error: float  # relative difference of the outputs, or of the weights that were loaded


def parse(arguments=None):
    """The command line: (options, the parts to measure)."""
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description="Compare speed and memory with diffusers; a Markdown table goes to stdout.",
        epilog="Loading writes a 4.3 GB model twice, as a file and as a folder, to a temporary folder below TMPDIR.",
    )
    parser.error = lambda message: parser.exit(2, f"bench.py: {message} (--help shows what is possible)\n")
    names = [*NETWORKS, *PAIRS, "load"]
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    add("--dtype", choices=list(TOLERANCE), default="float32", help="number format of the networks (default: float32)")
    add("--size", type=int, default=512, metavar="PIXELS", help="the picture's side, a multiple of 64 (default: 512)")
    add("--runs", type=int, default=5, metavar="N", help="how often each side has its turn (default: 5)")
    add("--only", default=",".join(names), metavar="LIST", help=f"some of {','.join(names)} (default: all)")
    add("--small", action="store_true", help="tiny networks, to try this program; their times mean nothing")
    options = parser.parse_args(arguments)
    parts = options.only.split(",")
    if unknown := [part for part in parts if part not in names]:
        raise UserError(f"--only knows {', '.join(names)}, not {unknown[0]!r}")
    if options.size < 64 or options.size % 64:
        raise UserError(f"--size should be a multiple of 64, not {options.size}")
    if options.runs < 1:
        raise UserError(f"--runs should be at least 1, not {options.runs}")
    if lacking := [name for name in ("diffusers", "transformers") if not importlib.util.find_spec(name)]:
        raise UserError(f"{' and '.join(lacking)} must be installed: pip install -r requirements-dev.txt")
    return options, parts


def main(arguments=None):
    """Measure what was asked for, then print it."""
    options, parts = parse(arguments)
    # for the processes that use diffusers: nothing is fetched, nothing but the table is printed
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", DIFFUSERS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")

    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine or this torch has no CUDA device; try --device cpu")
    settings = Settings(options.device, options.dtype, options.size, options.small)
    try:
        rows = [compare_networks(part, settings, options.runs) for part in NETWORKS if part in parts]
        pairs = [compare_networks(part, settings, options.runs) for part in PAIRS if part in parts]
        loads, notes = compare_loading(settings, options.runs) if "load" in parts else ([], [])
    except (BrokenProcessPool, torch.OutOfMemoryError) as error:  # the first one also where the system ends a process
        raise UserError("there is not enough memory; try a smaller --size, or fewer parts with --only") from error
    arguments = sys.argv[1:] if arguments is None else arguments
    lines = [*heading(settings, arguments), ""]
    if rows + loads:
        lines += [*table(rows + loads), ""]
    if pairs:
        lines += ["## Prompt-to-Prompt, beside the same with attention maps in memory", "", *table(pairs, MAPS), ""]
    print("\n".join([*lines, *LEGEND, "", *notes]).rstrip())


# ---- in the main process ----


def compare_networks(part, settings, runs):
    """One network, on both sides -> Row. Raises UserError if the outputs differ."""
    what, other = (NETWORKS[part][0], THEIRS) if part in NETWORKS else (PAIRS[part], MAPS)
    with own_process() as our_process, own_process() as their_process:

        def both(function):
            """Call a function in our process, then in theirs: (result, result)."""
            ours = our_process.submit(function, OURS, part, settings).result()
            return ours, their_process.submit(function, other, part, settings).result()

        say(f"{what}: making the networks and warming up")
        error = relative_error(*both(first_output))
        if not error <= TOLERANCE[settings.dtype]:
            raise UserError(f"{what}: the outputs of the two sides differ by {error:.1e}; their times mean nothing")
        pairs = []
        for _ in range(runs):
            pairs.append(both(timed))
            say_pair(what, pairs[-1], other)
    return Row(what, pairs, error)


def compare_loading(settings, runs):
    """A whole model, as one file and as a folder, by both sides -> (Rows, lines to print below the table).

    Tensors may stay in the memory-mapped file until they are first used. So each load has two lines: the call alone,
    and the call with the reading of every weight.
    """
    rows, notes = [], []
    with tempfile.TemporaryDirectory(prefix="ip2p-bench-") as folder:
        say("writing the models to load")
        with own_process() as process:
            size = process.submit(write_models, folder, settings).result()
        for kind, what in LOADS.items():
            calls, reads, errors = [], [], []
            for _ in range(runs):
                loads = []
                for side in (OURS, THEIRS):
                    with own_process() as process:
                        loads.append(process.submit(load, side, kind, folder, settings).result())
                call, read, norms = zip(*loads, strict=True)
                calls.append(call)
                reads.append(read)
                errors.append(relative_error(*norms))
                say_pair(what, call)
            if not max(errors) <= 1e-6:
                raise UserError(f"{what}: the two sides loaded different weights; their times mean nothing")
            rows += [Row(what, calls, max(errors)), Row(f"{what}, read all weights", reads, max(errors))]
            ours, theirs = (f"{count / size:.2f}" if count else "unknown" for count in peaks(reads))
            notes.append(f"- {what}: {gigabytes(size)}; the peak memory is {ours} (ours) and {theirs} times that.")
    return rows, notes


def own_process():
    """A process that starts from nothing and keeps what it makes until its `with` block ends."""
    quiet = (signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=signal.signal, initargs=quiet)


def relative_error(ours, theirs):
    """|ours - theirs| / |theirs| of two arrays; not a number where one holds what is none."""
    import numpy as np

    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def heading(settings, arguments):
    """What was measured, where and when: lines."""
    import torch

    if settings.device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        linux = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.*)", linux.read_text() if linux.exists() else "")
        machine = f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"
    names = [name for name in ("torch", "diffusers", "transformers", "accelerate") if importlib.util.find_spec(name)]
    lacking = "" if "accelerate" in names else ", WITHOUT accelerate: diffusers loads slowly"
    size = "tiny networks" if settings.small else "networks of Stable Diffusion 1.5's size"
    return [
        "# Speed and memory against diffusers",
        "",
        f"- command: `{shlex.join(['python', 'bench.py', *arguments])}`",
        f"- device: {settings.device}, {machine}",
        f"- versions: {', '.join(f'{name} {version(name)}' for name in names)}{lacking}",
        f"- measured: {size}, {settings.size}x{settings.size} pixels, {settings.dtype}, random weights",
        f"- date: {datetime.date.today()}",
    ]


def table(rows, other=THEIRS):
    """The rows in Markdown: lines."""
    lines = [
        f"| | ours | {other} | ratio | its range | peak, ours | peak, {other} | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for what, pairs, error in rows:
        ours, theirs = ([seconds for seconds, _ in side] for side in zip(*pairs, strict=True))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        cells = [
            what,
            f"{median(ours):.3g} s",
            f"{median(theirs):.3g} s",
            f"**{median(ratios):.3f}**",
            f"{min(ratios):.3f} to {max(ratios):.3f}",
            *(gigabytes(count) for count in peaks(pairs)),
            f"{error:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def peaks(pairs):
    """The highest peak of either side, in bytes, or None where it is unknown."""
    return [max((count for _, count in side if count), default=None) for side in zip(*pairs, strict=True)]


def gigabytes(count):
    """Bytes for people."""
    return "unknown" if count is None else f"{count / 1e9:.2f} GB"


def say(message):
    """Progress, on stderr: stdout is for the table."""
    print(f"bench.py: {message}", file=sys.stderr, flush=True)


def say_pair(what, pair, other=THEIRS):
    """The seconds of one turn each."""
    say(f"{what}: {pair[0][0]:.3g} s ours, {pair[1][0]:.3g} s {other}")


# ---- in the measuring processes ----


def first_output(side, part, settings):
    """Make a network and run it once, which warms it up -> its output as an array."""
    run = prepared(side, part, settings)
    forget_peak(settings.device)
    return run().float().cpu().numpy()


def timed(side, part, settings):
    """(seconds a run takes, peak bytes so far)."""
    run = prepared(side, part, settings)
    synchronise(settings.device)
    runs, start, elapsed = 0, time.perf_counter(), 0
    while elapsed < SHORT:
        run()
        synchronise(settings.device)
        runs, elapsed = runs + 1, time.perf_counter() - start
    return elapsed / runs, peak(settings.device)


@functools.cache
def prepared(side, part, settings):
    """Make one side's network and its input, both the same on either side -> the function () -> output."""
    import torch

    model = blank_model(settings.small, in_channels=4 if part in PAIRS else 8)
    unet, vae, text = model.unet.config, model.vae.config, model.text_encoder.config
    network = {"text": model.text_encoder, "encode": model.vae, "decode": model.vae}.get(part, model.unet)
    if part != "p2p-layer":  # which needs no weights, so that its peak memory is its own
        randomised(network)
    if side == THEIRS:
        import reference  # the tests' way to diffusers and transformers

        make = {"unet": reference.unet_reference, "text": reference.text_reference}.get(part, reference.vae_reference)
        network = make(network)
    if part != "p2p-layer":
        network.to(settings.device, getattr(torch, settings.dtype))

    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(settings.device, getattr(torch, settings.dtype))

    latent = settings.size // vae.factor
    if part in PAIRS:
        return pair_prepared(part, side, network, noise, latent, text.tokens)
    if part == "unet":
        z, t = noise(3, unet.in_channels, latent, latent), torch.full((3,), 500.0, device=settings.device)
        inputs = z, t, noise(3, text.tokens, text.width)
    elif part == "text":
        ids = torch.randint(text.end_token, (1, text.tokens), generator=generator)
        inputs = (ids.to(settings.device),)
    else:
        inputs = (noise(1, 3, settings.size, settings.size) if part == "encode" else noise(1, 4, latent, latent),)
    _, ours, theirs = NETWORKS[part]
    return torch.no_grad()(functools.partial(ours if side == OURS else theirs, network, *inputs))


def pair_prepared(part, side, unet, noise, latent, tokens):
    """One side's function () -> output of a pair, sampled at a step at which its control acts."""
    import torch

    from attention import Layer
    from p2p import PairControl

    def with_maps(q, k, v, layer):
        """The control as the papers write it: the second picture's map is overwritten by the first one's."""
        maps = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)  # [4, H, N, M]
        if not layer.cross:
            maps[1::2] = maps[::2]
        return maps @ v

    level, z = unet.config.levels[0], noise(4, unet.config.in_channels, latent, latent)
    attend = PairControl(100, self_share=torch.tensor([0.9], device=z.device)) if side == OURS else with_maps
    if part == "p2p-layer":
        q, k, v = (noise(4, level.heads, latent**2, level.channels // level.heads) for _ in range(3))
        return torch.no_grad()(functools.partial(attend, q, k, v, Layer(0, "down", False, (latent, latent))))
    inputs = z, torch.full((4,), 999.0, device=z.device), noise(4, tokens, unet.config.context_width)
    return torch.no_grad()(functools.partial(unet, *inputs, attend=attend))


def blank_model(small, in_channels=8):
    """A model of Stable Diffusion 1.5's size whose weights take no memory yet; or a tiny one. 8 channels: an editor."""
    import torch
    from random_model import random_model
    from tokenizers.pre_tokenizers import ByteLevel

    from checkpoint import Model
    from clip_text import CLIP_L_TEXT, END, START, CLIPText, CLIPTokenizer
    from unet import STABLE_DIFFUSION, UNet
    from vae import STABLE_DIFFUSION_VAE, VAE

    if small:
        return random_model(in_channels=in_channels)
    # a tokenizer of CLIP's size and making, but with made-up merges
    letters = sorted(ByteLevel.alphabet())
    pieces = letters + [letter + "</w>" for letter in letters]
    merges = list(itertools.islice(itertools.product(letters, pieces), CLIP_L_TEXT.vocabulary - len(pieces) - 2))
    pieces += [left + right for left, right in merges] + [START, END]
    tokenizer = CLIPTokenizer({piece: number for number, piece in enumerate(pieces)}, merges)
    with torch.device("meta"):
        unet = UNet(replace(STABLE_DIFFUSION, in_channels=in_channels))
        return Model(unet, VAE(STABLE_DIFFUSION_VAE), CLIPText(CLIP_L_TEXT), tokenizer)


def randomised(network):
    """Give a network memory and seeded random weights, and return it."""
    from random_model import randomise

    return randomise(network.to_empty(device="cpu"), seed=0).eval().requires_grad_(False)


def write_models(folder, settings):
    """Write "model" and "tiny", each as a folder and as one file beside it -> the bytes of model.safetensors."""
    from checkpoint import save_folder, save_single_file

    for name, small in [("model", settings.small), ("tiny", True)]:
        model, path = blank_model(small), Path(folder, name)
        for network in (model.unet, model.vae, model.text_encoder):
            randomised(network)
        save_folder(model, path)
        save_single_file(model, path.with_suffix(".safetensors"))
    os.sync()  # the disk is quiet when the clock runs; what was written stays in the system's cache
    return Path(folder, "model.safetensors").stat().st_size


def load(side, kind, folder, settings):
    """Load "model" -> (seconds, peak bytes) of the call; the same with all weights read; the networks' norms [3]."""
    import numpy as np
    import torch

    kinds = {"device": settings.device, "dtype": getattr(torch, settings.dtype)}

    def stop():
        synchronise(settings.device)
        return time.perf_counter() - start, peak("cpu")

    opened(side, kind, Path(folder, "tiny"), **kinds)  # what a process does once, importing above all, is not counted
    gc.collect()
    forget_peak("cpu")
    start = time.perf_counter()
    model = opened(side, kind, Path(folder, "model"), **kinds)
    call = stop()
    networks = (model.unet, model.vae, model.text_encoder)
    norms = np.array([sum(torch.linalg.vector_norm(w).item() for w in net.parameters()) for net in networks])
    return call, stop(), norms


def opened(side, kind, folder, device, dtype):
    """Load a model from its folder, or from the single file beside it, of which the folder holds what it lacks."""
    file = folder.with_suffix(".safetensors")
    if side == OURS:
        import checkpoint

        return checkpoint.load(file if kind == "file" else folder, device, dtype, tokenizer=folder)
    from diffusers import StableDiffusionInstructPix2PixPipeline as Pipeline

    if kind == "file":
        return Pipeline.from_single_file(file, config=str(folder), dtype=dtype).to(device)
    return Pipeline.from_pretrained(folder, dtype=dtype).to(device)


def synchronise(device):
    """Wait until the device has done its work."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def forget_peak(device):
    """Let the peak memory start anew from what is held now."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak(device):
    """The most bytes held since `forget_peak`; None where Linux does not tell.

    Not getrusage's ru_maxrss, which never falls and which a process inherits from the one that starts it.
    """
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: processes and temporary files are removed
    run_program(main)
