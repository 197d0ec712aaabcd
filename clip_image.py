"""CLIP's image tower, a vision transformer, and the two towers together.

InstructPix2Pix uses CLIP twice: its text tower conditions the UNet, and both towers measure whether a generated pair
of images is a good edit (Sec. 3.1.2: image-image, image-caption and directional similarity).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from clip_text import Block, CLIPText

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class CLIPImageConfig:
    """Everything that may differ between two image towers."""

    size: int = 224  # pixels a side
    patch: int = 14  # pixels a side of what becomes one token
    width: int = 1024
    layers: int = 24
    heads: int = 16
    activation: str = "quick_gelu"
    projection: int = 768  # width of the space shared with the texts


CLIP_L_IMAGE = CLIPImageConfig()


class CLIPImage(nn.Module):
    """Images to CLIP's image feature."""

    mean, std = MEAN, STD  # of the images that it was trained on

    def __init__(self, config):
        super().__init__()
        self.config = config
        tokens = 1 + (config.size // config.patch) ** 2
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, stride=config.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.position_embedding = nn.Embedding(tokens, config.width)
        self.norm_in = nn.LayerNorm(config.width, eps=1e-5)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.activation) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(config.width, eps=1e-5)
        self.projection = nn.Linear(config.width, config.projection, bias=False)

    def forward(self, x):
        """Normalised images x [B, 3, size, size] (see `preprocess`) -> projected class token [B, projection]."""
        return self.projection(self.norm_out(self.tokens(x, len(self.blocks))[:, 0]))

    def tokens(self, x, count):
        """x as for `forward` -> what its tokens are after `count` blocks, the class token first: [B, N, width]."""
        patches = self.patch_embedding(x).flatten(2).transpose(1, 2)  # [B, N, C]
        first = self.class_embedding.expand(len(x), 1, -1)
        h = self.norm_in(torch.cat([first, patches], dim=1) + self.position_embedding.weight)
        for block in self.blocks[:count]:
            h = block(h)
        return h

    def preprocess(self, images):
        """Images [B, 3, H, W] in [0, 1] of any size -> what `forward` takes: squeezed to a square, not cropped."""
        size = (self.config.size, self.config.size)
        x = F.interpolate(images, size=size, mode="bicubic", align_corners=False)
        return self.normalise(x)

    def normalise(self, x):
        """Images [B, 3, H, W] in [0, 1] -> with the mean and the deviation of the training images taken out."""
        mean, std = torch.tensor([self.mean, self.std], device=x.device, dtype=x.dtype)[:, :, None, None]
        return (x - mean) / std

    def features(self, images):
        """Images [B, 3, H, W] in [0, 1] -> unit vectors [B, projection]."""
        return F.normalize(self(self.preprocess(images)), dim=-1)


class DINO(CLIPImage):
    """DINO's vision transformer (Caron et al. 2021): images to its class token, trained without any texts.

    It is CLIP's tower without the first norm and the projection, with other constants.
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet

    def __init__(self, config):
        super().__init__(config)
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.norm_in = self.projection = nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6


class CLIP(nn.Module):
    """Both towers, and the learned temperature of their contrastive loss."""

    def __init__(self, text_config, image_config):
        super().__init__()
        self.config = (text_config, image_config)
        self.text = CLIPText(text_config)
        self.image = CLIPImage(image_config)
        self.logit_scale = nn.Parameter(torch.tensor(0.07).reciprocal().log())

    def forward(self, ids, images):
        """ids [B, L], images [B, 3, H, W] in [0, 1] -> logits [B images, B texts] (Radford et al. 2021, Fig. 3)."""
        return self.logit_scale.exp() * self.image.features(images) @ self.text.features(ids).T

    @torch.no_grad()
    def edit_similarities(self, before, after, ids_before, ids_after):
        """How good an edit is (Sec. 3.1.2): cosines by the names of the authors' metadata, each [B].

        before and after: images [B, 3, H, W] in [0, 1]; ids_before and ids_after: their captions [B, L]. clip_sim_0
        and clip_sim_1: image and caption, clip_sim_dir: the change of the image and the change of the caption (Gal
        et al. 2022), clip_sim_image: both images.
        """
        image0, image1 = self.image.features(before), self.image.features(after)
        text0, text1 = self.text.features(ids_before), self.text.features(ids_after)
        return {
            "clip_sim_0": F.cosine_similarity(image0, text0),
            "clip_sim_1": F.cosine_similarity(image1, text1),
            "clip_sim_dir": F.cosine_similarity(image1 - image0, text1 - text0),
            "clip_sim_image": F.cosine_similarity(image0, image1),
        }
