"""What one and the same weight is called: here, in diffusers' folders, and in original single files.

The rows of these tables are (ours, diffusers or transformers, original), or (ours, theirs) where both others agree;
the levels' numbers are worked out below them, for layers that a network lacks as well. `foreign_names(network)` gives
the whole correspondence for one network.
"""

from typing import NamedTuple

from clip_image import CLIP
from clip_text import CLIPText
from unet import UNet
from vae import VAE

UNET_ENDS = [
    ("time_embed.0", "time_embedding.linear_1", "time_embed.0"),
    ("time_embed.2", "time_embedding.linear_2", "time_embed.2"),
    ("conv_in", "conv_in", "input_blocks.0.0"),
    ("norm_out", "conv_norm_out", "out.0"),
    ("conv_out", "conv_out", "out.2"),
]
RESBLOCK = [
    ("norm1", "norm1", "in_layers.0"),
    ("conv1", "conv1", "in_layers.2"),
    ("time", "time_emb_proj", "emb_layers.1"),
    ("norm2", "norm2", "out_layers.0"),
    ("conv2", "conv2", "out_layers.3"),
    ("skip", "conv_shortcut", "skip_connection"),
]
TRANSFORMER = [
    ("norm", "norm"), ("proj_in", "proj_in"), ("proj_out", "proj_out"),
    ("norm1", "transformer_blocks.0.norm1"),
    ("self_attention.to_q", "transformer_blocks.0.attn1.to_q"),
    ("self_attention.to_k", "transformer_blocks.0.attn1.to_k"),
    ("self_attention.to_v", "transformer_blocks.0.attn1.to_v"),
    ("self_attention.to_out", "transformer_blocks.0.attn1.to_out.0"),
    ("norm2", "transformer_blocks.0.norm2"),
    ("cross_attention.to_q", "transformer_blocks.0.attn2.to_q"),
    ("cross_attention.to_k", "transformer_blocks.0.attn2.to_k"),
    ("cross_attention.to_v", "transformer_blocks.0.attn2.to_v"),
    ("cross_attention.to_out", "transformer_blocks.0.attn2.to_out.0"),
    ("norm3", "transformer_blocks.0.norm3"),
    ("feed_forward.proj_in", "transformer_blocks.0.ff.net.0.proj"),
    ("feed_forward.proj_out", "transformer_blocks.0.ff.net.2"),
]
VAE_HALF = [  # encoder and decoder
    ("conv_in", "conv_in"), ("conv_out", "conv_out"), ("norm_out", "conv_norm_out", "norm_out"),
    ("middle.attention.norm", "mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
    ("middle.attention.to_q", "mid_block.attentions.0.to_q", "mid.attn_1.q"),
    ("middle.attention.to_k", "mid_block.attentions.0.to_k", "mid.attn_1.k"),
    ("middle.attention.to_v", "mid_block.attentions.0.to_v", "mid.attn_1.v"),
    ("middle.attention.to_out", "mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
]
VAE_RESBLOCK = [
    ("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"),
    ("skip", "conv_shortcut", "nin_shortcut"),
]
CLIP_BLOCK = [
    ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp_in", "mlp.fc1"), ("mlp_out", "mlp.fc2"),
    ("to_q", "self_attn.q_proj"), ("to_k", "self_attn.k_proj"), ("to_v", "self_attn.v_proj"),
    ("to_out", "self_attn.out_proj"),
]
CLIP_TEXT = [
    ("token_embedding", "embeddings.token_embedding"),
    ("position_embedding", "embeddings.position_embedding"),
    ("norm_out", "final_layer_norm"),
]
CLIP_IMAGE = [
    ("patch_embedding", "embeddings.patch_embedding"),
    ("class_embedding", "embeddings.class_embedding"),
    ("position_embedding", "embeddings.position_embedding"),
    ("norm_in", "pre_layrnorm"),  # misspelt in every file there is
    ("norm_out", "post_layernorm"),
]
ALIASES = [  # what some files call the same: the VAE's attention, and the text tower's level that comes and goes
    (".mid_block.attentions.0.to_q.", ".mid_block.attentions.0.query."),
    (".mid_block.attentions.0.to_k.", ".mid_block.attentions.0.key."),
    (".mid_block.attentions.0.to_v.", ".mid_block.attentions.0.value."),
    (".mid_block.attentions.0.to_out.0.", ".mid_block.attentions.0.proj_attn."),
    (".mid.attn_1.q.", ".mid.attn_1.to_q."), (".mid.attn_1.k.", ".mid.attn_1.to_k."),
    (".mid.attn_1.v.", ".mid.attn_1.to_v."), (".mid.attn_1.proj_out.", ".mid.attn_1.to_out.0."),
    ("text_model.", ""),
]


class Name(NamedTuple):
    """What one weight is called in the two foreign layouts; "original" without the component's own prefix."""

    diffusers: str
    original: str


def foreign_names(network):
    """{our name: Name} for every weight of a UNet, VAE, CLIPText or CLIP, in the network's own order."""
    rows = {UNet: unet_rows, VAE: vae_rows, CLIPText: text_rows, CLIP: clip_rows}[type(network)](network.config)
    prefixes = {ours: Name(theirs, original) for ours, theirs, original in rows}
    names = {}
    for key in network.state_dict():
        if key in prefixes:  # a bare parameter, not a module's weight or bias
            names[key] = prefixes[key]
        else:
            module, _, leaf = key.rpartition(".")
            names[key] = Name(*(f"{prefix}.{leaf}" for prefix in prefixes[module]))
    return names


def aliases(name):
    """The name, then the other names under which files may hold the same weight."""
    return [name, *(name.replace(now, other) for now, other in ALIASES if now in name)]


def under(ours, theirs, original, rows):
    """Put one prefix a layout before the names of every row; of two names, the second is both other layouts'."""
    return [(ours + row[0], theirs + row[1], original + row[-1]) for row in rows]


def unet_rows(config):
    """The table of a whole UNet. The original numbers its blocks straight through, down- and upsampling included."""
    rows = list(UNET_ENDS)
    for step, blocks, number, levels, resblocks in [
        ("down", "input_blocks", 1, config.levels, config.resblocks),
        ("up", "output_blocks", 0, config.levels[::-1], config.resblocks + 1),
    ]:
        for i, level in enumerate(levels):
            ours, theirs = f"{step}.{i}", f"{step}_blocks.{i}"
            for j in range(resblocks):
                place = f"{blocks}.{number}"
                rows += under(f"{ours}.resblocks.{j}.", f"{theirs}.resnets.{j}.", f"{place}.0.", RESBLOCK)
                if level.attention:
                    rows += under(f"{ours}.transformers.{j}.", f"{theirs}.attentions.{j}.", f"{place}.1.", TRANSFORMER)
                number += 1
            if step == "down":  # a block of its own
                place = f"{blocks}.{number}.0.op"
                number += 1
            else:  # the end of the level's last block
                place = f"{place}.{2 if level.attention else 1}.conv"
            rows.append((f"{ours}.{step}sample", f"{theirs}.{step}samplers.0.conv", place))
    rows += under("middle.resblock1.", "mid_block.resnets.0.", "middle_block.0.", RESBLOCK)
    rows += under("middle.transformer.", "mid_block.attentions.0.", "middle_block.1.", TRANSFORMER)
    return rows + under("middle.resblock2.", "mid_block.resnets.1.", "middle_block.2.", RESBLOCK)


def vae_rows(config):
    """The table of a whole VAE. The original counts the decoder's levels backwards, from the image."""
    deepest = len(config.channels) - 1
    rows = under("", "", "", [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")])
    for half, step, resblocks in [("encoder", "down", config.resblocks), ("decoder", "up", config.resblocks + 1)]:
        rows += under(f"{half}.", f"{half}.", f"{half}.", VAE_HALF)
        for j in (0, 1):
            middle = (f"{half}.middle.resblock{j + 1}.", f"{half}.mid_block.resnets.{j}.", f"{half}.mid.block_{j + 1}.")
            rows += under(*middle, VAE_RESBLOCK)
        for i in range(deepest + 1):
            ours, theirs = f"{half}.{step}.{i}", f"{half}.{step}_blocks.{i}"
            original = f"{half}.{step}.{i if step == 'down' else deepest - i}"
            for j in range(resblocks):
                names = (f"{ours}.resblocks.{j}.", f"{theirs}.resnets.{j}.", f"{original}.block.{j}.")
                rows += under(*names, VAE_RESBLOCK)
            rows.append((f"{ours}.{step}sample", f"{theirs}.{step}samplers.0.conv", f"{original}.{step}sample.conv"))
    return rows


def tower_rows(prefix, table, layers):
    """One of CLIP's towers below transformers' prefix; original Stable Diffusion files carry the same names."""
    rows = under("", prefix, prefix, table)
    for i in range(layers):
        layer = f"{prefix}encoder.layers.{i}."
        rows += under(f"blocks.{i}.", layer, layer, CLIP_BLOCK)
    return rows


def text_rows(config):
    """The table of a text tower."""
    rows = tower_rows("text_model.", CLIP_TEXT, config.layers)
    return [*rows, ("projection", "text_projection", "text_projection")]


def clip_rows(config):
    """The table of both towers. No original layout is known for them; transformers' stands in."""
    text, image = config
    rows = under("text.", "", "", text_rows(text))
    rows += under("image.", "", "", tower_rows("vision_model.", CLIP_IMAGE, image.layers))
    ends = [("image.projection", "visual_projection"), ("logit_scale", "logit_scale")]
    return rows + under("", "", "", ends)
