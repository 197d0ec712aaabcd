"""Make what the paper takes off the shelf, for the miniature's world: autoencoder, CLIP and Stable Diffusion.

    python -m mini.pretrain all --out runs/mini        # everything in order; stopped and started again, it goes on
    python -m mini.pretrain vae --out runs/mini        # one stage

Stages: `vae`, `clip` (with its tokenizer), `judge` (measures pictures, teaches nothing), `sd`.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cli import Parser, UserError, atomic_write, check_device, run_program
from clip_text import CLIPText
from diffusion import NoiseSchedule, Sampling
from formats.checkpoint import Model, load_clip, load_vae, save_folder, save_vae
from formats.weights import read_tensors, write_json, write_tensors
from images import enlarge, grid, save_png, to_image
from mini.judge import Judge, labels
from mini.pretrain_clip import train_clip
from mini.scenes import choose, held_out_pictures, scenes, share_right, to_pictures, training_scene
from mini.world import SIZE, caption
from stable_diffusion import StableDiffusion
from training import Plan, fast_training, fit
from unet import Level, UNet, UNetConfig
from vae import VAE, VAEConfig

MINI_VAE = VAEConfig(channels=(16, 40, 80), resblocks=1, groups=8, scaling=1.0)
MINI_UNET = UNetConfig(
    levels=(
        #   channels  attention  heads    a 64x64 picture is here
        Level(    64,      True,     2),  # 16x16 latents
        Level(   128,      True,     4),  # 8x8
        Level(   160,     False,     5),  # 4x4; only the middle's transformer uses these heads
    ),
    resblocks=1,
    context_width=128,
    groups=16,
)
MINI_SAMPLING = Sampling(steps=20, text_guidance=4.0, image_guidance=1.5, resolution=SIZE)

PLANS = {
    "vae": Plan(steps=3600, batch=16, lr=2e-3, decay=0.7, seed=2),
    "clip": Plan(steps=1000, batch=128, lr=1e-3, decay=0.7, betas=(0.9, 0.98), weight_decay=0.05, seed=3),
    "judge": Plan(steps=700, batch=64, lr=2e-3, seed=1),
    "sd": Plan(steps=4200, batch=32, lr=1e-3, seed=4),
}
STAGES = tuple(PLANS)


# ---- the judge ----


def train_judge(options):
    """Train the judge on scenes, as they are and as the autoencoder gives them back, and measure its own error.

    Generated pictures are softer than drawn ones and lack the finest strokes; a judge must not live on those.
    """
    plan, device = options.plan("judge"), options.device
    drawn, pixels = scenes(options.scenes, options.out)
    answers = labels(drawn).to(device)
    vae = load_vae(options.out / "vae_model").float().to(device)
    decoded = decode_some(vae, pixels[:8192], device)
    torch.manual_seed(plan.seed)
    judge = Judge().to(device)

    def loss_of(step, generator, batch):
        chosen = choose(len(drawn), batch, generator)
        chosen[: batch // 2] %= len(decoded)
        x = to_pictures(pixels[chosen], device)
        x[: batch // 2] = to_pictures(decoded[chosen[: batch // 2]], device)
        softened = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        share = torch.rand(batch, 1, 1, 1, generator=generator).to(device)
        x = torch.lerp(x, softened, share) + 0.05 * torch.randn(x.shape, generator=generator).to(device)
        return judge.loss(x, answers[chosen])

    average = fit(judge, loss_of, plan, options.out / "judge", device=device)
    average.save(options.out / "judge.safetensors")
    held_out, x = held_out_pictures(options.test_scenes, device)
    with torch.no_grad():
        again = vae.decode(vae.encode(x).mode())
    return {
        "all attributes right on true pictures": share_right(average, x, held_out),
        "on those through the autoencoder": share_right(average, again, held_out),
    }


@torch.no_grad()
def decode_some(vae, pixels, device):
    """Pictures through the autoencoder: uint8 [count, 64, 64, 3], as they came."""
    parts = []
    for start in tqdm(range(0, len(pixels), 64), desc="decoding", leave=False):
        with fast_training(device):
            x = vae.decode(vae.encode(to_pictures(pixels[start : start + 64], device)).mode()).float()
        parts.append(((x.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).round().byte().cpu())
    return torch.cat(parts).numpy()


# ---- the autoencoder ----


def train_vae(options):
    """Train the autoencoder (Rombach et al. 2022, without the discriminator) and bring its latents to unit variance."""
    plan, device = options.plan("vae"), options.device
    drawn, pixels = scenes(options.scenes, options.out)
    torch.manual_seed(plan.seed)
    vae = VAE(MINI_VAE).to(device)
    _, held_out = held_out_pictures(options.test_scenes, device)

    def loss_of(step, generator, batch):
        x = to_pictures(pixels[choose(len(drawn), batch, generator)], device)
        if step < 0.75 * plan.steps:  # a quarter of each picture first, which is four times as fast
            top, left = torch.randint(SIZE // 2 + 1, (2,), generator=generator).tolist()
            x = x[:, :, top : top + SIZE // 2, left : left + SIZE // 2].contiguous()
        latent = vae.encode(x)
        noise = torch.randn(latent.mean.shape, generator=generator).to(device)
        guess = vae.decode(latent.sample(noise)).float()
        error = guess - x
        edges = sum((error.diff(dim=axis)).abs().mean() for axis in (2, 3))
        mean, logvar = latent.mean.float(), latent.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + 2 * error.square().mean() + 0.3 * edges + 2e-4 * divergence

    def show(average, step):
        again = average.decode(average.encode(held_out[:16]).mode()).float()
        write_grid(options.out / "vae" / "samples.png", [*held_out[:16], *again])

    average = fit(vae, loss_of, plan, options.out / "vae", device=device, show=show)
    with torch.no_grad():
        latents = encode_all(average, pixels[:2048], device).float()
        normalise_latents(average, latents)
        again = average.decode(average.encode(held_out).mode())
    shutil.rmtree(options.out / "vae_model", ignore_errors=True)  # of a run that was stopped in its last moments
    save_vae(average, options.out / "vae_model", torch.float16)
    noise_ratio = 10 * ((again - held_out).square().mean((1, 2, 3)) / 4).log10().neg().mean()
    return {
        "PSNR on held-out pictures, dB": noise_ratio.item(),
        "L1 in [0, 1]": ((again - held_out).abs().mean() / 2).item(),
    }


@torch.no_grad()
def normalise_latents(vae, latents):
    """Give every latent channel mean 0 and deviation 1 over `latents` [B, C, H, W], by the 1x1 convolutions there are.

    Stable Diffusion's VAE does it by one scaling factor; folded into quant_conv and post_quant_conv it is exact for
    every channel, and the factor becomes 1. The pictures stay the same.
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
    plan, device = options.plan("sd"), options.device
    drawn, pixels = scenes(options.scenes, options.out)
    vae = load_vae(options.out / "vae_model").float().to(device)
    clip, tokenizer = load_clip(options.out / "clip_model", device)
    kept = options.out / "sd" / f"latents_{options.scenes}.safetensors"  # so that resuming need not encode again
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        with atomic_write(kept) as beside:
            write_tensors(beside, {"latents": encode_all(vae, pixels, device)})
    latents = read_tensors(kept)[0]["latents"]
    captions = tokenizer([caption(scene) for scene in drawn])
    torch.manual_seed(plan.seed)
    unet = UNet(MINI_UNET).to(device)
    start_at_zero(unet)
    model = Model(unet, vae, text_alone(clip.text), tokenizer, MINI_SAMPLING)
    schedule, null = NoiseSchedule(), tokenizer([""])

    def loss_of(step, generator, batch):
        chosen = choose(len(drawn), batch, generator)
        z = latents[chosen].to(device).float()
        dropped = torch.rand(batch, 1, generator=generator) < 0.1
        context = model.text_encoder(torch.where(dropped, null, captions[chosen]).to(device))
        t = torch.randint(1000, (batch,), generator=generator).to(device)
        noise = torch.randn(z.shape, generator=generator).to(device)
        eps = unet(schedule.add_noise(z, noise, t), t, context).float()
        return (schedule.min_snr(t) * (eps - noise).square().mean((1, 2, 3))).mean()

    held_out = [training_scene(index, test=True) for index in range(options.test_scenes)]

    def show(average, step):
        judge = Judge.load(options.out / "judge.safetensors").to(device)
        sampler = StableDiffusion(Model(average, vae, model.text_encoder, tokenizer, MINI_SAMPLING))
        some = held_out[:32]
        x = sampler.sample([caption(scene) for scene in some], range(len(some)))
        write_grid(options.out / "sd" / "samples.png", x, [caption(scene) for scene in some])
        with open(options.out / "sd" / "samples.jsonl", "a", encoding="utf-8") as file:
            print(json.dumps({"step": step, "all attributes right": share_right(judge, x, some)}), file=file)

    average = fit(unet, loss_of, plan, options.out / "sd", device=device, show=show)
    model.unet = average
    shutil.rmtree(options.out / "sd_model", ignore_errors=True)  # of a run that was stopped in its last moments
    save_folder(model, options.out / "sd_model", torch.float16)
    sampler, judge, pictures = StableDiffusion(model), Judge.load(options.out / "judge.safetensors").to(device), []
    for seeds in torch.arange(len(held_out)).split(64):
        pictures.append(sampler.sample([caption(held_out[seed]) for seed in seeds], seeds.tolist()))
    right = share_right(judge, torch.cat(pictures), held_out)
    return {f"all attributes right on {len(held_out)} held-out captions": right}


@torch.no_grad()
def encode_all(vae, pixels, device):
    """The latents of all pictures, the mode: [count, C, h, w], float16, for the noise of a sample is far smaller."""
    batches = [pixels[i : i + 128] for i in range(0, len(pixels), 128)]
    encoded = []
    for batch in tqdm(batches, desc="encoding", leave=False):
        with fast_training(device):
            encoded.append(vae.encode(to_pictures(batch, device)).mode().half().cpu())
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


def write_grid(path, pictures, captions=None):
    """A sheet of pictures [3, 64, 64], eight a row."""
    save_png(grid([enlarge(to_image(x)) for x in pictures], 8, captions), path)


TRAIN = {"vae": train_vae, "clip": train_clip, "judge": train_judge, "sd": train_sd}


def parse(arguments=None):
    """The command line."""
    parser = Parser(prog="mini.pretrain", description="Train the miniature's autoencoder, CLIP and Stable Diffusion.")
    add = parser.add_argument
    add("stage", choices=[*STAGES, "all"], help="what to train; all: everything, in order")
    add("--out", type=Path, default=Path("runs/mini"), metavar="DIR", help="for results, logs and what resuming needs")
    add("--scenes", type=int, default=40_000, metavar="N", help="pictures to draw and train on (default: 40000)")
    add("--test-scenes", type=int, default=256, metavar="N", help="held-out pictures to measure on (default: 256)")
    add("--steps", type=int, metavar="N", help="training steps of a stage (default: its own, see PLANS)")
    add("--batch", type=int, metavar="B", help="pictures a step (default: the stage's own)")
    add("--seed", type=int, default=0, metavar="S", help="of all randomness (default: 0)")
    add("--device", default="cpu", metavar="D", help="cpu or cuda (default: cpu)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Train the stages that were asked for and note what they reached in `results.json`."""
    options = parse(arguments)
    for name in ("scenes", "test_scenes", "steps", "batch", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} should be at least 1, not {value}")
    if not 0 <= options.seed < 10**8:
        raise UserError(f"--seed should be between 0 and {10**8 - 1}, not {options.seed}")
    check_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)

    def plan(stage):
        chosen = {"steps": options.steps, "batch": options.batch}
        own = replace(PLANS[stage], **{key: value for key, value in chosen.items() if value})
        return replace(own, seed=own.seed + 1000 * options.seed)

    options.plan = plan
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {options.out}: {error.strerror}") from error
    for stage in STAGES if options.stage == "all" else [options.stage]:
        noted = options.out / stage / "results.json"
        if noted.exists():
            print(f"{stage}: done already; remove {options.out / stage} to train it anew")
            continue
        results = TRAIN[stage](options)
        last = (options.out / stage / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        results["minutes of training"] = json.loads(last)["minutes"]
        with atomic_write(noted) as beside:
            write_json(beside, results)
        print(f"{stage}: " + ", ".join(f"{name} {value:.3f}" for name, value in results.items()))


if __name__ == "__main__":
    run_program(main)
