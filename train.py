"""Fine-tune a text-to-image model into an editor on pairs of images with instructions (Sec. 3.2, Appendix C).

    python train.py --preset mini --data runs/mini/pairs --init models/mini/sd --out runs/editor
    python train.py --preset mini --data runs/mini/pairs --init models/mini/sd --out runs/one --overfit 1
    torchrun --nproc-per-node 8 train.py --preset paper --data DIR --init sd15 --out runs/paper
    python train.py --preset mini --data runs/mini/pairs --distill models/mini/editor --out runs/student
    python train.py export --run runs/paper --out editor.safetensors

The UNet gets input channels for the image to edit, their weights zero; autoencoder and text encoder stay frozen. All
that a step draws follows from the seed and the step: neither a stop and --resume nor the number of processes changes
what is learned. In --out: settings.json, states/, metrics.jsonl, loss.png, samples.png (all of them in
samples/), and in the end model/.
"""

import hashlib
import math
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial

from cli import UserError, keep_settings, run_program

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from attention import fused, reference
from dataset import EditDataset
from formats.export import choose_weights, export, load_editor, replace_model
from formats.hub import lasting
from gpu.compiled import compiled
from images import enlarge, grid, save_png, to_image
from ip2p import InstructPix2Pix, loss
from training import distill, runs
from training.batches import Draws, ImageBatches, LatentBatches, draws_of, encode_pairs
from training.presets import outlook, parse, parse_export
from unet import ResBlock, Transformer

SHOWN, MEASURED = 8, 64  # pairs of the validation split on samples.png; examples of the validation loss
SAME = (  # settings of a run that may not change when it is resumed
    *("seed", "total_batch_size", "trainable", "rank", "resolution", "max_resize", "subset"),
    *("overfit", "cache_latents", "loss_weighting", "sampling_steps", "cfg_text", "cfg_image", "distill"),
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


class Objective(nn.Module):
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
    weights = {name.replace("_checkpoint_wrapped_module.", ""): w for name, w in network.named_parameters()}
    weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
    parameters, device = list(weights.values()), next(network.parameters()).device
    ema = {name: w.detach().to(settings.ema_device or device, copy=True) for name, w in weights.items()}
    betas, total = (0.9, settings.beta2), settings.batch_size * settings.grad_accum * runs.PROCESSES
    optimizer = torch.optim.AdamW(parameters, settings.lr, betas, weight_decay=settings.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.mixed_precision == "fp16")
    step, seconds = runs.resume(out, weights, ema, optimizer, scaler)
    objective = Objective(network, loss_of)
    if runs.PROCESSES > 1:
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    log, stopped = runs.Log(out, step, seconds), False
    if runs.RANK == 0 and evaluate and not step:  # where it begins; the average is the weights themselves
        with torch.no_grad():
            log.write({"step": 0} | (evaluate(step) or {}))
    bar = tqdm(total=settings.max_steps, initial=step, desc=out.name, unit="step", mininterval=1, disable=runs.RANK > 0)
    with runs.stop_signals() as signals, bar:
        while step < settings.max_steps and not stopped:
            for group in optimizer.param_groups:
                group["lr"] = settings.lr_at(step)
            value = torch.zeros((), device=device)
            for micro in range(settings.grad_accum):
                # DistributedDataParallel averages the gradients after the last one alone
                objective.require_backward_grad_sync = micro == settings.grad_accum - 1
                part = objective(draws_of(settings, step, micro)) / settings.grad_accum
                scaler.scale(part).backward()
                value += part.detach()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, settings.grad_clip or math.inf).item()
            value, stopped = runs.mean_of_processes(value.item(), bool(signals))
            if not math.isfinite(value) or not (math.isfinite(norm) or scaler.is_enabled()):
                raise UserError(f"the loss or its gradient is NaN or Inf at step {step + 1} of {out}; lower --lr")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            runs.update_ema(ema, weights, min(settings.ema_decay, (step + 1) / (step + 10)))
            step += 1
            bar.update()
            log.losses.append(value)
            finished = step == settings.max_steps
            if runs.RANK == 0 and (stopped or finished or step % settings.save_every == 0):
                runs.save_state(out, settings.keep, step, log.seconds(), weights, ema, optimizer, scaler)
            evaluating = finished or (step % settings.eval_every == 0 and not stopped)
            if runs.RANK == 0 and (evaluating or log.is_due(step)):
                line = log.line(step, total)
                bar.set_postfix(loss=line["loss"])
                if evaluating and evaluate:
                    with runs.averaged(weights, ema), torch.no_grad():
                        line |= evaluate(step) or {}
                log.write(line)
    if step < settings.max_steps:
        if runs.RANK == 0:
            print(f"stopped at step {step}; the same command with --resume continues")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])  # another process may be the one that was told
    runs.swap(weights, ema)
    return network.eval()


# ---- training an editor ----


def train(options):
    """Train, and write the editor as a model folder."""
    out, device, autocast = options.out, runs.join(options.device), autocasting(options.device, options.mixed_precision)
    if runs.state_paths(out) and not options.resume:
        raise UserError(f"{out} holds a run; continue it by --resume, or use another --out")
    flip, subset = (0.0, options.overfit) if options.overfit else (0.5, options.subset)
    dataset = EditDataset(options.data, "train", options.resolution, options.max_resize, flip, subset)
    if runs.RANK == 0:
        print(f"loading {options.init}")
    model, base = load_editor(options, device)
    if any(side % model.side_multiple for side in dataset[0][0].shape[1:]):
        raise UserError(f"the images need sides of multiples of {model.side_multiple} pixels; see --resolution")
    editor, encode = InstructPix2Pix(model), partial(encode_pairs, model.vae, autocast)
    teacher = InstructPix2Pix.load(options.init, device) if options.distill else None
    choose_weights(model.unet, options.trainable, options.rank)
    if options.gradient_checkpointing:  # blocks are computed twice instead of kept (Chen et al. 2016)
        apply_activation_checkpointing(model.unet, check_fn=lambda layer: isinstance(layer, ResBlock | Transformer))
    # on a CPU torch's fused attention has a slow backward pass, and the miniature's maps are small enough to keep
    attend = reference if device == "cpu" and options.cache_latents else fused
    predict_eps = partial(compiled(model.unet) if options.compile else model.unet, attend=attend)
    if runs.RANK == 0:  # all that may be refused has been looked at
        pairs = hashlib.sha256((options.data / "seeds.json").read_bytes()).hexdigest()[:16]
        settings = {"init_fingerprint": base, "data_fingerprint": pairs, "init": lasting(options.init)}
        settings |= {"data": options.data.resolve()} | {name: getattr(options, name) for name in SAME}
        keep_settings(out / "settings.json", settings, noted=("init", "data"))
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    if options.cache_latents:
        data = LatentBatches(dataset, encode, flip=not options.overfit, first_only=bool(options.overfit))
    else:
        data = ImageBatches(dataset, encode, settings, options.workers)

    def losses(draws, batches, t=None):
        """Eq. 1 for each row of a `Draws`, [B]. t [B]: fixed times, for an evaluation; no condition is dropped then."""
        latents, texts = batches(draws)
        image_latent, mean, deviation = latents.to(device)  # [B, C, h, w] each
        latent = (mean + deviation * draws.normal(*mean.shape[1:]).to(device)) * model.vae.config.scaling
        u = torch.ones(len(mean), device=device)
        if t is None:
            t, u = draws.integers(1000).to(device), draws.uniform().to(device)
        noise = draws.normal(*mean.shape[1:]).to(device)
        with autocast():
            text, null_text = editor.encode_text(list(texts)).float(), editor.null_text.float()
            if teacher:
                how = teacher, editor.sampling.steps, draws
                return distill.loss(predict_eps, *how, latent, image_latent, text, null_text, noise)
            each = loss(predict_eps, editor.schedule, latent, image_latent, text, null_text, t, noise, u)
        return each * editor.schedule.balanced(t) if options.loss_weighting == "balanced" else each

    evaluate = None
    if runs.RANK == 0:
        evaluate = evaluation(options, dataset, editor, encode, autocast, losses)
        trained = sum(weight.numel() for weight in model.unet.parameters() if weight.requires_grad)
        held_out = f"{dataset.held_out} more are held out for validation and tests"
        print(outlook(options, trained))
        print(f"{len(dataset)} edits to train on, {options.total_batch_size} pairs a step; {held_out}")
    fit(model.unet, lambda network, draws: losses(draws, data).mean(), settings, out, evaluate)
    if runs.RANK == 0:
        replace_model(model, out / "model")
        print(out / "model")


def autocasting(device, precision):
    """A function that makes the context of mixed precision: "no", "bf16" or "fp16"."""
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return partial(torch.autocast, torch.device(device).type, dtype=dtype, enabled=precision != "no")


def evaluation(options, dataset, editor, encode, autocast, losses):
    """The `evaluate` of `fit`: draws samples.png, and measures the loss on fixed validation pairs, times and noise."""
    if not options.overfit:
        with suppress(UserError):  # of very few edits there are none for validation: those of the training stand in
            count = len(EditDataset(options.data, "val", options.resolution))
            dataset = EditDataset(options.data, "val", options.resolution, subset=min(MEASURED, count))
    batches = LatentBatches(dataset, encode, first_only=True)
    before, after, instructions = zip(*(dataset[i] for i in range(min(SHOWN, len(dataset)))), strict=True)
    labels = [text for instruction in instructions for text in ("", instruction, "")]
    t = torch.linspace(0, 999, MEASURED).round().long().to(editor.device)
    rows = [slice(first, first + options.batch_size) for first in range(0, MEASURED, options.batch_size)]

    def evaluate(step):
        sampling, values = editor.sampling, []
        with tqdm(total=len(rows) + sampling.steps, desc="evaluating", mininterval=1, leave=False) as bar, autocast():
            for some in rows:
                values.append(losses(Draws(0, 0, MEASURED, some), batches, t[some]))
                bar.update()
            text, image_latent = editor.encode_text(list(instructions)), editor.encode_image(torch.stack(before))
            scales = sampling.text_guidance, sampling.image_guidance
            ours = editor.sample(
                text, image_latent, range(len(before)), *scales, sampling.steps, callback=lambda *_: bar.update()
            )
        images = [enlarge(to_image(x)) for triple in zip(before, ours.cpu(), after, strict=True) for x in triple]
        sheet = grid(images, 3, labels, ("input", "ours", "target"), title=f"step {step}")
        for path in (options.out / "samples" / f"{step:08d}.png", options.out / "samples.png"):
            save_png(sheet, path)
        return {"validation": round(torch.cat(values).mean().item(), 6)}

    return evaluate


def main(arguments=None):
    """Train or export."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["export"]:
        options = parse_export(arguments[1:])
        if (state := runs.newest_state(options.run)) is None:
            raise UserError(f"{options.run} holds no states of a training")
        export(options.run, state, options.out, options.lora, options.raw, options.init)
        print(options.out)
        return
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    train(options)


if __name__ == "__main__":
    run_program(main)
