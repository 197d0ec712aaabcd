"""Make what the paper takes off the shelf, for the miniature's world: autoencoder, CLIP and Stable Diffusion.

    python -m mini.pretrain all --out runs/mini        # everything in order; stopped and started again, it goes on
    python -m mini.pretrain vae --out runs/mini        # one stage

Stages: `vae`, `clip` (with its tokenizer), `judge` (measures images, teaches nothing), `sd`.
"""

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import cli
from cli import WHOLE, Parser, UserError, atomic_write, between, check_device, keep_settings, run_program

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm

from attention import fused, reference
from clip_image import CLIP, CLIPImageConfig
from clip_text import END, START, CLIPTextConfig, CLIPTokenizer
from diffusion import NoiseSchedule, Sampling
from formats.checkpoint import Model, load_clip, load_vae, save_clip, save_folder, save_vae
from formats.weights import write_json
from images import grid, save_png, to_image
from mini.drawing import SIZE, render
from mini.judge import Judge, in_batches, labels, right
from mini.wording import all_words
from mini.words import caption
from mini.world import random_edit, random_scene
from stable_diffusion import StableDiffusion
from train import Settings, autocasting, fit
from training.runs import PROCESSES, RANK, barrier, join, read_metrics
from unet import Level, ResBlock, Transformer, UNet, UNetConfig
from vae import VAE, VAEConfig

MINI_VAE = VAEConfig(channels=(24, 48, 96, 128), resblocks=1, latent_channels=8, groups=8, scaling=1.0)
MINI_UNET = UNetConfig(
    levels=(
        #   channels  attention  heads    a 128x128 image is here
        Level(    64,      True,     2),  # 16x16 latents
        Level(   128,      True,     4),  # 8x8
        Level(   160,     False,     5),  # 4x4; only the middle's transformer uses these heads
    ),
    in_channels=8, out_channels=8, resblocks=1, context_width=128, groups=16,
)  # fmt: skip
MINI_SAMPLING = Sampling(steps=20, text_guidance=4.0, image_guidance=1.5, resolution=SIZE)


def scenes(count, test=False):
    """The first `count` scenes of training, always the same ones; with `test` held-out ones."""
    return [random_scene(np.random.default_rng([int(test), index]), test) for index in range(count)]


def kept_pixels(scenes, path):
    """The pixels of many scenes, uint8 [count, 128, 128, 3], drawn by all cores the first time and kept in a file."""
    if RANK == 0 and not path.exists():
        with ProcessPoolExecutor() as pool, atomic_write(path) as beside, open(beside, "wb") as file:
            drawn = tqdm(pool.map(render, scenes, chunksize=256), total=len(scenes), desc="drawing", leave=False)
            np.save(file, [np.asarray(image) for image in drawn])
    barrier()
    return np.load(path, mmap_mode="r")


def to_images(pixels, device="cpu"):
    """Pixels uint8 [B, 128, 128, 3] -> images [B, 3, 128, 128] in [-1, 1]."""
    x = torch.from_numpy(np.array(pixels)).to(device)
    return (x.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


# A stage is a function of the options, its settings, the training scenes with their pixels [count, 128, 128, 3], and
# the held-out scenes with their images [count, 3, 128, 128]. It returns the network to train, loss_of and evaluate as
# `train.fit` takes them, and finish(network), which saves what was trained and returns numbers for results.json.


def vae_stage(options, settings, drawn, pixels, held_out, images):
    """The autoencoder (Rombach et al. 2022, without the discriminator); its latents are brought to unit variance."""
    device, vae = options.device, VAE(MINI_VAE).to(options.device)

    def loss_of(network, draws):
        x = to_images(pixels[draws.integers(len(drawn)).numpy()], device)
        if draws.step < 0.9 * settings.max_steps:  # a quarter of each image first, which is four times as fast
            top, left = torch.randint(SIZE // 2 + 1, (2,), generator=draws.generator).tolist()
            x = x[:, :, top : top + SIZE // 2, left : left + SIZE // 2].contiguous()
        with options.autocast():
            latent = network.encode(x)
            noise = draws.normal(*latent.mean.shape[1:]).to(device)
            error = network.decode(latent.sample(noise)).float() - x
        edges = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3))
        mean, logvar = latent.mean.float(), latent.logvar.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 2e-4 * divergence

    def evaluate(step):
        some = [*images[:16], *vae.decode(vae.encode(images[:16]).mode())]
        save_png(grid([to_image(x) for x in some], 8), options.out / "vae" / "samples.png")

    def finish(vae):
        normalise_latents(vae, encode_all(vae, pixels[:2048], options).float())
        error = vae.decode(vae.encode(images).mode()) - images
        save_vae(vae, options.out / "vae_model", torch.float16)
        noise_ratio = 10 * (error.square().mean((1, 2, 3)) / 4).log10().neg().mean()
        return {"PSNR on held-out images, dB": noise_ratio.item(), "L1 in [0, 1]": (error.abs().mean() / 2).item()}

    return vae, loss_of, evaluate, finish


def encode_all(vae, pixels, options):
    """The latents of all images, the mode: [count, C, h, w], float16, for the noise of a sample is far larger."""

    def encode(pixels):
        with options.autocast():
            return vae.encode(to_images(pixels, options.device)).mode().half().cpu()

    return in_batches(encode, 128, pixels, desc="encoding")


@torch.no_grad()
def normalise_latents(vae, latents):
    """Give every latent channel mean 0 and deviation 1 over `latents` [B, C, H, W]; the images stay the same.

    Stable Diffusion has one scaling factor; folded into quant_conv and post_quant_conv it is exact for every channel.
    """
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    vae.quant_conv.weight[:channels] /= deviation[:, None, None, None]
    vae.quant_conv.bias[:channels] = (vae.quant_conv.bias[:channels] - mean) / deviation
    vae.quant_conv.bias[channels:] -= 2 * deviation.log()
    weight = vae.post_quant_conv.weight
    vae.post_quant_conv.bias += (weight[:, :, 0, 0] * mean).sum(1)
    weight *= deviation[None, :, None, None]


def clip_stage(options, settings, drawn, pixels, held_out, images):
    """Both towers by the contrastive loss (Radford et al. 2021), on captions and images.

    Captions hold no instructions, so two more losses, on texts alone, pull an instruction towards the plainest one that
    asks for the same, and towards the difference of the captions after and before it. No edited image is shown. Each
    process contrasts its own rows of the total batch.
    """
    device, tokenizer = options.device, train_tokenizer(all_words())
    size = {"width": 128, "layers": 4, "heads": 4, "projection": 128}  # of either tower
    text = CLIPTextConfig(len(tokenizer.vocabulary), tokenizer.tokens, end_token=tokenizer.end, **size)
    clip = CLIP(text, CLIPImageConfig(size=SIZE, patch=16, **size)).to(device)
    for name, weight in clip.named_parameters():
        if "embedding" in name:  # small, as CLIP's authors start from; torch's own are fifty times larger
            nn.init.normal_(weight, std=0.02)
    captions = tokenizer(styled_captions(drawn))
    rng = np.random.default_rng(settings.seed)
    edits = [random_edit(rng) for _ in range(2 * options.scenes)]
    texts = [(before, edit.instruction, edit.canonical, after) for edit in edits for before, after in [edit.captions]]
    texts = torch.stack([tokenizer(of_kind) for of_kind in zip(*texts, strict=True)])  # [4, edits, L]
    met = torch.cat([captions.unique(), texts.unique()]).unique()

    def loss_of(network, draws):
        chosen, picked = draws.integers(len(drawn)).numpy(), draws.integers(len(edits)).numpy()
        ids = texts[:, picked[: max(1, len(picked) // 2)]]
        x = (to_images(pixels[chosen], device) + 1) / 2
        with options.autocast():
            image = network.image.features(x).float()
            words = network.text.features(captions[chosen].to(device)).float()
            features = network.text.features(ids.flatten(0, 1).to(device)).float()
        before, instruction, plainest, after = features.chunk(4)
        scale = network.logit_scale.exp().clamp(max=100)
        turn = F.normalize(after - before, dim=-1)
        loss = contrast(scale * image @ words.T, captions[chosen])
        loss = loss + 0.5 * contrast(20 * instruction @ plainest.T, ids[2])
        return loss + 0.5 * contrast(10 * instruction @ turn.T, ids[2])

    def finish(clip):
        unmet = torch.ones(text.vocabulary, dtype=torch.bool, device=device)
        unmet[met] = False
        clip.text.token_embedding.weight[unmet] = 0  # rather than noise: bytes that no text of this world has
        save_clip(clip, tokenizer, options.out / "clip_model", torch.float16)
        texts = styled_captions(held_out)
        best = (clip.image.features((images + 1) / 2) @ clip.text.features(tokenizer(texts).to(device)).T).argmax(1)
        right = [texts[found] == text for found, text in zip(best.tolist(), texts, strict=True)]
        rng = np.random.default_rng(settings.seed + 1)
        asked = [random_edit(rng, wording="new") for _ in range(1000)]
        plainest = list(dict.fromkeys(edit.canonical for edit in asked))
        found = clip.text.features(tokenizer([edit.instruction for edit in asked]).to(device))
        found = (found @ clip.text.features(tokenizer(plainest).to(device)).T).argmax(1).tolist()
        alike = [plainest[at] == edit.canonical for at, edit in zip(found, asked, strict=True)]
        return {
            f"image to caption, first of {len(texts)}": float(np.mean(right)),
            f"instruction in held-out words to its plainest one, first of {len(plainest)}": float(np.mean(alike)),
            "tokens never met": int(unmet.sum()),
        }

    return clip, loss_of, None, finish


def contrast(logits, ids):
    """The symmetric contrastive loss of logits [B, B]; texts that are equal (ids [B, L]) count as right alike."""
    same = (ids[:, None] == ids[None]).all(2).float().to(logits.device)
    target = same / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def styled_captions(scenes):
    """A caption for every scene; every third one is plain."""
    return [caption(scene, number if number % 3 else 0) for number, scene in enumerate(scenes)]


def train_tokenizer(texts):
    """A byte-level BPE in CLIP's format: after the merges, every word of these texts is one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    clip = CLIPTokenizer({START: 0, END: 1}, []).bpe
    bpe.normalizer, bpe.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    letters, end = sorted(pre_tokenizers.ByteLevel.alphabet()), "</w>"
    learning = {"initial_alphabet": letters, "end_of_word_suffix": end, "min_frequency": 1, "vocab_size": 4000}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(**learning, show_progress=False))
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's order: the bytes, the bytes that end a word, the merges, the two special tokens
    pieces = letters + [letter + end for letter in letters] + [a + b for a, b in merges] + [START, END]
    return CLIPTokenizer({piece: number for number, piece in enumerate(dict.fromkeys(pieces))}, merges, tokens=40)


def judge_stage(options, settings, drawn, pixels, held_out, images):
    """The judge, on scenes as they are and as the autoencoder gives them back: softer, as generated images are."""
    device, judge, answers = options.device, Judge().to(options.device), labels(drawn).to(options.device)
    vae = load_vae(options.out / "vae_model").float().to(device)

    def through_vae(pixels):
        with options.autocast():
            x = vae.decode(vae.encode(to_images(pixels, device)).mode()).float()
        return ((x.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).round().byte().cpu()

    decoded = in_batches(through_vae, 64, pixels[:8192], desc="decoding").numpy()

    def loss_of(network, draws):
        chosen = draws.integers(len(drawn)).numpy()
        x = to_images(pixels[chosen], device)
        chosen[::2] %= len(decoded)
        x[::2] = to_images(decoded[chosen[::2]], device)
        softened = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        amount = draws.uniform()[:, None, None, None].to(device)
        x = torch.lerp(x, softened, amount) + 0.05 * draws.normal(*x.shape[1:]).to(device)
        with options.autocast():
            return network.loss(x, answers[chosen])

    def finish(judge):
        judge.save(options.out / "judge.safetensors")
        decoded = vae.decode(vae.encode(images).mode())
        shown = {"all attributes right on true images": images, "on those through the autoencoder": decoded}
        return {name: right(judge, x, held_out).mean() for name, x in shown.items()}

    return judge, loss_of, None, finish


def sd_stage(options, settings, drawn, pixels, held_out, images):
    """Text-to-image latent diffusion on captions, the text tower frozen (Rombach et al. 2022)."""
    device, unet, out = options.device, UNet(MINI_UNET).to(options.device), options.out
    start_at_zero(unet)
    vae = load_vae(out / "vae_model").float().to(device)
    clip, tokenizer = load_clip(out / "clip_model", device)
    clip.text.projection, clip.text.config = None, replace(clip.text.config, projection=None)  # which is CLIP's alone
    judge = Judge.load(out / "judge.safetensors", device)
    latents = encode_all(vae, pixels, options).contiguous()
    captions, null = tokenizer(styled_captions(drawn)), tokenizer([""])
    model = Model(unet, vae, clip.text, tokenizer, MINI_SAMPLING)
    sampler, schedule = StableDiffusion(model), NoiseSchedule()

    def loss_of(network, draws):
        chosen, drop, t = draws.integers(len(drawn)), draws.uniform() < 0.1, draws.integers(1000).to(device)
        z = latents[chosen].to(device).float()
        noise = draws.normal(*z.shape[1:]).to(device)
        with options.autocast():
            context = model.text_encoder(torch.where(drop[:, None], null, captions[chosen]).to(device))
            eps = network(schedule.add_noise(z, noise, t), t, context, options.attend).float()
        return (schedule.min_snr(t) * (eps - noise).square().mean((1, 2, 3))).mean()

    def evaluate(step):
        some = held_out[:32]
        x = sampler.sample(texts := styled_captions(some), range(len(some)))
        sheet = grid([to_image(image) for image in x], 8, texts)
        save_png(sheet, out / "sd" / "samples.png")
        return {"all attributes right": right(judge, x, some).mean()}

    def finish(unet):
        save_folder(model, out / "sd_model", torch.float16)
        x = in_batches(sampler.sample, 64, styled_captions(held_out), range(len(held_out)))
        return {f"all attributes right on {len(held_out)} held-out captions": right(judge, x, held_out).mean()}

    return unet, loss_of, evaluate, finish


def start_at_zero(unet):
    """Let every residual block and transformer begin as the identity, and the prediction as zero."""
    last = {ResBlock: "conv2", Transformer: "proj_out", UNet: "conv_out"}
    for module in unet.modules():
        if type(module) in last:
            for weight in getattr(module, last[type(module)]).parameters():
                nn.init.zeros_(weight)


STAGES = {  # batch_size: examples a step, of all processes together
    "vae": (vae_stage, Settings(16_000, lr=1e-3, batch_size=16, lr_decay=0.7, seed=2)),
    "clip": (clip_stage, Settings(2000, lr=1e-3, batch_size=128, lr_decay=0.7, beta2=0.98, weight_decay=0.05, seed=3)),
    "judge": (judge_stage, Settings(1000, lr=2e-3, batch_size=64, seed=1)),
    "sd": (sd_stage, Settings(8000, lr=1e-3, batch_size=32, seed=4)),
}


def run_stage(stage, options):
    """Train a stage that is not done yet, and note what it reached in `results.json`."""
    folder, (make, own) = options.out / stage, STAGES[stage]
    if (folder / "results.json").exists():
        print(f"{stage}: done already; remove {folder} to train it anew")
        return
    total, steps = options.total_batch_size or own.batch_size, options.max_steps or own.max_steps
    if total % PROCESSES:
        raise UserError(f"{total} examples a step cannot be divided by {PROCESSES} processes")
    seed, every = own.seed + 1000 * options.seed, max(1, steps // 10)
    changed = {"max_steps": steps, "eval_every": every, "save_every": every, "seed": seed}
    settings = replace(own, **changed, batch_size=total // PROCESSES)
    if RANK == 0:
        keep_settings(folder / "settings.json", {"total_batch_size": total, "seed": seed})
    drawn, held_out = scenes(options.scenes), scenes(options.test_scenes, test=True)
    pixels = kept_pixels(drawn, options.out / f"scenes_{options.scenes}.npy")
    images = to_images([np.asarray(render(scene)) for scene in held_out], options.device)
    torch.manual_seed(seed)  # of the weights to begin with; all else that is random is drawn from `Draws`
    network, loss_of, evaluate, finish = make(options, settings, drawn, pixels, held_out, images)
    network = fit(network, loss_of, settings, folder, evaluate)
    if RANK == 0:
        shutil.rmtree(options.out / f"{stage}_model", ignore_errors=True)  # of a run that was stopped in `finish`
        with torch.no_grad():
            results = finish(network)
        results["minutes of training"] = read_metrics(folder / "metrics.jsonl")[-1]["minutes"]
        with atomic_write(folder / "results.json") as beside:
            write_json(beside, results)
        print(f"{stage}: " + ", ".join(f"{name} {value:.3f}" for name, value in results.items()))


def main(arguments=None):
    """Train the stages that were asked for."""
    parser = Parser(prog="mini.pretrain", description="Train the miniature's autoencoder, CLIP and Stable Diffusion.")
    add = parser.add_argument
    add("stage", choices=[*STAGES, "all"], help="what to train; all: everything, in order")
    add("--out", type=Path, default=Path("runs/mini"), metavar="DIR", help="for results, logs and what resuming needs")
    add("--scenes", type=WHOLE, default=40_000, metavar="N", help="images to draw and train on (default: 40000)")
    add("--test-scenes", type=WHOLE, default=256, metavar="N", help="held-out images to measure on (default: 256)")
    add("--max-steps", type=WHOLE, metavar="N", help="training steps of a stage (default: its own, see STAGES)")
    add("--total-batch-size", type=WHOLE, metavar="B", help="images a step (default: the stage's own)")
    add("--seed", type=between(0, 10**8), default=0, metavar="S", help="of all randomness (default: 0)")
    add("--device", default="cpu", metavar="D", help="cpu or cuda (default: cpu)")
    add("--threads", type=WHOLE, metavar="N", help="CPU threads (default: all cores)")
    options = parser.parse_args(arguments)
    check_device(options.device)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    options.device = join(options.device)
    options.autocast = autocasting(options.device, "bf16" if cli.fast_precision(options.device) == "bf16" else "no")
    options.attend = reference if options.device == "cpu" else fused  # whose backward pass is slow on CPUs
    for stage in STAGES if options.stage == "all" else [options.stage]:
        run_stage(stage, options)
        barrier()  # what the stage leaves is whole


if __name__ == "__main__":
    run_program(main)
