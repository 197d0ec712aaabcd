"""Text2Live (Bar-Tal et al. 2022): a network trained on one image alone predicts a layer that edits it, by CLIP.

The layer is a colour C and an opacity a, and the edited image (1 - a) I + a C. CLIP compares the result with texts; a
structure loss keeps it like the input and a sparsity loss keeps the opacity low. It adds and recolours textures; it can
neither move things nor change the layout. Images are [B, 3, H, W] in [0, 1].

Unlike in the released code, CLIP's views are resized to squares, as all images of CLIP are here, and the bootstrap by
a region's relevancy is left out.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import trange

from baselines.layer_network import LayerNetwork
from baselines.views import clip_views, training_view
from images import to_image, to_tensor
from ip2p import as_image


@dataclass(frozen=True)
class Recipe:
    """What may differ between two uses; the released code's."""

    templates: tuple[str, ...] = (
        "photo of {}.", "high quality photo of {}.", "a photo of {}.", "the photo of {}.", "image of {}.",
        "an image of {}.", "high quality image of {}.", "a high quality image of {}.", "the {}.", "a {}.",
        "{}.", "{}", "{}!", "{}...",
    )  # fmt: skip
    screen_templates: tuple[str, ...] = ("{} over a green screen.", "{} in front of a green screen.")  # none: no term
    width: int = 128  # of the network
    views: int = 16  # that CLIP sees of an image at a time
    mirror: float = 0.5  # probability
    whole_every: int = 75  # iterations that see the whole image beside a random view


PHOTOGRAPHS = Recipe()
MINIATURE = Recipe(("{}",), (), width=64, mirror=0.0)  # its CLIP knows no screen, its captions name sides

GREEN = (0 / 255, 177 / 255, 64 / 255)  # of the screen
COMPOSITION, DIRECTION, STRUCTURE, SPARSITY, SCREEN = 1.0, 1.0, 2.0, 6.0, 1.0  # weights of the losses


@torch.enable_grad()  # whatever the caller has
def text2live(clip, image, caption_before, caption_after, *, steps=1000, seed=0, recipe=PHOTOGRAPHS, progress=False):
    """Edit a PIL image by the captions before and after. clip: (CLIP, its tokenizer), as `load_clip` returns them.

    Returns PIL images: (edited, the layer's colour, its opacity "L").
    """
    clip, tokenizer = clip
    device = clip.logit_scale.device
    whole = (to_tensor(as_image(image))[None].to(device) + 1) / 2
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = LayerNetwork(min(image.size), recipe.width).to(device)
        optimizer, lr = MADGRAD(network.parameters()), 2.5e-3
        for step in trange(steps, desc="Text2Live", unit="step", leave=False, disable=not progress):
            inputs = [training_view(whole, recipe.mirror)] + [whole] * (step % recipe.whole_every == 0)
            losses = [total_loss(clip, tokenizer, network, x, caption_before, caption_after, recipe) for x in inputs]
            (sum(losses) / len(losses)).backward()
            optimizer.step(lr)
            lr = max(1e-5, 0.99 * lr)
        with torch.no_grad():
            colour, opacity = network(whole)
    edited, colour, opacity = (2 * x[0] - 1 for x in (composite(whole, colour, opacity), colour, opacity))
    return to_image(edited), to_image(colour), to_image(opacity.expand(3, -1, -1)).convert("L")


def total_loss(clip, tokenizer, network, image, caption_before, caption_after, recipe):
    """All losses for one image, or view of it, [1, 3, H, W]."""
    colour, opacity = network(image)
    edited = composite(image, colour, opacity)
    templates = some_of(recipe.templates)
    before, after = (text_features(clip, tokenizer, caption, templates) for caption in (caption_before, caption_after))
    features = image_features(clip, edited, recipe)
    with torch.no_grad():
        input_features, input_tokens = image_features(clip, image, recipe), tokens(clip, image)
    loss = COMPOSITION * spherical(features, after)
    loss = loss + DIRECTION * direction_loss(features - input_features, after - before)
    loss = loss + STRUCTURE * structure_loss(tokens(clip, edited), input_tokens)
    loss = loss + SPARSITY * sparsity_loss(opacity)
    if recipe.screen_templates:
        green = torch.tensor(GREEN, device=image.device)[:, None, None].expand_as(image)
        text = text_features(clip, tokenizer, caption_after, some_of(recipe.screen_templates))
        loss = loss + SCREEN * spherical(image_features(clip, composite(green, colour, opacity), recipe), text)
    return loss


def composite(image, colour, opacity):
    """(1 - a) I + a C."""
    return (1 - opacity) * image + opacity * colour


def spherical(features, text):
    """Composition and screen loss: 2 arcsin^2(|x - y| / 2) of unit vectors, features [V, E] and text [1, E], a mean."""
    distance = (F.normalize(features, dim=-1) - F.normalize(text, dim=-1)).norm(dim=-1)
    return 2 * (distance / 2).arcsin().square().mean()


def direction_loss(image_change, text_change):
    """1 - cos(E(edited) - E(input), T(after) - T(before)), a mean over the views: [V, E] and [1, E]."""
    return (1 - F.cosine_similarity(image_change, text_change, dim=-1)).mean()


def structure_loss(edited, image):
    """Mean square difference of the self-similarities, cosines of all pairs of tokens; tokens [B, N, E]."""
    edited, image = (F.normalize(x, dim=-1) for x in (edited, image))
    return F.mse_loss(edited @ edited.mT, image @ image.mT)


def sparsity_loss(opacity):
    """0.01 times the mean of the opacity (L1) and of 2 sigmoid(5 a) - 1, which approximates the L0 norm."""
    return 0.01 * opacity.mean() + 0.01 * (2 * (5 * opacity).sigmoid() - 1).mean()


def some_of(templates):
    """A random number of random templates, perhaps the same ones again."""
    count = int(torch.randint(1, len(templates) + 1, ()))
    return [templates[i] for i in torch.randint(len(templates), (count,))]


@torch.no_grad()
def text_features(clip, tokenizer, caption, templates):
    """The mean of the projected, not normalised features of a caption in templates: [1, E]."""
    ids = tokenizer([template.format(caption) for template in templates]).to(clip.logit_scale.device)
    return clip.text.projected(ids).mean(dim=0, keepdim=True)


def image_features(clip, image, recipe):
    """The projected, not normalised features of random views of an image [1, 3, H, W]: [V, E]."""
    views = clip_views(image, clip.image.config.size, recipe.views, recipe.mirror)
    return clip.image(clip.image.preprocess(views))


def tokens(clip, image):
    """What an image's tokens, the class token too, are after all blocks but the last: [1, N, E]."""
    return clip.image.tokens(clip.image.preprocess(image), len(clip.image.blocks) - 1)


class MADGRAD:
    """Momentumised, adaptive dual averaging (Defazio and Jelassi 2021, Alg. 1), with weight decay."""

    def __init__(self, parameters, momentum=0.9, weight_decay=0.01):
        self.momentum, self.weight_decay, self.count = momentum, weight_decay, 0
        # each parameter, where it started, and the weighted sums of its gradients and of their squares
        self.states = [(x, x.detach().clone(), torch.zeros_like(x), torch.zeros_like(x)) for x in parameters]

    @torch.no_grad()
    def step(self, lr, eps=1e-6):
        """Update the parameters by their gradients, and remove these."""
        self.count += 1
        weight = (lr + eps) * self.count**0.5
        for x, start, total, squares in self.states:
            gradient = x.grad + self.weight_decay * x
            total += weight * gradient
            squares += weight * gradient.square()
            x.lerp_(start - total / (squares.pow(1 / 3) + eps), 1 - self.momentum)
            x.grad = None
