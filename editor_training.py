"""One step of training an editor, and all that it needs (Sec. 3.2): data, networks, loss, optimizer, average, state."""

from contextlib import suppress
from functools import partial

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import checkpoint
from attention import fused, reference
from batches import Draws, LatentPairs, PicturePairs, stack
from dataset import EditDataset
from diffusion import NoiseSchedule
from errors import UserError
from images import enlarge, grid, save_png, to_image
from ip2p import InstructPix2Pix, loss
from lora import add_lora
from report import plain
from states import newest_state, save_state
from training import MovingAverage, textbook_attention
from unet import Attention, ResBlock, Transformer
from weights import extend_input

SHOWN, MEASURED = 8, 64  # pairs of the validation split on the sample sheet; examples of the validation loss
SAME = ("seed", "total", "trainable", "rank", "resolution", "largest", "subset", "overfit")  # or it is another run


class Training:
    """Everything that a step needs."""

    def __init__(self, options, ranks):
        """Raises UserError for whatever cannot be trained with these options, before anything takes long."""
        self.options, self.ranks, self.device = options, ranks, ranks.device
        self.begun = newest_state(options.out)
        if self.begun and not options.resume:
            raise UserError(f"{options.out} holds a run; go on with it by --resume, or take another --out")
        flip = 0.0 if options.overfit else 0.5
        self.pairs = EditDataset(options.data, "train", options.resolution, options.largest, flip)
        if options.overfit or options.subset:
            self.pairs.thin_out(options.overfit or options.subset)
        self.checking = EditDataset(options.data, "train", options.resolution)
        self.checking.pairs = self.pairs.pairs
        if not options.overfit:
            with suppress(UserError):  # of very few pairs there are none for validation
                self.checking = EditDataset(options.data, "val", options.resolution)
        self.model = load_editor(options.init, self.device)
        self.unet, self.schedule = self.model.unet, NoiseSchedule()
        check_pictures(self.pairs, self.model)
        self.names = choose_weights(self.unet, options.trainable, options.rank)
        self.weights = [weight for weight in self.unet.parameters() if weight.requires_grad]
        self.average = MovingAverage(self.weights, options.ema_device)
        betas, decay = (0.9, options.beta2), options.weight_decay
        self.optimizer = torch.optim.AdamW(self.weights, options.lr, betas, weight_decay=decay, fused=True)
        kind = torch.device(self.device).type
        self.scaler = torch.amp.GradScaler(kind, enabled=options.dtype == "float16")
        half = {"dtype": getattr(torch, options.dtype), "enabled": options.dtype != "float32"}
        self.precision = partial(torch.autocast, kind, **half)
        # on a CPU torch's fused attention is slow backwards, and the miniature's maps are small enough to keep
        self.attend = reference if kind == "cpu" and options.cache_latents else fused
        self.start, self.seconds = 0, 0.0
        if self.begun:
            self.resume(self.begun)
        self.network = self.unet.to(memory_format=torch.channels_last) if options.channels_last else self.unet
        if options.checkpointing:
            self.network = checkpointed(self.network)
        self.network = ranks.share(self.network)

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
            self.shown = stack([self.checking[i] for i in range(min(SHOWN, len(self.checking)))])
            self.checking.thin_out(min(MEASURED, len(self.checking)))
            self.check = LatentPairs(self.model, self.checking, self.device, self.precision, flip=False)
            broken = int(self.pairs.broken.sum())
            left_out = f", {broken} of them missing or damaged" if broken else ""
            print(f"{len(self.pairs)} pairs{left_out}; {options.total} a step")

    def draws(self, step, part):
        """The chance of this process's rows in the part-th pass of a step."""
        options = self.options
        first = (part * self.ranks.count + self.ranks.number) * options.batch
        return Draws(options.seed, step, options.total, slice(first, first + options.batch))

    def loss(self, unet, batch, draws, t, u):
        """Eq. 1, its mean over a batch as `LatentPairs.batch` gives it; t and u [B] as in `ip2p.loss`."""
        latent, image_latent, text = batch
        noise = draws.normal(*latent.shape[1:]).to(self.device)
        null_text, t, u = self.data.contexts.null_text, t.to(self.device), u.to(self.device)
        predict_eps = partial(unet, attend=self.attend)
        with self.precision(), textbook_attention():
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

    def update(self, step):
        """Bring the gradients into the weights, and the weights into their average."""
        if self.options.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.weights, self.options.clip)
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
            "seconds": seconds,
            "settings": plain(self.options),
        }
        save_state(self.options.out, step, parts, self.options.keep)

    def resume(self, state):
        """Go on from a state. Raises UserError if it is of another run."""
        begun = state["settings"]
        for name in SAME:
            if begun[name] != getattr(self.options, name):
                change = f"{name} {begun[name]}, now it is {getattr(self.options, name)}"
                raise UserError(f"{self.options.out} was begun with {change}; take the same, or another --out")
        try:
            with torch.no_grad():
                for name, weight, value in zip(self.names, self.weights, self.average.values, strict=True):
                    weight.copy_(state["weights"][name])
                    value.copy_(state["average"][name])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"the state in {self.options.out} is of another network; take another --out") from error
        self.scaler.load_state_dict(state["scaler"])
        self.start, self.seconds = state["step"], state["seconds"]

    @torch.no_grad()
    def look(self):
        """With the averaged weights: write the sample sheet, return the loss on fixed pairs, times and noise."""
        t, value, size = torch.linspace(0, 999, MEASURED).round().long(), 0.0, self.options.batch
        with self.average.in_place():
            for first in range(0, MEASURED, size):
                draws = Draws(0, 0, MEASURED, slice(first, first + size))
                batch, nothing_dropped = self.check.batch(draws), torch.ones(len(draws))
                value += self.loss(self.unet, batch, draws, t[draws.rows], nothing_dropped).item() * len(draws)
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
    """Raise UserError unless the model can take the pictures, judging by the first one."""
    shape = pairs[0][0].shape  # [3, H, W]
    if any(side % model.side_multiple for side in shape[1:]):
        needed = f"this model needs sides that are multiples of {model.side_multiple} pixels"
        raise UserError(f"the pictures are {shape[2]}x{shape[1]}; {needed}: see --resolution")
    smallest = min(pairs.read(0)[0].size)
    if pairs.resolution and smallest < pairs.resolution:
        raise UserError(f"the pictures have sides of {smallest} pixels; crops of {pairs.resolution} need larger ones")


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
