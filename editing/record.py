"""What the explain page shows, noted while an image is sampled: by `attend`, `trace` and the sampler's callback.

How much a place looks at a word is attention with one more value column, 1 at the word's tokens and 0 elsewhere: that
column of the output is the attention map, exactly. The image's own attention is computed as without a recorder, in a
call of its own, so that no pixel changes.
"""

import torch
import torch.nn.functional as F

from align import word_tokens

MAP_STEPS, MAP_SIDE = 8, 16  # attention maps are kept at so many steps, their longer side so many places
GUESS_STEPS, GUESS_SIDE = 24, 32  # clean guesses are decoded at so many steps, from latents no larger than this


def spread(count, most):
    """At most `most` of the whole numbers below `count`, spread evenly, the first and the last among them."""
    kept = min(count, most)
    return [round(i * (count - 1) / max(1, kept - 1)) for i in range(kept)]


def word_columns(tokenizer, text):
    """(names, columns [L, W]): for each word of a text 1 at its tokens; then the start token, then what follows.

    Every token is in one column, so that the shares of a place's attention add up to 1.
    """
    tokens = word_tokens(tokenizer, text)
    parts = [(word, own) for word, own in zip(text.split(), tokens, strict=True) if own]
    last = max((place for own in tokens for place in own), default=0)
    parts += [("(start)", [0]), ("(end and padding)", list(range(last + 1, tokenizer.tokens)))]
    columns = torch.zeros(tokenizer.tokens, len(parts))
    for column, (_, own) in enumerate(parts):
        columns[own, column] = 1
    return [word for word, _ in parts], columns


def at_most(most, size):
    """A height and a width, made smaller in proportion where one of them is more than `most`."""
    scale = min(1, most / max(size))
    return tuple(max(1, int(side * scale)) for side in size)


def decode_small(model, latent):
    """Latents [B, C, h, w] -> (the same averaged to at most GUESS_SIDE a side, their images [B, 3, H, W])."""
    small = F.interpolate(latent, size=at_most(GUESS_SIDE, latent.shape[2:]), mode="area")
    return small, model.decode(small)


class Recorder:
    """Looks on while a batch is sampled, of which R images are recorded, with one text each.

    On the CPU it keeps
    sigmas: one a step; latents: a step's [5, C, h, w] of `trace`;
    guesses: (latents [R, C, ., .], images [R, 3, ., .]) at all of `guess_steps` but the last; last: the last latents;
    cross: at each of `map_steps` [R, layers, W, rows, columns], W the columns of `word_columns`;
    own: at each of `map_steps` the self-attention [R, places, places], averaged over the layers of so many places.
    """

    def __init__(self, model, texts, rows, latent_rows, steps):
        """rows: of the R texts in the batch that the UNet sees; latent_rows: of their images in the sampler's batch.

        model: a `LatentDiffusion`. steps: of the run.
        """
        self.model, self.rows, self.latent_rows, self.steps, self.step = model, rows, latent_rows, steps, 0
        self.grid = None  # height and width of the maps that are kept
        self.words, columns = zip(*(word_columns(model.tokenizer, text) for text in texts), strict=True)
        most = max(map(len, self.words))
        self.columns = torch.stack([F.pad(one, (0, most - one.shape[1])) for one in columns]).to(model.device)
        self.map_steps, self.guess_steps = spread(steps, MAP_STEPS), spread(steps, GUESS_STEPS)
        self.sigmas, self.latents, self.guesses, self.cross, self.own = [], [], [], [], []
        self.maps, self.traced = {}, None  # of the evaluation at hand

    def watch(self, attend):
        """`attend`, watched."""

        def watched(q, k, v, layer):
            if self.step in self.map_steps:
                self.grid = self.grid or at_most(MAP_SIDE, layer.size)  # the first layer is as fine as any
                if layer.cross:
                    self.maps[layer] = self.cross_maps(attend, q, k, v.dtype, layer)
                elif min(side - least for side, least in zip(layer.size, self.grid, strict=True)) >= 0:
                    self.maps[layer] = self.self_maps(attend, q, k, v.dtype, layer)
            return attend(q, k, v, layer)

        return watched

    def cross_maps(self, attend, q, k, dtype, layer):
        """How much each place looks at each word, the mean over the heads: [R, W, H, W'] of the layer's size."""
        values = torch.zeros(len(q), 1, *self.columns.shape[1:], dtype=dtype, device=q.device)
        values[self.rows, 0] = self.columns.to(dtype)
        out = attend(q, k, values.expand(-1, q.shape[1], -1, -1), layer)[self.rows]  # [R, H, N, W]
        return out.float().mean(dim=1).transpose(1, 2).unflatten(2, layer.size)

    def self_maps(self, attend, q, k, dtype, layer):
        """How much each place of the grid looks at each other, the mean over the heads: [R, places, places]."""
        (height, width), (rows, columns) = layer.size, self.grid
        y, x = (torch.arange(side, device=q.device) for side in layer.size)
        cells = (y * rows // height)[:, None] * columns + x * columns // width  # [H, W]: in which place each query is
        values = F.one_hot(cells.flatten(), rows * columns).to(dtype).expand(*q.shape[:2], -1, -1)
        y, x = ((2 * torch.arange(n) + 1) * side // (2 * n) for n, side in ((rows, height), (columns, width)))
        middles = (y[:, None] * width + x).flatten()
        return attend(q[:, :, middles], k, values, layer)[self.rows].float().mean(dim=1)

    def trace(self, *parts):
        """Of `InstructPix2Pix.denoiser`: (z, eps_full, eps_image, eps_null, eps), each [B, C, h, w]."""
        self.traced = torch.stack([part[self.latent_rows[0]] for part in parts]).float().cpu()

    def next_step(self, step, sigma, denoised):
        """The sampler's callback: keep what was seen at this step."""
        self.sigmas.append(sigma)
        if self.traced is not None:
            self.latents.append(self.traced)
        if step in self.map_steps:
            cross = [F.adaptive_avg_pool2d(maps, self.grid) for layer, maps in self.maps.items() if layer.cross]
            own = [maps for layer, maps in self.maps.items() if not layer.cross]
            self.cross.append(torch.stack(cross, dim=1).cpu())
            self.own.append(torch.stack(own).mean(dim=0).cpu())
        latent = denoised[self.latent_rows]
        if step == self.steps - 1:
            self.last = latent.float().cpu()  # the result: it is decoded anyway
        elif step in self.guess_steps:
            self.guesses.append([part.float().cpu() for part in decode_small(self.model, latent)])
        self.step = step + 1

    def guidance(self):
        """Latents [steps, C, h, w] by name: the noisy latent, and Eq. 3 with each eps as the clean guess x - sigma eps.

        The weights of the branches in Eq. 3 add up to 1, so that it holds for the clean guesses as it does for eps.
        """
        z, full, image, null, eps = torch.stack(self.latents).unbind(1)
        sigma = torch.tensor(self.sigmas)[:, None, None, None]
        x = z * (sigma**2 + 1).sqrt()
        guesses = {"null": null, "image": image, "full": full, "result": eps}
        latents = {"noisy": z} | {name: x - sigma * part for name, part in guesses.items()}
        return latents | {"to_image": sigma * (null - image), "to_text": sigma * (image - full)}

    def panels(self, result):
        """`guidance` as images [steps, 3, h, w], a pixel a latent; result [3, H, W]: of the run.

        A direction stands around grey, its largest value at full colour.
        """
        colours, panels = self.linear_colours(result), {}
        for name, latents in self.guidance().items():
            images = torch.einsum("nchw,cd->ndhw", latents, colours[:-1])
            if name.startswith("to_"):
                panels[name] = images / images.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-8)
            else:
                panels[name] = images + colours[-1][:, None, None]
        return panels

    def linear_colours(self, result):
        """[C + 1, 3]: the linear map from a latent, and a 1, to its mean colour that fits the decoded guesses best.

        So a latent can be shown at every step; to decode them all would take longer than the edit itself.
        """
        seen = [(latent[0], image[0]) for latent, image in self.guesses] + [(self.last[0], result)]
        latents = torch.cat([latent.flatten(1).T for latent, _ in seen]).double()
        colours = [F.adaptive_avg_pool2d(image, latent.shape[1:]).flatten(1).T for latent, image in seen]
        return torch.linalg.lstsq(F.pad(latents, (0, 1), value=1), torch.cat(colours).double()).solution.float()
