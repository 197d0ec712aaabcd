"""Fine-tune a text-to-image model into an editor on pairs of pictures with instructions (Sec. 3.2).

    python train.py --data runs/mini/pairs --init models/mini/sd --out runs/editor

The UNet gets input channels for the picture to edit, their weights zero; autoencoder and text encoder stay as they are.
Stopped and started again with the same --out, training goes on where it was. The editor is OUT/model.
"""

import shutil
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
from attention import fused, reference
from dataset import EditDataset
from diffusion import NoiseSchedule
from errors import Parser, UserError, run_program
from images import enlarge, grid, save_png, to_image
from ip2p import InstructPix2Pix, loss
from report import make_folder
from settings import check_device, check_sampling
from training import Plan, fast_training, fit
from weights import extend_input

SHOWN = 8  # pairs of the validation split on the sample sheet


class LatentPairs:
    """A data set as latents, encoded once: the autoencoder is frozen, and there are no random crops at this size.

    Every pair is there twice, as it is and mirrored; instructions are encoded once each.
    """

    def __init__(self, model, pairs, device):
        """model: a `checkpoint.Model`, pairs: an `EditDataset` of pictures of one size, or UserError is raised."""
        self.device = device
        before, after, spread, texts = [], [], [], []
        loader = DataLoader(pairs, 64, collate_fn=partial(stack, shape=pairs[0][0].shape))
        for x_before, x_after, instructions in tqdm(loader, desc="encoding", leave=False):
            texts += instructions
            for mirrored in (False, True):
                x = torch.cat([x_before, x_after]).to(device)
                with torch.no_grad(), fast_training(device):
                    latent = model.vae.encode(x.flip(3) if mirrored else x)
                condition, target = latent.mode().chunk(2)
                before.append(condition.half())
                after.append(target.half())
                spread.append((0.5 * latent.logvar.chunk(2)[1]).exp().half())
        # [pairs, 2, C, h, w]: as it is, mirrored
        self.before, self.after, self.spread = (
            torch.cat([torch.stack(both, dim=1) for both in zip(parts[::2], parts[1::2], strict=True)])
            for parts in (before, after, spread)
        )
        unique = sorted(set(texts))
        with torch.no_grad():
            ids = model.tokenizer(["", *unique]).to(device).split(256)
            self.contexts = torch.cat([model.text_encoder(part) for part in ids])  # [1 + instructions, L, E]
        self.null_text = self.contexts[:1]
        numbers = {text: number for number, text in enumerate(unique, 1)}
        self.text = torch.tensor([numbers[text] for text in texts])
        self.scaling = model.vae.config.scaling

    def batch(self, size, generator):
        """(latent, image_latent, text) of `size` random pairs, as `ip2p.loss` takes them."""
        chosen = torch.randint(len(self.before), (size,), generator=generator)
        mirrored = torch.randint(2, (size,), generator=generator)  # Sec. A.1: horizontal flips, p 0.5
        after, spread = (x[chosen, mirrored].to(self.device).float() for x in (self.after, self.spread))
        noise = torch.randn(after.shape, generator=generator).to(self.device)
        latent = (after + spread * noise) * self.scaling  # a sample, scaled
        image_latent = self.before[chosen, mirrored].to(self.device).float()  # the mode, unscaled
        return latent, image_latent, self.contexts[self.text[chosen]]


def stack(pairs, shape):
    """Pairs as a batch: before [B, 3, H, W], after, and the instructions. Raises UserError for another shape."""
    before, after, instructions = zip(*pairs, strict=True)
    if any(x.shape != shape for x in before + after):
        raise UserError("the pictures of the data set differ in size; one size for all is needed")
    return torch.stack(before), torch.stack(after), instructions


def train(options):
    """Train, and write the editor as a model folder."""
    device = options.device
    shown = pairs = EditDataset(options.data)
    with suppress(UserError):  # of very few pairs there are none for validation
        shown = EditDataset(options.data, "val")
    shape = pairs[0][0].shape  # [3, H, W]
    shown = stack([shown[i] for i in range(min(SHOWN, len(shown)))], shape)
    model = checkpoint.load(options.init, device)
    channels = model.vae.config.latent_channels
    if model.unet.config.in_channels == channels:
        model.unet = extend_input(model.unet, 2 * channels)
    editor = InstructPix2Pix(model)  # refuses what is neither
    unet = model.unet.requires_grad_(True)
    if any(side % model.side_multiple for side in shape[1:]):
        needed = f"this model needs sides that are multiples of {model.side_multiple} pixels"
        raise UserError(f"the pictures are {shape[2]}x{shape[1]}; {needed}")
    make_folder(options.out)
    data = LatentPairs(model, pairs, device)
    broken = int(pairs.broken.sum())
    left_out = f"; {broken} are missing or damaged, and others stand in for them" if broken else ""
    print(f"{len(data.before)} pairs, {len(data.contexts) - 1} different instructions{left_out}")
    schedule = NoiseSchedule()
    # on a CPU torch's fused attention is slow backwards, and at the miniature's sizes the map is small enough to keep
    predict_eps = partial(unet, attend=reference if torch.device(device).type == "cpu" else fused)

    def loss_of(step, generator, batch):
        latent, image_latent, text = data.batch(batch, generator)
        t = torch.randint(1000, (batch,), generator=generator).to(device)
        noise = torch.randn(latent.shape, generator=generator).to(device)
        u = torch.rand(batch, generator=generator).to(device)
        each = loss(predict_eps, schedule, latent, image_latent, text, data.null_text, t, noise, u)
        return (each * schedule.balanced(t)).mean() if options.balanced else each.mean()

    def show(average, step):
        editor.unet = average
        write_samples(editor, *shown, options.out / "samples.png")

    plan = Plan(options.steps, options.batch, options.lr, seed=options.seed, ema=options.ema)
    model.unet = fit(unet, loss_of, plan, options.out, device=device, show=show)
    sampling = {"steps": options.sampling_steps, "text_guidance": options.cfg_text, "image_guidance": options.cfg_image}
    model.sampling = replace(model.sampling, **{name: value for name, value in sampling.items() if value is not None})
    shutil.rmtree(options.out / "model", ignore_errors=True)  # of an earlier end of this run
    checkpoint.save_folder(model, options.out / "model", torch.float16)
    print(options.out / "model")


def write_samples(editor, before, after, instructions, path):
    """A sheet of before, ours and after for a few pairs, as `stack` gives them."""
    scales = editor.sampling.text_guidance, editor.sampling.image_guidance
    text, latent = editor.encode_text(list(instructions)), editor.encode_image(before)
    ours = editor.sample(text, latent, range(len(before)), *scales, editor.sampling.steps)
    large = [enlarge(to_image(x)) for triple in zip(before, ours.cpu(), after, strict=True) for x in triple]
    labels = [text for instruction in instructions for text in ("before", instruction, "pair's own")]
    save_png(grid(large, 6, labels), path)


def parse(arguments=None):
    """The command line."""
    parser = Parser(prog="train.py", description="Train an editor from a text-to-image model.")
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="pairs, as datagen.py images leaves them")
    add("--init", required=True, metavar="PATH", help="Stable Diffusion weights, or an editor's")
    add("--out", type=Path, required=True, metavar="DIR", help="for logs, samples, what resuming needs, and the model")
    add("--steps", type=int, default=10_000, metavar="N", help="training steps (default: 10000)")
    add("--batch", type=int, default=32, metavar="B", help="pairs a step (default: 32)")
    add("--lr", type=float, default=1e-4, metavar="X", help="learning rate (default: 1e-4)")
    add("--ema", type=float, default=0.9999, metavar="X", help="decay of the weights' average (default: 0.9999)")
    add("--balanced", action="store_true", help="let all noise levels count about alike (default: Eq. 1 as it is)")
    add("--seed", type=int, default=0, metavar="S", help="of all randomness (default: 0)")
    add("--device", default="cpu", metavar="D", help="cpu or cuda (default: cpu)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    noted = "noted in the model as its default for sampling (default: that of --init)"
    add("--sampling-steps", type=int, metavar="N", help=f"denoising steps, {noted}")
    add("--cfg-text", type=float, metavar="S_T", help=f"text guidance, {noted}")
    add("--cfg-image", type=float, metavar="S_I", help=f"image guidance, {noted}")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Check the settings and train."""
    options = parse(arguments)
    for name in ("steps", "batch", "threads", "sampling_steps"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} should be at least 1, not {value}")
    if not 0 < options.lr < 1:
        raise UserError(f"--lr should be between 0 and 1, not {options.lr}")
    if not 0 <= options.ema < 1:
        raise UserError(f"--ema should be from 0 to below 1, not {options.ema}")
    if not 0 <= options.seed < 10**8:
        raise UserError(f"--seed should be between 0 and {10**8 - 1}, not {options.seed}")
    check_sampling(options.sampling_steps, options.cfg_text, options.cfg_image, None)
    if options.threads:
        torch.set_num_threads(options.threads)
    check_device(options.device)
    train(options)


if __name__ == "__main__":
    run_program(main)
