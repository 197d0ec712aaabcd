"""Fine-tune a text-to-image model into an editor on pairs of images with instructions (Sec. 3.2, Appendix C).

    python train.py --preset mini --data runs/mini/pairs --init models/mini/sd --out runs/editor
    python train.py --preset mini --data runs/mini/pairs --init models/mini/sd --out runs/one --overfit 1
    torchrun --nproc-per-node 8 train.py --preset paper --data DIR --init SD_1.5 --out runs/paper
    python train.py export --run runs/paper --out editor.safetensors

The UNet gets input channels for the image to edit, their weights zero; autoencoder and text encoder stay frozen. All
that a step draws follows from the seed and the step: neither a stop and --resume nor the number of processes changes
what is learned. In --out: settings.json, states/, metrics.jsonl, loss.png, samples.png, and in the end model/.
"""

import math
import signal
import sys
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, fields
from functools import partial

from cli import UserError, keep_settings, run_program

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.parallel import DistributedDataParallel

from attention import fused, reference
from dataset import EditDataset
from diffusion import NoiseSchedule
from formats.export import choose_weights, export, load_editor, replace_model
from gpu.compiled import compiled
from images import enlarge, grid, save_png, to_image
from ip2p import InstructPix2Pix, loss
from training import runs
from training.batches import Draws, ImageBatches, LatentBatches, draws_of
from training.presets import parse, parse_export
from unet import ResBlock, Transformer

SHOWN, MEASURED = 8, 64  # pairs of the validation split on samples.png; examples of the validation loss
SAME = (  # settings of a run that may not change when it is resumed
    *("seed", "total_batch_size", "data", "init", "trainable", "rank", "resolution", "max_resize", "subset"),
    *("overfit", "cache_latents", "loss_weighting", "sampling_steps", "cfg_text", "cfg_image"),
)


# ---- the loop, which mini/pretrain.py uses, too ----


@dataclass(frozen=True)
class Settings:
    """How a network is trained."""

    max_steps: int
    lr: float
    batch_size: int  # examples that a process computes at once
    grad_accum: int = 1  # micro-batches a step
    warmup_steps: int = 100
    lr_decay: float = 0.33  # the last fraction of all steps, in which the learning rate falls
    beta2: float = 0.99
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    ema_device: str | None = None
    mixed_precision: str = "no"
    seed: int = 0
    save_every: int = 500
    eval_every: int = 500
    keep: int = 2

    def lr_at(self, step):
        """The learning rate at a step: warmup, constant, linear decay."""
        rise = (step + 1) / self.warmup_steps if self.warmup_steps else 1.0
        fall = (self.max_steps - step) / (self.lr_decay * self.max_steps) if self.lr_decay else 1.0
        return self.lr * min(1.0, rise, max(fall, 0.01))


class Loss(nn.Module):
    """loss_of(network, draws) as a module, so that DistributedDataParallel can wrap whatever the loss calls."""

    def __init__(self, network, loss_of):
        super().__init__()
        self.network, self.loss_of = network, loss_of

    def forward(self, draws):
        """The mean loss of the rows of a `Draws`."""
        return self.loss_of(self.network, draws)


def fit(network, loss_of, settings, out, evaluate=None):
    """Train the weights of `network` that require gradients, and leave their moving average (EMA) in their place.

    loss_of(network, draws) -> the mean loss of the rows of a `Draws`, a scalar tensor. evaluate(step), called with the
    EMA in place, in the first process alone: returns numbers for metrics.jsonl. out: a Path; it is resumed if it
    holds states. Raises UserError if the loss or its gradient is NaN or Inf; ends the program after Ctrl-C or SIGTERM.
    """
    names = ((name.replace("_checkpoint_wrapped_module.", ""), weight) for name, weight in network.named_parameters())
    weights = {name: weight for name, weight in names if weight.requires_grad}
    parameters, device = list(weights.values()), next(network.parameters()).device
    ema = [weight.detach().to(settings.ema_device or device, copy=True) for weight in parameters]
    betas, total = (0.9, settings.beta2), settings.batch_size * settings.grad_accum * runs.PROCESSES
    optimizer = torch.optim.AdamW(parameters, settings.lr, betas, weight_decay=settings.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.mixed_precision == "fp16")
    start, seconds = runs.resume(out, weights, ema, optimizer, scaler)
    objective = Loss(network, loss_of)
    if runs.PROCESSES > 1:
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    log = runs.Log(out, settings.max_steps, start, seconds, total)
    with runs.stop_signals() as signals, closing(log):
        for step in range(start, settings.max_steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr_at(step)
            value = torch.zeros((), device=device)
            for micro in range(settings.grad_accum):
                last = micro == settings.grad_accum - 1  # gradients are averaged over the processes there alone
                with nullcontext() if runs.PROCESSES == 1 or last else objective.no_sync():
                    part = objective(draws_of(settings, step, micro)) / settings.grad_accum
                    scaler.scale(part).backward()
                value += part.detach()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, settings.grad_clip or math.inf)
            value, norm, stopped = runs.agree(value, norm, bool(signals))
            if not math.isfinite(value) or not (math.isfinite(norm) or scaler.is_enabled()):
                raise UserError(f"the loss or its gradient is NaN or Inf at step {step + 1} of {out}; lower --lr")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            runs.update_ema(ema, parameters, min(settings.ema_decay, (step + 1) / (step + 10)))
            done = step + 1
            log.step(done, value)
            finished = done == settings.max_steps
            if runs.RANK == 0 and (stopped or finished or done % settings.save_every == 0):
                parts = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "seconds": log.seconds}
                parts |= {"weights": weights, "ema": dict(zip(weights, ema, strict=True))}
                runs.save_state(out, done, parts, settings.keep)
            if runs.RANK == 0 and (finished or done % settings.eval_every == 0):
                with runs.averaged(parameters, ema), torch.no_grad(), log.paused():
                    found = (evaluate and evaluate(done)) or {}
                log.write(done, **found)
                runs.draw_losses(log.path, out / "loss.png")
            if stopped:
                break
    if start < settings.max_steps and done < settings.max_steps:
        if runs.RANK == 0:
            print(f"stopped at step {done}; the same command with --resume continues")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])  # another process may be the one that was told
    runs.copy_into(parameters, ema)
    return network.eval()


# ---- training an editor ----


def train(options):
    """Train, and write the editor as a model folder."""
    out, device = options.out, runs.join(options.device)
    if runs.state_paths(out) and not options.resume:
        raise UserError(f"{out} holds a run; continue it by --resume, or use another --out")
    dataset = EditDataset(
        options.data, "train", options.resolution, options.max_resize,
        flip=0.0 if options.overfit else 0.5, subset=options.overfit or options.subset,
    )  # fmt: skip
    model = load_editor(options.init, device, sampling_of(options))
    sides = dataset[0][0].shape[1:]
    if any(side % model.side_multiple for side in sides):
        raise UserError(f"the images need sides of multiples of {model.side_multiple} pixels; see --resolution")
    if runs.RANK == 0:
        out.mkdir(parents=True, exist_ok=True)
        keep_settings(out / "settings.json", {name: getattr(options, name) for name in SAME})
    unet, schedule = model.unet, NoiseSchedule()
    choose_weights(unet, options.trainable, options.rank)
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    autocast = autocasting(device, options.mixed_precision)
    if options.cache_latents:
        data = LatentBatches(dataset, model, device, autocast, not options.overfit, first_only=bool(options.overfit))
    else:
        steps = range((runs.newest_state(out) or {"step": 0})["step"], settings.max_steps)
        data = ImageBatches(dataset, model, device, autocast, settings, steps, options.workers)
    if options.gradient_checkpointing:  # blocks are computed twice instead of kept (Chen et al. 2016)
        apply_activation_checkpointing(unet, check_fn=lambda layer: isinstance(layer, ResBlock | Transformer))
    # on a CPU torch's fused attention has a slow backward pass, and the miniature's maps are small enough to keep
    attend = reference if device == "cpu" and options.cache_latents else fused
    predict_eps = partial(compiled(unet) if options.compile else unet, attend=attend)

    def editor_loss(draws, batches, t=None, u=None):
        """Eq. 1, its mean over the rows of a `Draws`."""
        latent, image_latent, text = batches(draws)
        t = draws.integers(1000).to(device) if t is None else t
        u = draws.uniform().to(device) if u is None else u
        noise = draws.normal(*latent.shape[1:]).to(device)
        with autocast():
            each = loss(predict_eps, schedule, latent, image_latent, text, batches.instructions.null_text, t, noise, u)
        return (each * schedule.balanced(t)).mean() if options.loss_weighting == "balanced" else each.mean()

    if runs.RANK == 0:
        shown, check = validation(options, dataset, model, device, autocast)
        print(f"{len(dataset)} edits, {options.total_batch_size} pairs a step")

    def evaluate(step):
        """Write samples.png, and return the loss on fixed pairs, times and noise, with no condition dropped."""
        t, value = torch.linspace(0, 999, MEASURED).round().long().to(device), 0.0
        for first in range(0, MEASURED, settings.batch_size):
            rows = slice(first, min(first + settings.batch_size, MEASURED))
            count, draws = rows.stop - first, Draws(0, 0, MEASURED, rows)
            value += editor_loss(draws, check, t[rows], torch.ones(count, device=device)).item() * count / MEASURED
        with autocast():
            write_samples(InstructPix2Pix(model), shown, out / "samples.png")
        return {"validation": round(value, 6)}

    fit(unet, lambda network, draws: editor_loss(draws, data), settings, out, evaluate)
    if runs.RANK == 0:
        replace_model(model, out / "model")
        print(out / "model")


def sampling_of(options):
    """The defaults for sampling that the command line names."""
    return {"steps": options.sampling_steps, "text_guidance": options.cfg_text, "image_guidance": options.cfg_image}


def autocasting(device, precision):
    """A function that makes the context of mixed precision: "no", "bf16" or "fp16"."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return partial(torch.autocast, torch.device(device).type, dtype=dtype, enabled=precision != "no")


def validation(options, dataset, model, device, autocast):
    """(pairs to show, `LatentBatches` to measure on), of the validation split; of the training's if there is none."""
    held_out = None
    if not options.overfit:
        with suppress(UserError):  # of very few edits there are none for validation
            held_out = EditDataset(options.data, "val", options.resolution)
    split, count = ("val", len(held_out)) if held_out else ("train", options.overfit or len(dataset))
    dataset = EditDataset(options.data, split, options.resolution, subset=min(MEASURED, count))
    shown = [dataset[i] for i in range(min(SHOWN, len(dataset)))]
    return shown, LatentBatches(dataset, model, device, autocast, flip=False, first_only=True)


def write_samples(editor, pairs, path):
    """A sheet of before, ours and after for a few pairs of a data set."""
    before, after, instructions = zip(*pairs, strict=True)
    text, latent = editor.encode_text(list(instructions)), editor.encode_image(torch.stack(before))
    scales = editor.sampling.text_guidance, editor.sampling.image_guidance
    ours = editor.sample(text, latent, range(len(before)), *scales, editor.sampling.steps)
    large = [enlarge(to_image(x)) for triple in zip(before, ours.cpu(), after, strict=True) for x in triple]
    labels = [text for instruction in instructions for text in ("before", instruction, "pair's own")]
    save_png(grid(large, 6, labels), path)


def main(arguments=None):
    """Train or export."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["export"]:
        options = parse_export(arguments[1:])
        if (state := runs.newest_state(options.run)) is None:
            raise UserError(f"{options.run} holds no states of a training")
        export(options.run, state, options.out, options.lora, options.raw)
        print(options.out)
        return
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    train(options)


if __name__ == "__main__":
    run_program(main)
