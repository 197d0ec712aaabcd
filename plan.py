"""What a training will take of memory, computed without taking it (`train.py --plan`).

A step is gone through with tensors that have shapes and no memory, and whatever would be alive is counted: so the sum
knows what autograd keeps, what checkpointing does not, and what comes and goes. It also runs where there is no GPU.
"""

import weakref
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batches import encode
from cli import UserError
from clip_text import CLIP_L_TEXT, CLIPText
from diffusion import NoiseSchedule
from editor_training import checkpointed, choose_weights, training_attention
from formats import checkpoint
from ip2p import loss
from unet import INSTRUCT_PIX2PIX, UNet
from vae import STABLE_DIFFUSION_VAE, VAE

PARTS = ("trained weights", "frozen weights", "gradients", "optimizer", "moving average", "activations", "at most")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made within it and still alive: `now`, and the `most` there were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Run an operation, and note what it has made; a view has the storage of another tensor and makes nothing."""
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                self.known.add(storage)
                weakref.finalize(storage, self.freed, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return out

    def freed(self, size):
        """A tensor is gone."""
        self.now -= size


def plan(options):
    """The bytes that a training step takes: {what: bytes}, as `PARTS` names them, and where it takes most.

    options: as from `presets.parse`. Returns (bytes, place). "at most" is all that the device holds at that moment: the
    gradients and the activations, which is whatever else comes and goes, are those of then, and the moving average is
    part of it unless it is kept elsewhere. The step is one that is not compiled, which takes no less than one that is.
    Not known are the buffers within a kernel, and what CUDA takes for itself, some 0.5 GB. Raises UserError.
    """
    if not options.resolution:
        raise UserError("a plan needs to know the size of the pictures; say --resolution")
    sizes, kind = network_sizes(options.init), torch.device(options.device).type
    with FakeTensorMode(), LiveBytes() as live:
        unet, vae, text_encoder = UNet(sizes[0]), VAE(sizes[1]), CLIPText(sizes[2])
        choose_weights(unet, options.trainable, options.rank)
        weights = [weight for weight in unet.parameters() if weight.requires_grad]
        everything = sum(weight.nbytes for network in (unet, vae, text_encoder) for weight in network.parameters())
        trained = sum(weight.nbytes for weight in weights)
        on_device = torch.device(options.ema_device or kind).type == kind
        kept = [torch.zeros(2 + on_device, *weight.shape) for weight in weights]  # AdamW's moments, and the average
        held, most = live.now, (0, 0, "")
        for place in step_of(unet, vae, text_encoder, options, kind):
            gradients = sum(weight.nbytes for weight in weights if weight.grad is not None)
            most = max(most, (live.most, gradients, place))
            live.most = live.now
        del kept
    at_most, gradients, place = most
    values = trained, everything - trained, gradients, 2 * trained, trained, at_most - held - gradients, at_most
    return dict(zip(PARTS, values, strict=True)), place


def step_of(unet, vae, text_encoder, options, kind):
    """Go through a step as `editor_training.Training` does it; yields the name of each part when it is over."""
    batch, attend = options.batch, training_attention(kind, options)
    latent = torch.zeros(batch, vae.config.latent_channels, *[options.resolution // vae.config.factor] * 2)
    text = torch.zeros(batch, text_encoder.config.tokens, text_encoder.config.width)
    t, u, schedule = torch.zeros(batch, dtype=torch.long), torch.ones(batch), NoiseSchedule()
    network = partial(checkpointed(unet) if options.checkpointing else unet, attend=attend)
    half = getattr(torch, options.dtype)
    precision = partial(torch.autocast, "cpu", dtype=half, enabled=half != torch.float32)
    for layer in (*unet.modules(), *vae.modules(), *text_encoder.modules()):
        if kind == "cuda" and isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].float(),))  # as autocast does on a GPU
    yield "between steps"
    for _ in range(min(2, options.accumulate)):  # from the second pass on, the gradients are there from its start
        if not options.cache_latents:
            with torch.no_grad(), precision():
                encode(vae, torch.zeros(2 * batch, 3, options.resolution, options.resolution))
                text_encoder(torch.zeros(batch, text_encoder.config.tokens, dtype=torch.long))
            yield "encoding the pictures"
        with precision():
            value = loss(network, schedule, latent, latent, text, text[:1], t, latent, u).mean()
        yield "the way forward"
        value.backward()
        yield "the way back"


def network_sizes(init):
    """The configurations of UNet, autoencoder and text encoder: those of --init, else of Stable Diffusion 1.5."""
    if not init:
        return INSTRUCT_PIX2PIX, STABLE_DIFFUSION_VAE, CLIP_L_TEXT
    model = checkpoint.load(init)
    unet = replace(model.unet.config, in_channels=2 * model.vae.config.latent_channels)
    return unet, model.vae.config, model.text_encoder.config


def print_plan(options):
    """Print the plan of a training as a table."""
    parts, place = plan(options)
    of = "its --init" if options.init else "Stable Diffusion 1.5"
    shape = f"{options.batch} pairs at once, {options.resolution}x{options.resolution}, {options.dtype}"
    print(f"Each process; networks as in {of}; --trainable {options.trainable}; {shape}")
    print(f"{'':28}GB")
    notes = {"moving average": f"on {options.ema_device or options.device}", "at most": f"reached in {place}"}
    for part, size in parts.items():
        print(f"{part:24}{size / 1e9:6.2f}  {notes.get(part, '')}".rstrip())
