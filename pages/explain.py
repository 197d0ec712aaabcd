"""The explain page: one edit, or one pair of Prompt-to-Prompt, with what a `Recorder` noted while it was sampled."""

import base64

import torch
import torch.nn.functional as F

from align import Alignment
from attention import fused
from diffusion import SAMPLERS
from editing.record import Recorder
from images import edit_size, enlarge, to_image, to_tensor
from ip2p import InstructPix2Pix, guided_eps
from pages.form import jpeg_url, where, write
from unet import Attention

LATENTS = 32  # shown a side at most; of more, every second or so
CODE = {  # where the page says that each of its parts is computed
    "sizes": where(edit_size), "guidance": where(guided_eps),
    "branches": where(InstructPix2Pix.denoiser), "words": where(Recorder.cross_maps), "attention": where(fused),
    "self": where(Recorder.self_maps), "layer": where(Attention.forward),
}  # fmt: skip


def write_edit_page(recorder, out, text, whole, before, after, settings):
    """Write the page of an edit. whole: the image that was given; before and after: as it was edited."""
    data = common_data(recorder, [after], ["result"], settings)
    data |= {"kind": "edit", "title": text, "size_rule": size_rule(whole.size, before.size)}
    data |= {"pair": [["before", jpeg_url(enlarge(before, 512))], ["after", jpeg_url(enlarge(after, 512))]]}
    every = -(-max(recorder.last.shape[2:]) // LATENTS)
    panels = recorder.panels(to_tensor(after)).items()
    data["panels"] = {name: urls(images[:, :, ::every, ::every], 80) for name, images in panels}
    _, full, image, null, _ = torch.stack(recorder.latents).unbind(1)
    for name, direction in (("to_image", image - null), ("to_text", full - image)):
        data[name] = direction.square().mean(dim=(1, 2, 3)).sqrt().tolist()
    write("explain.html", data, out)


def write_pair_page(recorder, out, captions, images, settings, borrows, code):
    """Write the page of a pair. borrows: for each step whether maps are borrowed; code: the function that does it."""
    data = common_data(recorder, images, ["source", "target"], settings)
    alignment = Alignment.of(recorder.model.tokenizer, *([caption] for caption in captions))
    (source, ours), (target, theirs) = zip(recorder.words, recorder.columns.cpu(), strict=True)
    weights = ours.T @ alignment.mapper[0] * alignment.shared[0] @ theirs  # [source words, target words]
    matches = [[source[i] for i in range(len(source)) if weights[i, j] > 0] for j in range(len(target))]
    data |= {"kind": "pair", "title": " → ".join(captions), "borrows": borrows}
    data |= {"pair": [[s["title"], s["image"]] for s in data["subjects"]]}
    data |= {"matches": list(zip(target, matches, strict=True))[:-2], "code": data["code"] | {"borrow": where(code)}}
    write("explain.html", data, out)


def common_data(recorder, results, titles, settings):
    """What both kinds of page show: the steps, and for each image its guesses, words and maps."""
    subjects = []
    for row, (title, words, result) in enumerate(zip(titles, recorder.words, results, strict=True)):
        maps, scales = packed(torch.stack([step[row, :, : len(words)] for step in recorder.cross]), 2)
        own, own_scales = packed(torch.stack([step[row] for step in recorder.own]), 1)
        guesses = [images[row] for _, images in recorder.guesses]
        size = guesses[0].shape[1:] if guesses else result.size[::-1]
        guesses.append(F.interpolate(to_tensor(result)[None], size, mode="area")[0])
        subjects.append({
            "title": title, "image": jpeg_url(enlarge(result, 512)), "words": words, "maps": maps, "scales": scales,
            "own": own, "own_scales": own_scales, "guesses": urls(guesses, 80),
        })  # fmt: skip
    layers = [layer for layer in recorder.maps if layer.cross]
    return {
        "sigma": recorder.sigmas, "t": recorder.model.schedule.t(recorder.sigmas).tolist(),
        "map_steps": recorder.map_steps, "guess_steps": recorder.guess_steps, "settings": settings,
        "layers": [f"{i}: {layer.place}, {layer.size[0]}x{layer.size[1]}" for i, layer in enumerate(layers, 1)],
        "subjects": subjects, "grid": recorder.grid, "code": CODE | {"steps": where(SAMPLERS[settings["sampler"]])},
    }  # fmt: skip


def urls(images, quality):
    """Images [3, h, w] as URLs that hold them."""
    return [jpeg_url(to_image(image), quality) for image in images]


def packed(maps, dim):
    """(maps as bytes in base64; their largest values along `dim`): value = byte / 255 * largest."""
    largest = maps.amax(dim=[axis for axis in range(maps.dim()) if axis != dim], keepdim=True).clamp(min=1e-8)
    levels = (maps / largest * 255).round().to(torch.uint8).contiguous().numpy()
    return base64.b64encode(levels).decode(), largest.flatten().tolist()


def size_rule(whole, edited):
    """What was done to an image of one size (width, height) to edit it at another: one sentence."""
    scale = max(edited[0] / whole[0], edited[1] / whole[1])
    resized = [round(side * scale) for side in whole]
    cut = [have - kept for have, kept in zip(resized, edited, strict=True)]
    return (
        f"The image of {whole[0]}x{whole[1]} pixels was resized to {resized[0]}x{resized[1]}, and {cut[0]} columns and "
        f"{cut[1]} rows were cropped evenly: {edited[0]}x{edited[1]}, both multiples of 64."
    )
