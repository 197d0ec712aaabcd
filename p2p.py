"""Prompt-to-Prompt: two captions, two images, and what the captions share stays the same (Sec. 3.1.2).

    python p2p.py --source "a sketch of a red house by the sea" --target "a sketch of a red house at night"

Both images start from the same noise and get the same ancestral noise. During a first fraction p of the steps the
second image also uses the first one's attention maps: self-attention maps, which hold the layout, as in the released
code of InstructPix2Pix; or cross-attention maps, which say where each word is (Hertz et al. 2022); or both. No map is
ever held in memory: attention with another's map is attention with the other's q and k and one's own v, and tokens that
correspond are mixed on the side of the values, (A M) V = A (M V).
"""

import sys
from pathlib import Path

from cli import FRACTION, PIXELS, SCALE, SEED, STEPS, WHOLE, Parser, UserError, check_device, html_file, run_program

import torch
import torch.nn.functional as F
from tqdm import tqdm

from align import Alignment, phrase_tokens
from attention import fused
from formats import checkpoint
from gpu.savings import give_up
from images import enlarge, grid, save_png, to_image
from stable_diffusion import StableDiffusion

P_RANGE = (0.1, 0.9)  # Sec. 3.1.2: p ~ U(0.1, 0.9) for every pair
CONTROLS = ("self", "cross", "both")  # which maps are borrowed; the authors' released code: self


class PairControl:
    """An `attend` function for batches [null before, null after, text before, text after], B pairs in each part.

    Step i of n is controlled while p > i / (n - 1), as in the released code, so p = 1 leaves the last step free.
    Self-attention: queries and keys of the second image are those of the first, within each half of the batch.
    Cross-attention, in the half with text: with A and A' the maps of the first and the second image, M and a of the
    alignment and c the factor of each token, the second image's output is (A M a + A' (1 - a)) c V.
    """

    def __init__(self, steps, p, control="self", alignment=None, scale=None):
        """p [B]: fraction of the steps. control: one of CONTROLS. alignment: needed for cross-attention.

        scale c [B, L]: what the second image's attention to each token is multiplied by, at all steps (re-weighting).
        """
        self.steps, self.p, self.alignment, self.scale = steps, p.cpu(), alignment, scale
        self.self_control, self.cross_control = control in ("self", "both"), control in ("cross", "both")
        self.next_step(-1)

    def only(self, pairs):
        """From the next step on, the batches hold these pairs alone: bool [B]."""
        self.p = self.p[pairs.cpu()]
        if self.alignment:
            self.alignment = Alignment(self.alignment.mapper[pairs], self.alignment.shared[pairs])
        self.scale = None if self.scale is None else self.scale[pairs]

    def next_step(self, step, sigma=None, denoised=None):
        """The sampler's callback after a step: which pairs are controlled at the next one, `active` bool [B]."""
        self.active = self.p > (step + 1) / max(1, self.steps - 1)
        self.any_active, self.all_active = bool(self.active.any()), bool(self.active.all())

    def __call__(self, q, k, v, layer):
        """Attention as in attention.py; q [4B, H, N, D], k and v [4B, H, M, D]."""
        if layer.cross:
            return self.cross_attention(q, k, v)
        if self.self_control and self.any_active:
            q, k = self.of_first(q), self.of_first(k)
        return fused(q, k, v)

    def of_first(self, x):
        """q or k [4B, H, N, D] -> the same, with the first image's in place of the second's where a pair is active."""
        null_before, null_after, before, after = x.chunk(4)
        active = self.active.to(x.device)[:, None, None, None]
        null_after = torch.where(active, null_before, null_after)
        after = torch.where(active, before, after)
        return torch.cat([null_before, null_after, before, after])

    def cross_attention(self, q, k, v):
        """(A M a + A' (1 - a)) c V for the second image with text; the other three parts are not controlled."""
        pairs = len(q) // 4
        if self.scale is not None:
            v = torch.cat([v[: 3 * pairs], v[3 * pairs :] * self.scale[:, None, :, None].to(v.dtype)])
        out = fused(q, k, v)
        if not (self.cross_control and self.any_active):
            return out
        (q_before, q_after), (k_before, k_after) = q.chunk(4)[2:], k.chunk(4)[2:]
        v_after, active = v[3 * pairs :], self.active.to(v.device)[:, None, None, None]
        mapper, shared = self.alignment.mapper[:, None].to(v.dtype), self.alignment.shared[:, None, :, None].to(v.dtype)
        borrowed = fused(q_before, k_before, mapper @ (shared * v_after))  # A M a c V
        borrowed = borrowed + fused(q_after, k_after, (1 - shared) * v_after)  # + A' (1 - a) c V
        return torch.cat([out[: 3 * pairs], torch.where(active, borrowed, out[3 * pairs :])])


class LocalBlend:
    """Confine the change to where some words are looked at, from a fifth of the steps on (Hertz et al., released code).

    `watch(attend)` is an `attend` function that also sums, over all layers of one size and all steps so far, how much
    each place looks at the words, by the maps that are really used: as one more value, 1 at these words (no map in
    memory). `blend(denoise)` makes the second image equal the first outside the places of either image's words.
    """

    def __init__(self, words, steps, size=(16, 16), threshold=0.3, start=0.2):
        """words [2B, L]: 1 at the tokens that name the region, of the captions before..., after...

        size: height and width of the maps. threshold: of the largest value of an image's map. start: of the steps.
        """
        self.words, self.size, self.threshold = words, size, threshold
        self.step, self.start = 0, int(start * steps)
        self.seen = torch.zeros(len(words), size[0] * size[1], device=words.device)  # [2B, N]

    def watch(self, attend):
        """`attend`, watched; for the same batches as PairControl's."""

        def watched(q, k, v, layer):
            if layer.cross and layer.size == self.size:
                words = torch.cat([torch.zeros_like(self.words), self.words])[:, None, :, None]
                looks = attend(q, k, words.to(v.dtype).expand_as(v), layer)
                self.seen += looks[len(q) // 2 :, ..., 0].float().mean(dim=1)
            return attend(q, k, v, layer)

        return watched

    def mask(self, height, width):
        """Where images may differ: bool [B, 1, height, width]. Raises UserError if no layer has maps of this size."""
        if not self.seen.any():
            size = "x".join(map(str, self.size))
            raise UserError(f"local blending needs cross-attention at {size}, which this model does not have")
        seen = F.max_pool2d(self.seen.unflatten(1, self.size)[:, None], 3, stride=1, padding=1)
        seen = F.interpolate(seen, size=(height, width))
        before, after = (seen > self.threshold * seen.amax(dim=(2, 3), keepdim=True)).chunk(2)
        return before | after

    def blend(self, denoise):
        """Make a `denoise(x, sigma)` that confines x, in place, and the clean guess."""

        def confine(x):
            before, after = x.chunk(2)
            after.copy_(torch.where(self.mask(*x.shape[2:]), after, before))

        def blended(x, sigma):
            if self.step > self.start:
                confine(x)  # the result of the step before; in place, since the sampler goes on from it
            denoised = denoise(x, sigma)
            if self.step >= self.start:
                confine(denoised)
            self.step += 1
            return denoised

        return blended


class PairNoise:
    """All random numbers of a batch of pairs; row i is what seed i alone would draw, whatever the batch.

    In the released code's order: the initial noise, p, the guidance scale, then one noise a step for both images.
    There p and the scale are drawn on the CPU even when the noise is drawn on a GPU, both seeded with the seed.
    """

    def __init__(self, seeds, shape, guidance, p=P_RANGE, device="cpu"):
        """seeds: B whole numbers, shape (C, h, w) of a latent, guidance and p: the ranges to draw from."""
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device
        self.first = self.draw()
        if torch.device(device).type == "cpu":
            on_cpu = self.generators
        else:
            on_cpu = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.p, scales = (  # [B] each, on the CPU
            low + (high - low) * torch.cat([torch.rand(1, generator=generator) for generator in on_cpu])
            for low, high in (p, guidance)
        )
        self.guidance = scales.to(device)

    def draw(self):
        """Standard normal noise [2B, C, h, w], equal for both images of a pair: before..., after..."""
        rows = [torch.randn(1, *self.shape, generator=g, device=self.device) for g in self.generators]
        return torch.cat(rows).repeat(2, 1, 1, 1)

    def __iter__(self):
        """The noise of every step."""
        while True:
            yield self.draw()


@torch.no_grad()
def sample_pairs(
    model, before, after, noise, steps=None, sampler=None, schedule=None,
    *, control="self", scale=None, blend=None, fails=None, recorder=None,
):  # fmt: skip
    """B caption pairs -> (images before, images after), each [B, 3, H, W], about in [-1, 1].

    model: a `StableDiffusion`, before and after: lists of B captions, noise: a `PairNoise` of B seeds. control: which
    maps are borrowed for the fraction noise.p of the steps, one of CONTROLS. scale [B, L]: re-weights the tokens of the
    captions after, at all steps. blend: a `LocalBlend`. fails: see `gpu.savings.give_up`. recorder: looks on, a
    `editing.record.Recorder`. steps, sampler and schedule as in `model.solver`.
    """
    sampler, sigmas = model.solver(steps, sampler, schedule)
    steps = len(sigmas) - 1
    alignment = None if control == "self" else Alignment.of(model.tokenizer, before, after, model.device)
    pair_control = PairControl(steps, noise.p, control, alignment, scale)
    attend = recorder.watch(pair_control) if recorder else pair_control
    attend = blend.watch(attend) if blend else attend
    text, guidance = model.encode_text([*before, *after]), noise.guidance.repeat(2)[:, None, None, None]

    def denoiser_of(pairs):
        pair_control.only(pairs)
        rows = pairs.repeat(2)
        return model.denoiser(text[rows], guidance[rows], attend)

    def callback(*step):
        pair_control.next_step(*step)
        if recorder:
            recorder.next_step(*step)

    denoise = denoiser_of(torch.ones(len(before), dtype=torch.bool, device=model.device))
    denoise = blend.blend(denoise) if blend else denoise
    denoise = give_up(model, denoise, denoiser_of, fails, steps) if fails else denoise
    latent = sampler(denoise, noise.first * sigmas[0].item(), sigmas, iter(noise), callback)
    return model.decode(latent).chunk(2)


# ---- the program: Fig. 3 ----


def figure(options):
    """A sheet: the source's image, and the target's with other noise, with the same noise, and with rising p."""
    print(f"loading {options.weights}", file=sys.stderr)
    dtype = getattr(torch, options.dtype)
    parts = checkpoint.load(options.weights, options.device, dtype, vae=options.vae, kind="sd")
    model, resolution = StableDiffusion(parts), options.resolution or parts.sampling.resolution
    model.vae.float()  # a small part of the work, and bfloat16 has fewer levels than an image
    if resolution % parts.side_multiple:
        raise UserError(f"--resolution should be a multiple of {parts.side_multiple} for this model")
    steps = options.steps or model.sampling.steps
    guidance = model.sampling.text_guidance if options.guidance is None else options.guidance
    seeds = range(options.seed, options.seed + options.num)
    groups = [[p] for p in options.p] if options.low_memory else [options.p]  # what is sampled in one batch
    total, sheet = len(seeds) * (len(groups) + 1) * steps, []
    with tqdm(total=total, desc="sampling", unit="step", leave=False) as bar:

        def sampler(denoise, *others):
            def counted(x, sigma):
                bar.update()
                return denoise(x, sigma)

            return model.solver()[0](counted, *others)

        for seed in seeds:
            rows = [sample_row(model, options, seed, p, resolution, steps, guidance, sampler) for p in groups]
            other = model.sample([options.target], [seed + options.num], steps, guidance, resolution, sampler)
            sheet += [rows[0][0][0], other[0], *(image for _, after in rows for image in after)]
    if not all(x.isfinite().all() for x in sheet):
        raise UserError("the networks gave NaN or Inf: damaged weights, or --dtype float16 is too narrow")
    columns = ["source", "other noise", *(f"p = {p:g}" for p in options.p)]
    rows, title = [f"seed {seed}" for seed in seeds], f"{options.source} -> {options.target}"
    save_png(grid([enlarge(to_image(x)) for x in sheet], len(columns), None, columns, rows, title), options.out)
    print(options.out)
    if options.explain:
        explain(model, options, resolution, steps, guidance)


def explain(model, options, resolution, steps, guidance):
    """The page of one pair: the first seed, with the last of the fractions p."""
    from editing.record import Recorder
    from pages.explain import write_pair_page

    captions, p = [options.source, options.target], options.p[-1]
    recorder = Recorder(model, captions, [2, 3], [0, 1], steps)
    before, after = sample_row(model, options, options.seed, [p], resolution, steps, guidance, None, recorder)
    control, borrows = PairControl(steps, torch.tensor([p])), []
    for step in range(steps):
        control.next_step(step - 1)
        borrows.append(control.any_active)
    settings = {"source": options.source, "target": options.target, "weights": options.weights, "p": p}
    settings |= {"control": options.control, "steps": steps, "sampler": model.sampling.sampler, "guidance": guidance}
    settings |= {"resolution": resolution, "seed": options.seed}
    images = to_image(before[0]), to_image(after[0])
    write_pair_page(recorder, options.explain, captions, images, settings, borrows, PairControl.of_first)
    print(options.explain)


def sample_row(model, options, seed, p, resolution, steps, guidance, sampler, recorder=None):
    """(images before, images after) of one seed for each of the fractions in the list p, as one batch."""
    tokenizer, captions, ways = model.tokenizer, (options.source, options.target), len(p)
    scale = torch.ones(ways, tokenizer.tokens, device=model.device) if options.reweight else None
    for words, factor in options.reweight or ():
        scale[:, phrase_tokens(tokenizer, options.target, words)] = factor
    blend = None
    if options.blend:
        marks = torch.zeros(2, tokenizer.tokens, device=model.device)
        for row, caption, words in zip(marks, captions, options.blend, strict=True):
            row[phrase_tokens(tokenizer, caption, words)] = 1
        blend = LocalBlend(marks.repeat_interleave(ways, dim=0), steps)
    side = resolution // model.vae.config.factor
    shape = model.vae.config.latent_channels, side, side
    noise = PairNoise([seed] * ways, shape, (guidance, guidance), device=model.device)
    noise.p = torch.tensor(p)
    texts = ([caption] * ways for caption in captions)
    more = {"control": options.control, "scale": scale, "blend": blend, "recorder": recorder}
    return sample_pairs(model, *texts, noise, steps, sampler, **more)


def reweighting(text):
    """Read "red house=2" as ("red house", 2.0)."""
    words, _, factor = text.rpartition("=")
    return words, float(factor)


def parse(arguments=None):
    """The command line."""
    parser = Parser(prog="p2p.py", description="Images of two captions with and without Prompt-to-Prompt (Fig. 3).")
    add = parser.add_argument
    add("--source", required=True, metavar="TEXT", help="the caption of the first image")
    add("--target", required=True, metavar="TEXT", help="the caption of the second one")
    add("--weights", default="mini", metavar="PATH", help="a text-to-image model, such as sd15 (default: mini)")
    add("--vae", metavar="PATH", help="another autoencoder, such as the fine-tuned vae")
    add("--control", choices=CONTROLS, default="self", help="which attention maps are borrowed (default: self)")
    fractions = "fractions of the steps (default: 0 0.3 0.6 0.9)"
    add("--p", type=FRACTION, nargs="+", default=[0.0, 0.3, 0.6, 0.9], metavar="P", help=fractions)
    add("--reweight", type=reweighting, nargs="+", metavar="WORDS=X", help="multiply attention to words of the target")
    add("--blend", nargs=2, metavar="WORDS", help="change the image only where these words of source and target are")
    add("--steps", type=STEPS, metavar="N", help="denoising steps (default: the model's)")
    add("--guidance", type=SCALE, metavar="S", help="text guidance (default: the model's)")
    add("--resolution", type=PIXELS, metavar="R", help="pixels a side (default: the model's)")
    add("--seed", type=SEED, default=0, metavar="S", help="of the first row (default: 0)")
    add("--num", type=WHOLE, default=2, metavar="N", help="rows, a seed each (default: 2)")
    add("--out", type=Path, default=Path("runs/p2p.png"), metavar="FILE.png", help="(default: %(default)s)")
    add("--explain", type=html_file, metavar="FILE.html", help="a page of the first seed with the last P, too")
    add("--device", default="cpu", metavar="D", help="cpu or cuda (default: cpu)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="number format")
    add("--low-memory", action="store_true", help="one P at a time: slower, in less memory")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Make the figure."""
    options = parse(arguments)
    check_device(options.device)
    figure(options)


if __name__ == "__main__":
    run_program(main)
