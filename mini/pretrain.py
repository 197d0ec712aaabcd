"""Make what the paper takes off the shelf, for the miniature's world: autoencoder, CLIP and Stable Diffusion.

    python -m mini.pretrain all --out runs/mini        # everything in order; stopped and started again, it goes on
    python -m mini.pretrain vae --out runs/mini        # one stage

Stages: `vae`, `clip` (with its tokenizer), `judge` (measures images, teaches nothing), `sd`.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from cli import Parser, UserError, atomic_write, check_device, keep_settings, run_program, whole

import torch
import torch.nn.functional as F
from tqdm import tqdm

from attention import fused, reference
from clip_text import CLIPText
from diffusion import NoiseSchedule, Sampling
from formats.checkpoint import Model, load_clip, load_vae, save_folder, save_vae
from formats.weights import read_tensors, write_json, write_tensors
from images import enlarge, grid, save_png, to_image
from mini.judge import Judge, labels
from mini.pretrain_clip import train_clip
from mini.scenes import fraction_right, held_out_images, scenes, to_images, training_scene
from mini.world import SIZE, caption
from stable_diffusion import StableDiffusion
from train import Settings, autocasting, fit
from training.presets import fast_precision
from training.runs import PROCESSES, RANK, barrier, join, read_metrics
from unet import Level, UNet, UNetConfig
from vae import VAE, VAEConfig

MINI_VAE = VAEConfig(channels=(16, 40, 80), resblocks=1, groups=8, scaling=1.0)
MINI_UNET = UNetConfig(
    levels=(
        #   channels  attention  heads    a 64x64 image is here
        Level(    64,      True,     2),  # 16x16 latents
        Level(   128,      True,     4),  # 8x8
        Level(   160,     False,     5),  # 4x4; only the middle's transformer uses these heads
    ),
    resblocks=1,
    context_width=128,
    groups=16,
)
MINI_SAMPLING = Sampling(steps=20, text_guidance=4.0, image_guidance=1.5, resolution=SIZE)

SETTINGS = {  # batch_size: examples a step, of all processes together
    "vae": Settings(3600, lr=2e-3, batch_size=16, lr_decay=0.7, seed=2),
    "clip": Settings(1000, lr=1e-3, batch_size=128, lr_decay=0.7, beta2=0.98, weight_decay=0.05, seed=3),
    "judge": Settings(700, lr=2e-3, batch_size=64, seed=1),
    "sd": Settings(4200, lr=1e-3, batch_size=32, seed=4),
}
STAGES = tuple(SETTINGS)


# ---- the judge ----


def train_judge(options):
    """Train the judge on scenes, as they are and as the autoencoder gives them back, and measure its own error.

    Generated images are softer than drawn ones and lack the finest strokes; a judge must not live on those.
    """
    settings, device = options.settings("judge"), options.device
    drawn, pixels = scenes(options.scenes, options.out)
    answers = labels(drawn).to(device)
    vae = load_vae(options.out / "vae_model").float().to(device)
    decoded = decode_some(vae, pixels[:8192], device)
    torch.manual_seed(settings.seed)
    judge = Judge().to(device)

    def loss_of(network, draws):
        chosen = draws.integers(len(drawn)).numpy()
        x = to_images(pixels[chosen], device)
        x[::2] = to_images(decoded[chosen[::2] % len(decoded)], device)
        truths = chosen.copy()
        truths[::2] %= len(decoded)
        softened = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        amount = draws.uniform()[:, None, None, None].to(device)
        x = torch.lerp(x, softened, amount) + 0.05 * draws.normal(*x.shape[1:]).to(device)
        with options.autocast():
            return network.loss(x, answers[truths])

    average = fit(judge, loss_of, settings, options.out / "judge")
    if RANK > 0:
        return None
    average.save(options.out / "judge.safetensors")
    held_out, x = held_out_images(options.test_scenes, device)
    with torch.no_grad():
        again = vae.decode(vae.encode(x).mode())
    return {
        "all attributes right on true images": fraction_right(average, x, held_out),
        "on those through the autoencoder": fraction_right(average, again, held_out),
    }


@torch.no_grad()
def decode_some(vae, pixels, device):
    """Images through the autoencoder: uint8 [count, 64, 64, 3], as they came."""
    parts = []
    for start in tqdm(range(0, len(pixels), 64), desc="decoding", leave=False):
        with autocasting(device, fast_precision(device))():
            x = vae.decode(vae.encode(to_images(pixels[start : start + 64], device)).mode()).float()
        parts.append(((x.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).round().byte().cpu())
    return torch.cat(parts).numpy()


# ---- the autoencoder ----


def train_vae(options):
    """Train the autoencoder (Rombach et al. 2022, without the discriminator) and bring its latents to unit variance."""
    settings, device = options.settings("vae"), options.device
    drawn, pixels = scenes(options.scenes, options.out)
    torch.manual_seed(settings.seed)
    vae = VAE(MINI_VAE).to(device)
    _, held_out = held_out_images(options.test_scenes, device)

    def loss_of(network, draws):
        x = to_images(pixels[draws.integers(len(drawn)).numpy()], device)
        if draws.step < 0.75 * settings.max_steps:  # a quarter of each image first, which is four times as fast
            top, left = torch.randint(SIZE // 2 + 1, (2,), generator=draws.generator).tolist()
            x = x[:, :, top : top + SIZE // 2, left : left + SIZE // 2].contiguous()
        with options.autocast():
            latent = network.encode(x)
            noise = draws.normal(*latent.mean.shape[1:]).to(device)
            guess = network.decode(latent.sample(noise)).float()
        error = guess - x
        edges = sum((error.diff(dim=axis)).abs().mean() for axis in (2, 3))
        mean, logvar = latent.mean.float(), latent.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + 2 * error.square().mean() + 0.3 * edges + 2e-4 * divergence

    def evaluate(step):
        again = vae.decode(vae.encode(held_out[:16]).mode())
        write_grid(options.out / "vae" / "samples.png", [*held_out[:16], *again])

    average = fit(vae, loss_of, settings, options.out / "vae", evaluate)
    if RANK > 0:
        return None
    with torch.no_grad():
        latents = encode_all(average, pixels[:2048], device).float()
        normalise_latents(average, latents)
        again = average.decode(average.encode(held_out).mode())
    shutil.rmtree(options.out / "vae_model", ignore_errors=True)  # of a run that was stopped in its last moments
    save_vae(average, options.out / "vae_model", torch.float16)
    noise_ratio = 10 * ((again - held_out).square().mean((1, 2, 3)) / 4).log10().neg().mean()
    return {
        "PSNR on held-out images, dB": noise_ratio.item(),
        "L1 in [0, 1]": ((again - held_out).abs().mean() / 2).item(),
    }


@torch.no_grad()
def normalise_latents(vae, latents):
    """Give every latent channel mean 0 and deviation 1 over `latents` [B, C, H, W], by the 1x1 convolutions there are.

    Stable Diffusion's VAE does it by one scaling factor; folded into quant_conv and post_quant_conv it is exact for
    every channel, and the factor becomes 1. The images stay the same.
    """
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    vae.quant_conv.weight[:channels] /= deviation[:, None, None, None]
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / deviation
    vae.quant_conv.bias[channels:] -= 2 * deviation.log()
    weight = vae.post_quant_conv.weight
    vae.post_quant_conv.bias += (weight[:, :, 0, 0] * mean).sum(1)
    weight *= deviation[None, :, None, None]


# ---- Stable Diffusion ----


def train_sd(options):
    """Train text-to-image latent diffusion on captions, the text tower frozen (Rombach et al. 2022)."""
    settings, device = options.settings("sd"), options.device
    drawn, pixels = scenes(options.scenes, options.out)
    vae = load_vae(options.out / "vae_model").float().to(device)
    clip, tokenizer = load_clip(options.out / "clip_model", device)
    kept = options.out / "sd" / f"latents_{options.scenes}.safetensors"  # so that resuming need not encode again
    if RANK == 0 and not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        with atomic_write(kept) as beside:
            write_tensors(beside, {"latents": encode_all(vae, pixels, device)})
    barrier()
    latents = read_tensors(kept)[0]["latents"]
    captions = tokenizer([caption(scene) for scene in drawn])
    torch.manual_seed(settings.seed)
    unet = UNet(MINI_UNET).to(device)
    start_at_zero(unet)
    model = Model(unet, vae, text_alone(clip.text), tokenizer, MINI_SAMPLING)
    schedule, null = NoiseSchedule(), tokenizer([""])

    def loss_of(network, draws):
        chosen, drop, t = draws.integers(len(drawn)), draws.uniform() < 0.1, draws.integers(1000).to(device)
        z = latents[chosen].to(device).float()
        noise = draws.normal(*z.shape[1:]).to(device)
        with options.autocast():
            context = model.text_encoder(torch.where(drop[:, None], null, captions[chosen]).to(device))
            eps = network(schedule.add_noise(z, noise, t), t, context, options.attend).float()
        return (schedule.min_snr(t) * (eps - noise).square().mean((1, 2, 3))).mean()

    held_out = [training_scene(index, test=True) for index in range(options.test_scenes)]

    def evaluate(step):
        judge = Judge.load(options.out / "judge.safetensors").to(device)
        sampler = StableDiffusion(Model(unet, vae, model.text_encoder, tokenizer, MINI_SAMPLING))
        some = held_out[:32]
        x = sampler.sample([caption(scene) for scene in some], range(len(some)))
        write_grid(options.out / "sd" / "samples.png", x, [caption(scene) for scene in some])
        return {"all attributes right": fraction_right(judge, x, some)}

    fit(unet, loss_of, settings, options.out / "sd", evaluate)
    if RANK > 0:
        return None
    shutil.rmtree(options.out / "sd_model", ignore_errors=True)  # of a run that was stopped in its last moments
    save_folder(model, options.out / "sd_model", torch.float16)
    sampler, judge, images = StableDiffusion(model), Judge.load(options.out / "judge.safetensors").to(device), []
    for seeds in torch.arange(len(held_out)).split(64):
        images.append(sampler.sample([caption(held_out[seed]) for seed in seeds], seeds.tolist()))
    right = fraction_right(judge, torch.cat(images), held_out)
    return {f"all attributes right on {len(held_out)} held-out captions": right}


@torch.no_grad()
def encode_all(vae, pixels, device):
    """The latents of all images, the mode: [count, C, h, w], float16, for the noise of a sample is far smaller."""
    batches = [pixels[i : i + 128] for i in range(0, len(pixels), 128)]
    encoded = []
    for batch in tqdm(batches, desc="encoding", leave=False):
        with autocasting(device, fast_precision(device))():
            encoded.append(vae.encode(to_images(batch, device)).mode().half().cpu())
    return torch.cat(encoded) * vae.config.scaling


def start_at_zero(unet):
    """Let every residual block and transformer begin as the identity, and the prediction as zero."""
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            last = ".conv2." in name or ".transformer" in name and name.endswith((".proj_out.weight", ".proj_out.bias"))
            if (last and "feed_forward" not in name) or name.startswith("conv_out"):
                weight.zero_()


def text_alone(tower):
    """CLIP's text tower without the projection, as Stable Diffusion uses it; the weights are shared."""
    alone = CLIPText(replace(tower.config, projection=None))
    weights = tower.state_dict()
    weights.pop("projection.weight")
    alone.load_state_dict(weights, assign=True)
    return alone.eval().requires_grad_(False)


# ---- the program ----


def write_grid(path, images, captions=None):
    """A sheet of images [3, 64, 64], eight a row."""
    save_png(grid([enlarge(to_image(x)) for x in images], 8, captions), path)


TRAIN = {"vae": train_vae, "clip": train_clip, "judge": train_judge, "sd": train_sd}


def parse(arguments=None):
    """The command line."""
    parser = Parser(prog="mini.pretrain", description="Train the miniature's autoencoder, CLIP and Stable Diffusion.")
    add = parser.add_argument
    add("stage", choices=[*STAGES, "all"], help="what to train; all: everything, in order")
    add("--out", type=Path, default=Path("runs/mini"), metavar="DIR", help="for results, logs and what resuming needs")
    add("--scenes", type=whole, default=40_000, metavar="N", help="images to draw and train on (default: 40000)")
    add("--test-scenes", type=whole, default=256, metavar="N", help="held-out images to measure on (default: 256)")
    add("--max-steps", type=whole, metavar="N", help="training steps of a stage (default: its own, see SETTINGS)")
    add("--total-batch-size", type=whole, metavar="B", help="images a step (default: the stage's own)")
    add("--seed", type=int, default=0, metavar="S", help="of all randomness (default: 0)")
    add("--device", default="cpu", metavar="D", help="cpu or cuda (default: cpu)")
    add("--threads", type=whole, metavar="N", help="CPU threads (default: all cores)")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Train the stages that were asked for and note what they reached in `results.json`."""
    options = parse(arguments)
    if not 0 <= options.seed < 10**8:
        raise UserError(f"--seed should be between 0 and {10**8 - 1}, not {options.seed}")
    check_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.device = join(options.device)
    precision = fast_precision(options.device)
    options.autocast = autocasting(options.device, "bf16" if precision == "bf16" else "no")
    options.attend = reference if options.device == "cpu" else fused  # whose backward pass is slow on CPUs

    def settings(stage):
        own = SETTINGS[stage]
        total, steps = options.total_batch_size or own.batch_size, options.max_steps or own.max_steps
        if total % PROCESSES:
            raise UserError(f"{total} examples a step cannot be divided by {PROCESSES} processes")
        every = max(1, steps // 10)
        changed = {"max_steps": steps, "batch_size": total // PROCESSES, "eval_every": every, "save_every": every}
        return replace(own, **changed, seed=own.seed + 1000 * options.seed)

    options.settings = settings
    options.out.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if options.stage == "all" else [options.stage]:
        barrier()  # what the stage before has left is whole
        noted = options.out / stage / "results.json"
        if noted.exists():
            print(f"{stage}: done already; remove {options.out / stage} to train it anew")
            continue
        if RANK == 0:
            of_run = settings(stage)
            total = {"total_batch_size": of_run.batch_size * PROCESSES, "seed": of_run.seed}
            keep_settings(options.out / stage / "settings.json", total)
        results = TRAIN[stage](options)
        if RANK == 0:
            results["minutes of training"] = read_metrics(options.out / stage / "metrics.jsonl")[-1]["minutes"]
            with atomic_write(noted) as beside:
                write_json(beside, results)
            print(f"{stage}: " + ", ".join(f"{name} {value:.3f}" for name, value in results.items()))
        barrier()


if __name__ == "__main__":
    run_program(main)
