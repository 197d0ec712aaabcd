"""What one and the same weight is called: here, in diffusers' folders, and in original single files.

The rows of these tables are (ours, diffusers or transformers, original), or (ours, theirs) where both others agree. The
sign # stands for the number of a level or block; `original_numbers` says where the original counts in another way.
"""

import re
from collections import namedtuple

# What one weight is called in the two foreign layouts; "original" without the component's own prefix.
Name = namedtuple("Name", ["diffusers", "original"])


def under(ours, theirs, original, rows):
    """The rows with one prefix a layout before their names."""
    return [(ours + row[0], theirs + row[1], original + row[-1]) for row in rows]


RESBLOCK = [
    ("norm1", "norm1", "in_layers.0"), ("conv1", "conv1", "in_layers.2"), ("time", "time_emb_proj", "emb_layers.1"),
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
UNET = [
    ("time_embed.0", "time_embedding.linear_1", "time_embed.0"),
    ("time_embed.2", "time_embedding.linear_2", "time_embed.2"),
    ("scales", "time_embedding.cond_proj", "time_embed.cond_proj"),
    ("conv_in", "conv_in", "input_blocks.0.0"),
    *under("middle.resblock1.", "mid_block.resnets.0.", "middle_block.0.", RESBLOCK),
    *under("middle.transformer.", "mid_block.attentions.0.", "middle_block.1.", TRANSFORMER),
    *under("middle.resblock2.", "mid_block.resnets.1.", "middle_block.2.", RESBLOCK),
    ("norm_out", "conv_norm_out", "out.0"), ("conv_out", "conv_out", "out.2"),
]
for step, blocks, sampling in (("down", "input_blocks", "0.op"), ("up", "output_blocks", "#.conv")):
    UNET += under(f"{step}.#.resblocks.#.", f"{step}_blocks.#.resnets.#.", f"{blocks}.#.0.", RESBLOCK)
    UNET += under(f"{step}.#.transformers.#.", f"{step}_blocks.#.attentions.#.", f"{blocks}.#.1.", TRANSFORMER)
    UNET += [(f"{step}.#.{step}sample", f"{step}_blocks.#.{step}samplers.0.conv", f"{blocks}.#.{sampling}")]

VAE_RESBLOCK = [
    ("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"),
    ("skip", "conv_shortcut", "nin_shortcut"),
]
VAE_ATTENTION = [
    ("norm", "group_norm", "norm"),
    ("to_q", "to_q", "q"), ("to_k", "to_k", "k"), ("to_v", "to_v", "v"), ("to_out", "to_out.0", "proj_out"),
]
VAE_HALF = [  # encoder or decoder
    ("conv_in", "conv_in"),
    *under("middle.resblock1.", "mid_block.resnets.0.", "mid.block_1.", VAE_RESBLOCK),
    *under("middle.attention.", "mid_block.attentions.0.", "mid.attn_1.", VAE_ATTENTION),
    *under("middle.resblock2.", "mid_block.resnets.1.", "mid.block_2.", VAE_RESBLOCK),
    ("norm_out", "conv_norm_out", "norm_out"), ("conv_out", "conv_out"),
]
VAE = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
for half, step in (("encoder", "down"), ("decoder", "up")):
    level, their_level = f"{half}.{step}.#", f"{half}.{step}_blocks.#"
    VAE += under(f"{half}.", f"{half}.", f"{half}.", VAE_HALF)
    VAE += under(f"{level}.resblocks.#.", f"{their_level}.resnets.#.", f"{level}.block.#.", VAE_RESBLOCK)
    VAE += [(f"{level}.{step}sample", f"{their_level}.{step}samplers.0.conv", f"{level}.{step}sample.conv")]

CLIP_BLOCK = [
    ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("mlp_in", "mlp.fc1"), ("mlp_out", "mlp.fc2"),
    ("to_q", "self_attn.q_proj"), ("to_k", "self_attn.k_proj"), ("to_v", "self_attn.v_proj"),
    ("to_out", "self_attn.out_proj"),
]
CLIP_TOWER = [
    ("token_embedding", "embeddings.token_embedding"), ("patch_embedding", "embeddings.patch_embedding"),
    ("class_embedding", "embeddings.class_embedding"), ("position_embedding", "embeddings.position_embedding"),
    *under("blocks.#.", "encoder.layers.#.", "encoder.layers.#.", CLIP_BLOCK),
]
CLIP_TEXT = [
    *under("", "text_model.", "text_model.", [*CLIP_TOWER, ("norm_out", "final_layer_norm")]),
    ("projection", "text_projection"),
]
CLIP_IMAGE = [
    *under("", "vision_model.", "vision_model.", [*CLIP_TOWER, ("norm_out", "post_layernorm")]),
    ("norm_in", "vision_model.pre_layrnorm"),  # misspelt in every file there is
    ("projection", "visual_projection"),
]
# No original layout of both towers is known; transformers' stands in.
CLIP = [*under("text.", "", "", CLIP_TEXT), *under("image.", "", "", CLIP_IMAGE), ("logit_scale", "logit_scale")]
DINO_BLOCK = [
    ("norm1", "layernorm_before"), ("norm2", "layernorm_after"), ("mlp_in", "intermediate.dense"),
    ("mlp_out", "output.dense"), ("to_q", "attention.attention.query"), ("to_k", "attention.attention.key"),
    ("to_v", "attention.attention.value"), ("to_out", "attention.output.dense"),
]
DINO = [
    ("class_embedding", "embeddings.cls_token"), ("position_embedding.weight", "embeddings.position_embeddings"),
    ("patch_embedding", "embeddings.patch_embeddings.projection"), ("norm_out", "layernorm"),
    *under("blocks.#.", "encoder.layer.#.", "encoder.layer.#.", DINO_BLOCK),
]
TABLES = {"UNet": UNET, "VAE": VAE, "CLIPText": CLIP_TEXT, "CLIP": CLIP, "DINO": DINO}  # by class
ALIASES = [("text_model.", "")]  # what some files call the same: the text tower's level, and the VAE's attention
OLDER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # in diffusers
for _, theirs, original in VAE_ATTENTION[1:]:
    ALIASES.append((f".mid_block.attentions.0.{theirs}.", f".mid_block.attentions.0.{OLDER[theirs]}."))
    ALIASES.append((f".mid.attn_1.{original}.", f".mid.attn_1.{theirs}."))


def foreign_names(network):
    """{our name: Name} for every weight of a UNet, VAE, CLIPText, CLIP or DINO, in the network's own order."""
    table = {row[0]: (row[1], row[-1]) for row in TABLES[type(network).__name__]}
    names = {}
    for key in network.state_dict():
        module, dot, leaf = (key, "", "") if key in table else key.rpartition(".")  # some parameters have no module
        numbers = []
        if module not in table:
            numbers = [int(number) for number in re.findall(r"\.(\d+)", module)]
            module = re.sub(r"\.\d+", ".#", module)
        theirs, original = table[module]
        original = insert(original, original_numbers(module, numbers, network.config))
        names[key] = Name(insert(theirs, numbers) + dot + leaf, original + dot + leaf)
    return names


def insert(name, numbers):
    """Put the numbers in the place of the signs #."""
    for number in numbers:
        name = name.replace("#", str(number), 1)
    return name


def aliases(name):
    """The name, then the other names under which files may hold the same weight."""
    return [name, *(name.replace(now, other) for now, other in ALIASES if now in name)]


def original_numbers(module, numbers, config):
    """The numbers in an original name, from ours: of the level and, but for its down- or upsampling, of the block."""
    if module.startswith(("down.", "up.")):  # the UNet's blocks are numbered straight through, downsampling included
        level, block = (*numbers, config.resblocks)[:2]
        place = 2 if config.levels[-1 - level].attention else 1  # of the upsampling in the level's last block
        return [(config.resblocks + 1) * level + block + module.startswith("down."), place]
    if module.startswith("decoder.up."):  # the VAE's decoder counts from the image
        return [len(config.channels) - 1 - numbers[0], *numbers[1:]]
    return numbers
