"""Random views of an image: what Text2Live trains its network on, and what CLIP sees in place of one image.

Images are [B, 3, H, W] in [0, 1]; the random numbers are torch's global ones.
"""

import math

import torch
import torch.nn.functional as F

GREY = (0.299, 0.587, 0.114)  # luminance of red, green and blue


def uniform(low, high, *shape):
    """Random numbers, evenly between low and high; one float if no shape is given."""
    values = low + (high - low) * torch.rand(shape)
    return values if shape else values.item()


def training_view(image, mirror=0.5):
    """An image [1, 3, H, W] -> [1, 3, h, w]: scaled by 0.8 to 1.2, 0.85 to 1 of it cut out, perhaps mirrored."""
    if uniform(0, 1) < 0.1:
        image = jitter(image)
    if uniform(0, 1) < mirror:
        image = image.flip(3)
    image = F.interpolate(image, scale_factor=uniform(0.8, 1.2), mode="bicubic", antialias=True).clamp(0, 1)
    return crop(image, uniform(0.85, 1))


def clip_views(image, size, count=16, mirror=0.5):
    """An image [1, 3, H, W] -> [count, 3, size, size]: the whole of it, and crops of 0.6 to 1 of its sides.

    Each is then perhaps mirrored, turned, shifted, seen in perspective (white around it), jittered and made grey.
    """
    crops = [image, *(crop(image, uniform(0.6, 1)) for _ in range(count - 1))]
    views = torch.cat([F.interpolate(one, (size, size), mode="bicubic", antialias=True) for one in crops])
    views = torch.where(chosen(mirror, views), views.flip(3), views)
    views = warp(views, torch.stack([affine() if uniform(0, 1) < 0.8 else torch.eye(3) for _ in views]))
    views = warp(views, torch.stack([perspective() if uniform(0, 1) < 0.5 else torch.eye(3) for _ in views]))
    views = torch.where(chosen(0.7, views), jitter(views), views)
    return torch.where(chosen(0.15, views), luminance(views).expand_as(views), views)


def chosen(probability, views):
    """A random bool for each of the views: [B, 1, 1, 1]."""
    return (torch.rand(len(views), 1, 1, 1) < probability).to(views.device)


def crop(image, fraction):
    """A random part of an image, with this fraction of its sides."""
    height, width = (round(fraction * side) for side in image.shape[2:])
    top, left = (int(uniform(0, have - want + 1)) for have, want in zip(image.shape[2:], (height, width), strict=True))
    return image[:, :, top : top + height, left : left + width]


def luminance(image):
    """[B, 3, H, W] -> [B, 1, H, W]."""
    return torch.einsum("c,bchw->bhw", torch.tensor(GREY, device=image.device), image)[:, None]


def jitter(image, amount=0.1):
    """Change brightness, contrast and saturation of each image a little; hue stays, since captions name colours."""
    brightness, contrast, saturation = uniform(1 - amount, 1 + amount, 3, len(image), 1, 1, 1).to(image.device)
    image = image * brightness
    mean = luminance(image).mean(dim=(2, 3), keepdim=True)
    image = mean + contrast * (image - mean)
    grey = luminance(image)
    return (grey + saturation * (image - grey)).clamp(0, 1)


def affine(degrees=15, shift=0.1):
    """A random turn and shift [3, 3] of points (x, y, 1), where an image is [-1, 1]^2."""
    angle, x, y = math.radians(uniform(-degrees, degrees)), *(2 * uniform(-shift, shift) for _ in range(2))
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin, x], [sin, cos, y], [0, 0, 1]])


def perspective(distortion=0.4):
    """A random perspective [3, 3], as for `affine`: each corner moves inwards by up to this fraction of half a side.

    It maps the moved corners (x, y) to the image's own (u, v): u (g x + h y + 1) = a x + b y + c, and v likewise.
    """
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    rows, values = [], []
    for (x, y), (u, v) in zip((corners * (1 - uniform(0, distortion, 4, 2))).tolist(), corners.tolist(), strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    solution = torch.linalg.solve(torch.tensor(rows), torch.tensor(values))
    return torch.cat([solution, torch.ones(1)]).view(3, 3)


def warp(images, maps):
    """Each image [B, 3, H, W] seen through its map [B, 3, 3] from places in the result; what is outside is white."""
    grid = F.affine_grid(torch.eye(2, 3).repeat(len(images), 1, 1), images.shape, align_corners=False)  # [B, H, W, 2]
    points = F.pad(grid, (0, 1), value=1.0) @ maps[:, None].transpose(2, 3)  # [B, H, W, 3]
    grid = (points[..., :2] / points[..., 2:]).to(images.device)
    return 1 - F.grid_sample(1 - images, grid, align_corners=False)  # it fills with 0
