"""What one and the same weight is called: here, in diffusers' folders, and in original single files.

The rows of these tables are (ours, diffusers or transformers, original), or (ours, theirs) where both others agree.
The numbers of levels and blocks are worked out below, for layers that a network lacks as well.
"""

from typing import NamedTuple

from clip_image import CLIP
from clip_text import CLIPText
from unet import UNet
from vae import VAE


def under(ours, theirs, original, rows):
    """The rows with one prefix a layout before their names."""
    return [(ours + row[0], theirs + row[1], original + row[-1]) for row in rows]


RESBLOCK = [
    ("norm1", "norm1", "in_layers.0"), ("conv1", "conv1", "in_layers.2"),
    ("time", "time_emb_proj", "emb_layers.1"),
    ("norm2", "norm2", "out_layers.0"), ("conv2", "conv2", "out_layers.3"),
    ("skip", "conv_shortcut", "skip_connection"),
]
ATTENTION = [("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0")]
LAYERS = [
    ("norm1", "norm1"), *under("self_attention.", "attn1.", "attn1.", ATTENTION),
    ("norm2", "norm2"), *under("cross_attention.", "attn2.", "attn2.", ATTENTION),
    ("norm3", "norm3"), ("feed_forward.proj_in", "ff.net.0.proj"), ("feed_forward.proj_out", "ff.net.2"),
]
TRANSFORMER = [
    ("norm", "norm"), ("proj_in", "proj_in"), ("proj_out", "proj_out"),
    *under("", "transformer_blocks.0.", "transformer_blocks.0.", LAYERS),
]
UNET = [  # all but the levels
    ("time_embed.0", "time_embedding.linear_1", "time_embed.0"),
    ("time_embed.2", "time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "conv_in", "input_blocks.0.0"),
    *under("middle.resblock1.", "mid_block.resnets.0.", "middle_block.0.", RESBLOCK),
    *under("middle.transformer.", "mid_block.attentions.0.", "middle_block.1.", TRANSFORMER),
    *under("middle.resblock2.", "mid_block.resnets.1.", "middle_block.2.", RESBLOCK),
    ("norm_out", "conv_norm_out", "out.0"), ("conv_out", "conv_out", "out.2"),
]
VAE_RESBLOCK = [
    ("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"),
    ("skip", "conv_shortcut", "nin_shortcut"),
]
VAE_ATTENTION = [
    ("norm", "group_norm", "norm"),
    ("to_q", "to_q", "q"), ("to_k", "to_k", "k"), ("to_v", "to_v", "v"), ("to_out", "to_out.0", "proj_out"),
]
VAE_HALF = [  # all of an encoder or decoder but the levels
    ("conv_in", "conv_in"),
    *under("middle.resblock1.", "mid_block.resnets.0.", "mid.block_1.", VAE_RESBLOCK),
    *under("middle.attention.", "mid_block.attentions.0.", "mid.attn_1.", VAE_ATTENTION),
    *under("middle.resblock2.", "mid_block.resnets.1.", "mid.block_2.", VAE_RESBLOCK),
    ("norm_out", "conv_norm_out", "norm_out"), ("conv_out", "conv_out"),
]
CLIP_BLOCK = [
    ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp_in", "mlp.fc1"), ("mlp_out", "mlp.fc2"),
    ("to_q", "self_attn.q_proj"), ("to_k", "self_attn.k_proj"), ("to_v", "self_attn.v_proj"),
    ("to_out", "self_attn.out_proj"),
]
CLIP_TEXT = [
    ("token_embedding", "text_model.embeddings.token_embedding"),
    ("position_embedding", "text_model.embeddings.position_embedding"),
    ("norm_out", "text_model.final_layer_norm"), ("projection", "text_projection"),
]
CLIP_IMAGE = [
    ("patch_embedding", "vision_model.embeddings.patch_embedding"),
    ("class_embedding", "vision_model.embeddings.class_embedding"),
    ("position_embedding", "vision_model.embeddings.position_embedding"),
    ("norm_in", "vision_model.pre_layrnorm"),  # misspelt in every file there is
    ("norm_out", "vision_model.post_layernorm"), ("projection", "visual_projection"),
]
ALIASES = [("text_model.", "")]  # what some files call the same: the text tower's level, and the VAE's attention
OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # in diffusers
for _, theirs, original in VAE_ATTENTION[1:]:
    ALIASES.append((f".mid_block.attentions.0.{theirs}.", f".mid_block.attentions.0.{OLDER[theirs]}."))
    ALIASES.append((f".mid.attn_1.{original}.", f".mid.attn_1.{theirs}."))


class Name(NamedTuple):
    """What one weight is called in the two foreign layouts; "original" without the component's own prefix."""

    diffusers: str
    original: str


def foreign_names(network):
    """{our name: Name} for every weight of a UNet, VAE, CLIPText or CLIP, in the network's own order."""
    rows = {UNet: unet_rows, VAE: vae_rows, CLIPText: text_rows, CLIP: clip_rows}[type(network)](network.config)
    foreign = {ours: Name(theirs, original) for ours, theirs, original in rows}
    names = {}
    for key in network.state_dict():
        module, _, leaf = key.rpartition(".")
        bare = foreign.get(key)  # a parameter by itself, not a module's weight or bias
        names[key] = bare or Name(*(f"{name}.{leaf}" for name in foreign[module]))
    return names


def aliases(name):
    """The name, then the other names under which files may hold the same weight."""
    return [name, *(name.replace(now, other) for now, other in ALIASES if now in name)]


def unet_rows(config):
    """The original numbers its blocks straight through; a level's last one on the way down is its downsampling."""
    rows, blocks = list(UNET), config.resblocks + 1
    for step, place, levels in [("down", "input_blocks", config.levels), ("up", "output_blocks", config.levels[::-1])]:
        for i, level in enumerate(levels):
            ours, theirs, first = f"{step}.{i}", f"{step}_blocks.{i}", blocks * i + (step == "down")
            for j in range(blocks):
                original = f"{place}.{first + j}"
                rows += under(f"{ours}.resblocks.{j}.", f"{theirs}.resnets.{j}.", f"{original}.0.", RESBLOCK)
                rows += under(f"{ours}.transformers.{j}.", f"{theirs}.attentions.{j}.", f"{original}.1.", TRANSFORMER)
            sampling = "0.op" if step == "down" else "2.conv" if level.attention else "1.conv"
            rows.append((f"{ours}.{step}sample", f"{theirs}.{step}samplers.0.conv", f"{original}.{sampling}"))
    return rows


def vae_rows(config):
    """The original counts the decoder's levels backwards, from the image."""
    rows, deepest = [("quant_conv",) * 3, ("post_quant_conv",) * 3], len(config.channels) - 1
    for half, step in (("encoder", "down"), ("decoder", "up")):
        rows += under(f"{half}.", f"{half}.", f"{half}.", VAE_HALF)
        for i in range(deepest + 1):
            ours, theirs = f"{half}.{step}.{i}", f"{half}.{step}_blocks.{i}"
            original = f"{half}.{step}.{i if step == 'down' else deepest - i}"
            for j in range(config.resblocks + 1):
                place = f"{original}.block.{j}."
                rows += under(f"{ours}.resblocks.{j}.", f"{theirs}.resnets.{j}.", place, VAE_RESBLOCK)
            rows.append((f"{ours}.{step}sample", f"{theirs}.{step}samplers.0.conv", f"{original}.{step}sample.conv"))
    return rows


def tower_rows(ours, theirs, table, layers):
    """One of CLIP's towers; original Stable Diffusion files carry transformers' names."""
    rows = under(ours, "", "", table)
    for i in range(layers):
        layer = f"{theirs}.encoder.layers.{i}."
        rows += under(f"{ours}blocks.{i}.", layer, layer, CLIP_BLOCK)
    return rows


def text_rows(config):
    """The text tower alone."""
    return tower_rows("", "text_model", CLIP_TEXT, config.layers)


def clip_rows(config):
    """Both towers. No original layout is known for them; transformers' stands in."""
    text, image = config
    rows = tower_rows("text.", "text_model", CLIP_TEXT, text.layers)
    rows += tower_rows("image.", "vision_model", CLIP_IMAGE, image.layers)
    return [*rows, ("logit_scale", "logit_scale", "logit_scale")]
