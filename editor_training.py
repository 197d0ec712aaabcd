"""One step of training an editor, and all that it needs (Sec. 3.2): data, networks, loss, optimizer, average, state."""

import math
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from attention import fused, reference
from batches import Draws, LatentPairs, PicturePairs, stack
from cli import UserError, plain
from dataset import EditDataset
from diffusion import NoiseSchedule
from formats import checkpoint
from formats.lora import add_lora
from formats.weights import extend_input
from gpu.compiled import NOTICE, compiled
from images import enlarge, grid, save_png, to_image
from ip2p import InstructPix2Pix, loss
from states import newest_state, save_state, state_paths
from training import MovingAverage
from unet import Attention, ResBlock, Transformer

SHOWN, MEASURED = 8, 64  # pairs of the validation split on the sample sheet; examples of the validation loss
SAME = (  # or it is another run
    *("seed", "total", "pairs", "init", "trainable", "rank", "resolution", "largest", "subset", "overfit"),
    *("cache_latents", "balanced"),
)
MEAN_OF, TOO_MUCH = 50, 5  # the mean loss of so many steps, so many times the lowest so far: gone astray


class Training:
    """Everything that a step needs."""

    def __init__(self, options, ranks):
        """Raises UserError for whatever cannot be trained with these options, before anything takes long."""
        self.options, self.ranks, self.device = options, ranks, ranks.device
        if state_paths(options.out) and not options.resume:
            raise UserError(f"{options.out} holds a run; go on with it by --resume, or take another --out")
        flip = 0.0 if options.overfit else 0.5
        self.pairs = EditDataset(options.data, "train", options.resolution, options.largest, flip)
        if options.overfit or options.subset:
            self.pairs.thin_out(options.overfit or options.subset)
        self.model = load_editor(options.init, self.device)
        self.model.sampling = chosen_sampling(self.model.sampling, options)
        self.unet, self.schedule = self.model.unet, NoiseSchedule()
        if options.channels_last:
            self.unet.to(memory_format=torch.channels_last)
        check_pictures(self.pairs, self.model)
        self.names = choose_weights(self.unet, options.trainable, options.rank)
        self.weights = [weight for weight in self.unet.parameters() if weight.requires_grad]
        # one process keeps the average: it is the same in all of them
        self.average = MovingAverage(self.weights if ranks.first else [], options.ema_device)
        betas, decay = (0.9, options.beta2), options.weight_decay
        self.optimizer = torch.optim.AdamW(self.weights, options.lr, betas, weight_decay=decay, fused=True)
        kind = torch.device(self.device).type
        self.scaler = torch.amp.GradScaler(kind, enabled=options.dtype == "float16")
        half = {"dtype": getattr(torch, options.dtype), "enabled": options.dtype != "float32"}
        self.precision = partial(torch.autocast, kind, **half)
        self.attend = training_attention(kind, options)
        self.start, self.seconds = 0, 0.0
        self.losses, self.lowest = [], math.inf  # of the last steps; the lowest mean of so many
        if state := newest_state(options.out):
            self.resume(state)
        ranks.check_same(self.start)
        network = checkpointed(self.unet) if options.checkpointing else self.unet
        if options.compile:  # self.unet itself stays as it is, for the sizes of the sample sheets
            if ranks.first:
                print(NOTICE)
            network = compiled(network)
        self.network = ranks.share(network)

    def read_data(self):
        """Make the batches ready; with --cache-latents all pairs are encoded now."""
        options, parts = self.options, (self.model, self.pairs, self.device, self.precision)
        if options.cache_latents:
            self.data = LatentPairs(*parts, flip=not options.overfit)
        else:
            steps = range(self.start, options.steps)
            draws = (self.draws(step, i) for step in steps for i in range(options.accumulate))
            self.data = PicturePairs(*parts, draws, options.workers)
        if self.ranks.first:
            pairs = EditDataset(options.data, "train", options.resolution)
            pairs.pairs = self.pairs.pairs
            if not options.overfit:
                with suppress(UserError):  # of very few pairs there are none for validation
                    pairs = EditDataset(options.data, "val", options.resolution)
            self.shown = stack([pairs[i] for i in range(min(SHOWN, len(pairs)))])
            pairs.thin_out(min(MEASURED, len(pairs)))
            self.check = LatentPairs(self.model, pairs, self.device, self.precision, flip=False)
            print(f"{len(self.pairs)} pairs, {options.total} a step")

    def draws(self, step, part):
        """The chance of this process's rows in the part-th pass of a step."""
        options = self.options
        first = step * options.total + (part * self.ranks.count + self.ranks.number) * options.batch
        return Draws(options.seed, range(first, first + options.batch))

    def loss(self, unet, batch, draws, t, u):
        """Eq. 1, its mean over a batch as `LatentPairs.batch` gives it; t and u [B] as in `ip2p.loss`."""
        latent, image_latent, text = batch
        noise = draws.normal(*latent.shape[1:]).to(self.device)
        null_text, t, u = self.data.contexts.null_text, t.to(self.device), u.to(self.device)
        predict_eps = partial(unet, attend=self.attend)
        with self.precision():
            each = loss(predict_eps, self.schedule, latent, image_latent, text, null_text, t, noise, u)
        return (each * self.schedule.balanced(t)).mean() if self.options.balanced else each.mean()

    def backward(self, step):
        """Compute the gradients of a step's batch; returns the loss, the mean over this process's part of it."""
        options, value = self.options, torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        for part in range(options.accumulate):
            draws = self.draws(step, part)
            batch = self.data.batch(draws)
            # gradients of other processes are added in the last pass alone
            with self.ranks.sharing(self.network, part == options.accumulate - 1):
                share = self.loss(self.network, batch, draws, draws.whole(1000), draws.uniform()) / options.accumulate
                self.scaler.scale(share).backward()
            value += share.detach()
        return value

    def watch(self, step, loss):
        """Look at a step's loss, that of all processes. Raises UserError where it is no number, or explodes."""
        self.losses = [*self.losses, loss][-MEAN_OF:]
        mean = sum(self.losses) / MEAN_OF if len(self.losses) == MEAN_OF else self.lowest
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step + 1}; {self.advice(step)}")
        if mean > TOO_MUCH * self.lowest:
            grown = f"the loss has grown to {TOO_MUCH} times what it was"
            raise UserError(f"{grown} at step {step + 1}; {self.advice(step - MEAN_OF)}")
        self.lowest = min(self.lowest, mean)

    def advice(self, step):
        """What to do when a training has gone astray after this step."""
        good = [path for path in state_paths(self.options.out) if int(path.stem) <= step]
        if not good:
            return "try a lower --lr"
        return f"the last good state is {good[-1].name}: remove later ones and go on with --resume and a lower --lr"

    def update(self, step):
        """Bring the gradients into the weights, and the weights into their average. Raises UserError."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.options.clip or math.inf).item()
        if not math.isfinite(norm) and not self.scaler.is_enabled():  # else that step is left out, and the scale falls
            raise UserError(f"the gradient is {norm} at step {step + 1}; {self.advice(step)}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.average.follow(min(self.options.ema, (step + 1) / (step + 10)))

    def save(self, step, seconds):
        """Write a state, from which `resume` goes on."""
        named = partial(zip, self.names, strict=True)
        parts = {
            "weights": dict(named([weight.detach() for weight in self.weights])),
            "average": dict(named(self.average.values)),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": self.losses,
            "lowest": self.lowest,
            "seconds": seconds,
            "settings": {**plain(self.options), "pairs": len(self.pairs)},
        }
        save_state(self.options.out, step, parts, self.options.keep)

    def resume(self, state):
        """Go on from a state. Raises UserError if it is of another run."""
        begun, now = state["settings"], {**plain(self.options), "pairs": len(self.pairs)}
        for name in SAME:
            if begun.get(name) != now[name]:
                change = f"{name} {begun.get(name)}, now it is {now[name]}"
                raise UserError(f"{self.options.out} was begun with {change}; take the same, or another --out")
        try:
            with torch.no_grad():
                for name, weight in zip(self.names, self.weights, strict=True):
                    weight.copy_(state["weights"][name])
                for name, value in zip(self.names, self.average.values, strict=False):
                    value.copy_(state["average"][name])
            own = [dict(group) for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"the state in {self.options.out} is of another network; take another --out") from error
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update({name: settings[name] for name in ("betas", "weight_decay")})  # which may be changed
        for weight, kept in self.optimizer.state.items():
            for name, value in kept.items():
                if value.shape == weight.shape:  # in the memory layout of the weight, which may have been another
                    kept[name] = torch.empty_like(weight).copy_(value)
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.start, self.seconds = state["step"], state["seconds"]
        self.losses, self.lowest = state["losses"], state["lowest"]

    @torch.no_grad()
    def look(self):
        """With the averaged weights: write the sample sheet, return the loss on fixed pairs, times and noise."""
        t, value, size = torch.linspace(0, 999, MEASURED).round().long(), 0.0, self.options.batch
        with self.average.in_place():
            for first in range(0, MEASURED, size):
                draws = Draws(0, range(first, min(first + size, MEASURED)))
                batch, nothing_dropped = self.check.batch(draws), torch.ones(len(draws))
                value += self.loss(self.unet, batch, draws, t[draws.positions], nothing_dropped).item() * len(draws)
            with self.precision():
                write_samples(InstructPix2Pix(self.model), *self.shown, self.options.out / "samples.png")
        return value / MEASURED


def load_editor(path, device):
    """A model whose UNet takes the picture to edit: an editor's, or Stable Diffusion's with new channels of zeros."""
    model = checkpoint.load(path, device)
    channels = model.vae.config.latent_channels
    if model.unet.config.in_channels == channels:
        model.unet = extend_input(model.unet, 2 * channels)
    InstructPix2Pix(model)  # refuses what is neither
    return model


def check_pictures(pairs, model):
    """The latents' height and width. Raises UserError unless the model can take the pictures, judging by the first."""
    shape = pairs[0][0].shape  # [3, H, W]
    if any(side % model.side_multiple for side in shape[1:]):
        needed = f"this model needs sides that are multiples of {model.side_multiple} pixels"
        raise UserError(f"the pictures are {shape[2]}x{shape[1]}; {needed}: see --resolution")
    before = next(pair for pair in map(pairs.read, range(len(pairs))) if pair)[0]
    if pairs.resolution and min(before.size) < pairs.resolution:
        crops = f"crops of {pairs.resolution} pixels need such a side at least"
        raise UserError(f"the pictures are {before.width}x{before.height}; {crops}: see --resolution")
    return [side // model.vae.config.factor for side in shape[1:]]


def chosen_sampling(sampling, options):
    """A model's defaults for sampling, with what the command line says instead."""
    names = {"steps": "sampling_steps", "text_guidance": "cfg_text", "image_guidance": "cfg_image"}
    chosen = {name: getattr(options, option) for name, option in names.items()}
    return replace(sampling, **{name: value for name, value in chosen.items() if value is not None})


def choose_weights(unet, trainable, rank):
    """Let some weights of a UNet be trained, or weights of `rank` that LoRA adds; returns their names."""
    unet.requires_grad_(trainable == "full")
    if trainable == "lora":
        add_lora(unet, rank)
    elif trainable == "attention":
        unet.conv_in.requires_grad_(True)  # has the new channels
        for layer in unet.modules():
            if isinstance(layer, Attention):
                layer.requires_grad_(True)
    return [name for name, weight in unet.named_parameters() if weight.requires_grad]


def training_attention(kind, options):
    """On a CPU torch's fused attention is slow backwards, and the miniature's maps are small enough to keep."""
    return reference if kind == "cpu" and options.cache_latents else fused


def checkpointed(unet):
    """The UNet, computing what its blocks hold once more on the way back instead of keeping it (Chen et al. 2016)."""
    apply_activation_checkpointing(unet, check_fn=lambda layer: isinstance(layer, ResBlock | Transformer))
    return unet


def learning_rate(step, options):
    """At a step: a rise over `warmup` steps, then constant, then a fall over the share `decay` of all steps."""
    rise = (step + 1) / options.warmup if options.warmup else 1.0
    fall = (options.steps - step) / (options.decay * options.steps) if options.decay else 1.0
    return options.lr * min(1.0, rise, max(fall, 0.01))


def write_samples(editor, before, after, instructions, path):
    """A sheet of before, ours and after for a few pairs, as `stack` gives them."""
    scales = editor.sampling.text_guidance, editor.sampling.image_guidance
    text, latent = editor.encode_text(list(instructions)), editor.encode_image(before)
    ours = editor.sample(text, latent, range(len(before)), *scales, editor.sampling.steps)
    large = [enlarge(to_image(x)) for triple in zip(before, ours.cpu(), after, strict=True) for x in triple]
    labels = [text for instruction in instructions for text in ("before", instruction, "pair's own")]
    save_png(grid(large, 6, labels), path)
