"""Prompt-to-Prompt: two captions, two pictures, and everything the captions share stays where it is (Sec. 3.1.2).

    python p2p.py --source "a sketch of a red house by the sea" --target "a sketch of a red house at night"

Both pictures start from the same noise and meet the same ancestral noise. During a first share p of the steps the
second picture also borrows the first one's attention maps: self-attention maps, which hold the layout, as the authors
of InstructPix2Pix ran it; or cross-attention maps, which say where each word is (Hertz et al. 2022); or both. No map is
ever held in memory: attention by another's map is attention with the other's q and k and one's own v, and tokens that
stand for others are mixed on the side of the values, (A M) V = A (M V).
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from align import Alignment, align, phrase_tokens, scale_of
from attention import fused, fused_values, has_kernel, reference
from cli import Parser, UserError, check_device, check_sampling, check_seeds, make_folder, run_program
from diffusion import euler_ancestral
from formats import checkpoint
from images import enlarge, grid, save_png, to_image
from stable_diffusion import StableDiffusion

P_RANGE = (0.1, 0.9)  # Sec. 3.1.2: p ~ U(0.1, 0.9) for every pair
CONTROLS = ("self", "cross", "both")  # which maps are borrowed; the authors' released code: self


class PairControl:
    """An `attend` function for batches [null before, null after, text before, text after], B pairs in each part.

    Step i of n is controlled while share > i / (n - 1), as in the released code, so that even a share of 1 leaves the
    last step free; `next_step`, the sampler's callback, decides it once for all layers. The first pictures never depend
    on the control.

    Self-attention: the queries and keys of the second picture are those of the first; the unconditional half borrows
    from its own half. Cross-attention, in the half with text: with A and A' the maps of the first and the second
    picture, M and a of the alignment and c the scale of each token, the second one's output is
    (A M a + A' (1 - a)) c V = A (M a c V) + A' ((1 - a) c V).
    """

    def __init__(self, steps, self_share=None, cross_share=None, alignment=None, scale_share=None, scale=None):
        """steps: of the sampler. Shares [B], None for never: of borrowed self- and cross-attention, of re-weighting.

        alignment: an `Alignment` of the B pairs, needed for cross_share. scale c [B, L]: what the attention of the
        second picture to each token is multiplied by, needed for scale_share.
        """
        self.steps, self.alignment, self.scale = steps, alignment, scale
        # on the CPU, where a choice by share does not wait for the GPU
        self.shares = [None if share is None else share.cpu() for share in (self_share, cross_share, scale_share)]
        self.device = next((x.device for x in (self_share, cross_share, scale_share) if x is not None), None)
        self.begin(0)

    def next_step(self, step, sigma, denoised):
        """To be called once a step."""
        self.begin(step + 1)

    def begin(self, step):
        """Decide who is controlled at a step: bool [B] of self- and cross-attention and re-weighting, None for no one.

        Layers only read it: so compiled code is the same at all steps that control some pairs, or all, or none.
        """
        now = [None if share is None else self.controlled(share, step) for share in self.shares]
        self.all_borrow = now[0] is not None and bool(now[0].all())
        now = [chosen.to(self.device) if chosen is not None and chosen.any() else None for chosen in now]
        self.borrow_self, self.borrow_cross, self.reweight = now

    def controlled(self, share, step):
        """Which pairs a share [B] still controls at a step: bool [B]."""
        return share > step / max(1, self.steps - 1)

    def __call__(self, q, k, v, layer):
        """Attention as in attention.py."""
        if layer.cross:
            return self.look_at_words(q, k, v)
        if self.borrow_self is None:
            return fused(q, k, v)
        if has_kernel(q, 2) and self.all_borrow:
            # one map of the first pictures serves both pictures' values
            q, k, v = (x.unflatten(0, (2, 2, -1)) for x in (q, k, v))  # [2, 2, B, H, ., D]: halves, pictures, pairs
            return fused_values(q[:, 0], k[:, 0], v).flatten(0, 2)
        return fused(borrow(q, self.borrow_self), borrow(k, self.borrow_self), v)

    def look_at_words(self, q, k, v):
        """Cross-attention; q [4B, H, N, D], k and v [4B, H, L, D]."""
        pairs = len(q) // 4
        if self.reweight is not None:
            factor = torch.where(self.reweight[:, None], self.scale, 1.0)  # c [B, L]
            v = torch.cat([v[: 3 * pairs], v[3 * pairs :] * factor[:, None, :, None].to(v.dtype)])
        if self.borrow_cross is None:
            return fused(q, k, v)
        shared = (self.alignment.shared * self.borrow_cross[:, None])[:, None, :, None].to(v.dtype)  # a [B, 1, L, 1]
        null = fused(*(x[: 2 * pairs] for x in (q, k, v)))
        q, k, v = (x.unflatten(0, (2, 2, -1))[1:] for x in (q, k, v))  # [1, 2, B, H, ., D]: the half with text
        borrowed = self.alignment.mapper[:, None].to(v.dtype) @ (shared * v[:, 1])  # M a c V
        # one map of the first picture serves its own values and those that the second one borrows
        values = torch.stack([v[:, 0], borrowed], dim=1)
        text = fused_values(q[:, 0], k[:, 0], values, q[:, 1], k[:, 1], (1 - shared) * v[:, 1])
        return torch.cat([null, text.flatten(0, 2)])


def borrow(x, controlled):
    """Queries or keys [4B, H, N, D] -> the same, where `controlled` [B] the second picture's from the first."""
    before, after = x.unflatten(0, (2, 2, -1)).unbind(1)  # [2, B, H, N, D]: without and with text
    after = torch.where(controlled[:, None, None, None], before, after)
    return torch.stack([before, after], dim=1).flatten(0, 2)


class LocalBlend:
    """Confine the change to where some words are looked at (Hertz et al. 2022, Sec. 4.1 of the released code).

    `watch(attend)` is an `attend` function that also adds up, over all layers of one size and all steps so far, how
    much each place looks at the words; `blend` is put behind the denoiser. Outside the places of either picture's words
    the second picture is the first.
    """

    def __init__(self, words, size=(16, 16), threshold=0.3):
        """words [2B, L]: 1 at the tokens that name the region, of the captions before..., after...

        size: of the maps, height and width. threshold: of the largest value of a picture's averaged map.
        """
        self.words, self.size, self.threshold = words, size, threshold
        self.seen = None  # [2B, N]

    def watch(self, attend):
        """`attend`, watched; for the same batches as PairControl's."""

        def watched(q, k, v, layer):
            if layer.cross and layer.size == self.size:
                half = len(q) // 2
                words = self.words[:, None, :, None].expand(-1, q.shape[1], -1, -1).to(q.dtype)  # [2B, H, L, 1]
                looks = reference(q[half:], k[half:], words).float().mean(dim=1)[..., 0]
                self.seen = looks if self.seen is None else self.seen + looks
            return attend(q, k, v, layer)

        return watched

    def mask(self, height, width):
        """Where pictures may differ: bool [B, 1, height, width]. Raises UserError if nothing was seen yet."""
        if self.seen is None:
            size = "x".join(map(str, self.size))
            raise UserError(f"local blending needs cross-attention at {size}, which this model does not have")
        seen = F.max_pool2d(self.seen.unflatten(1, self.size)[:, None], 3, stride=1, padding=1)
        seen = F.interpolate(seen, size=(height, width))
        before, after = (seen > self.threshold * seen.amax(dim=(2, 3), keepdim=True)).chunk(2)
        return before | after

    def blend(self, denoise):
        """Make a `denoise(x, sigma)` whose second pictures are those of another one, confined to the mask.

        With the same noise, a sampler's step is linear in x and in what was denoised, so this confines x as well.
        """

        def blended(x, sigma):
            before, after = denoise(x, sigma).chunk(2)
            return torch.cat([before, torch.where(self.mask(*x.shape[2:]), after, before)])

        return blended


class PairNoise:
    """All random numbers of a batch of pairs; row i is what seed i alone would draw, whatever the batch.

    In the released code's order: the initial noise, p, the guidance scale, then one noise a step for both pictures.
    """

    def __init__(self, seeds, shape, guidance, p=P_RANGE, device="cpu"):
        """seeds: B whole numbers, shape (C, h, w) of a latent, guidance and p: the ranges to draw from."""
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device
        self.first = self.draw()
        self.p = self.uniform(*p)
        self.guidance = self.uniform(*guidance)

    def draw(self):
        """Standard normal noise [2B, C, h, w], equal for both pictures of a pair: before..., after..."""
        rows = [torch.randn(1, *self.shape, generator=g, device=self.device) for g in self.generators]
        return torch.cat(rows).repeat(2, 1, 1, 1)

    def uniform(self, low, high):
        """One uniform number a pair [B]."""
        draws = [torch.rand(1, generator=g, device=self.device) for g in self.generators]
        return low + (high - low) * torch.cat(draws)

    def __iter__(self):
        """The noise of every step."""
        while True:
            yield self.draw()


@torch.no_grad()
def sample_pairs(
    model, before, after, noise, steps=None, sampler=euler_ancestral, *, control="self", scale=None, blend=None
):
    """B caption pairs -> (pictures before, pictures after), each [B, 3, H, W], about in [-1, 1].

    model: a `StableDiffusion`, before and after: lists of B captions, noise: a `PairNoise` of B seeds. control: which maps
    are borrowed for the share noise.p of the steps, one of CONTROLS. scale [B, L]: re-weights the tokens of the
    captions after, at all steps. blend: a `LocalBlend`.
    """
    steps = steps or model.sampling.steps
    sigmas = model.schedule.sigmas(steps)
    attend = PairControl(
        steps,
        self_share=noise.p if control in ("self", "both") else None,
        cross_share=noise.p if control in ("cross", "both") else None,
        alignment=alignment_of(model, before, after) if control in ("cross", "both") else None,
        scale_share=None if scale is None else torch.full_like(noise.p, torch.inf),
        scale=scale,
    )
    guidance = noise.guidance.repeat(2)[:, None, None, None]
    watched = blend.watch(attend) if blend else attend
    denoise = model.denoiser(model.encode_text([*before, *after]), sigmas, guidance, watched)
    denoise = blend.blend(denoise) if blend else denoise
    latent = sampler(denoise, noise.first * sigmas[0].item(), sigmas, iter(noise), attend.next_step)
    return model.decode(latent).chunk(2)


def alignment_of(model, before, after):
    """How the tokens of caption pairs correspond, on the model's device."""
    pairs = zip(before, after, strict=True)
    return Alignment.stack([align(model.tokenizer, *pair) for pair in pairs]).to(model.device)


# ---- the program: Fig. 3 ----


def draw(options):
    """A sheet: the picture of the source, and that of the target with other noise, the same noise, and rising p."""
    model = StableDiffusion(checkpoint.load(options.weights, options.device))
    tokenizer, channels = model.tokenizer, model.vae.config.latent_channels
    captions = options.source, options.target
    scale = blend = None
    ways, side = len(options.p), model.sampling.resolution // model.vae.config.factor
    if options.reweight:
        weights = dict(factor_of(text) for text in options.reweight)
        scale = scale_of(tokenizer, options.target, weights).to(model.device).expand(ways, -1)
    guidance = model.sampling.text_guidance if options.guidance is None else options.guidance
    pictures = []
    for seed in range(options.seed, options.seed + options.num):
        if options.blend:
            marks = torch.zeros(2, tokenizer.tokens, device=model.device)
            for row, caption, words in zip(marks, captions, options.blend, strict=True):
                row[phrase_tokens(tokenizer, caption, words)] = 1
            blend = LocalBlend(marks.repeat_interleave(ways, dim=0))
        noise = PairNoise([seed] * ways, (channels, side, side), (guidance, guidance), device=model.device)
        noise.p = torch.tensor(options.p, device=model.device)
        texts = ([caption] * ways for caption in captions)
        settings = {"control": options.control, "scale": scale, "blend": blend}
        before, after = sample_pairs(model, *texts, noise, options.steps, **settings)
        other = model.sample([options.target], [seed + options.num], options.steps, guidance)
        pictures += [before[0], other[0], *after]
    columns = ["source", "other noise", *(f"p = {p:g}" for p in options.p)]
    title = f"{options.source} -> {options.target}"
    rows = [f"seed {seed}" for seed in range(options.seed, options.seed + options.num)]
    make_folder(options.out.parent)
    save_png(grid([enlarge(to_image(x)) for x in pictures], len(columns), None, columns, rows, title), options.out)
    print(options.out)


def factor_of(text):
    """Read "red house=2" as ("red house", 2.0). Raises UserError."""
    words, _, number = text.rpartition("=")
    try:
        if not abs(float(number)) <= 100:
            raise ValueError
        return words, float(number)
    except ValueError as error:
        raise UserError(f'--reweight should be WORDS=FACTOR, such as "night=2", not "{text}"') from error


def parse(arguments=None):
    """The command line."""
    parser = Parser(prog="p2p.py", description="Draw a pair of captions with and without Prompt-to-Prompt (Fig. 3).")
    add = parser.add_argument
    add("--source", required=True, metavar="TEXT", help="the caption of the first picture")
    add("--target", required=True, metavar="TEXT", help="the caption of the second one")
    mini = Path(__file__).resolve().parent / "models/mini/sd"
    add("--weights", default=str(mini), metavar="PATH", help="a text-to-image model (default: the bundled miniature)")
    add("--control", choices=CONTROLS, default="self", help="which attention maps are borrowed (default: self)")
    shares = [0.0, 0.3, 0.6, 0.9]
    add("--p", type=float, nargs="+", default=shares, metavar="P", help="shares of the steps (default: 0 0.3 0.6 0.9)")
    add("--reweight", nargs="+", metavar="WORDS=X", help="multiply the attention to words of the target")
    add(
        "--blend",
        nargs=2,
        metavar=("WORDS", "WORDS"),
        help="change only where these are, words of either caption",
    )
    add("--steps", type=int, metavar="N", help="denoising steps (default: the model's)")
    add("--guidance", type=float, metavar="S", help="text guidance (default: the model's)")
    add("--seed", type=int, default=0, metavar="S", help="of the first row (default: 0)")
    add("--num", type=int, default=2, metavar="N", help="rows, a seed each (default: 2)")
    add("--out", type=Path, default=Path("runs/p2p.png"), metavar="FILE.png", help="(default: %(default)s)")
    add("--device", default="cpu", metavar="D", help="cpu or cuda (default: cpu)")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Check the settings and draw."""
    options = parse(arguments)
    if not all(0 <= p <= 1 for p in options.p):
        raise UserError("--p should be from 0 to 1")
    if options.num < 1:
        raise UserError(f"--num should be at least 1, not {options.num}")
    check_sampling(options.steps, options.guidance, None, None)
    check_seeds([options.seed, options.seed + 2 * options.num])
    check_device(options.device)
    draw(options)


if __name__ == "__main__":
    run_program(main)
