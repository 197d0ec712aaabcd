"""The `config.json` files of diffusers and transformers, to and from our configuration dataclasses.

A file that asks for something these networks do not do is refused, by name; nothing is silently computed otherwise.
"""

import json

from cli import UserError

from clip_image import CLIPImageConfig
from clip_text import ACTIVATIONS, CLIPTextConfig
from unet import Level, UNetConfig
from vae import VAEConfig

DIFFUSERS_VERSION = "0.30.0"  # of the layout that we write
ATTENTION_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP_BLOCKS = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}

# What diffusers can vary and Stable Diffusion 1.x never does. A file need not name them.
UNET_FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
}
VAE_FIXED = {
    "act_fn": "silu",
    "in_channels": 3,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "out_channels": 3,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
SCHEDULER_FIXED = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


class Config:
    """A JSON object from a file; every reading of it either gives what was asked for or raises a clear UserError."""

    def __init__(self, values, name):
        if not isinstance(values, dict):
            raise UserError(f"{name} is damaged: a JSON object is expected")
        self.values, self.name = values, name

    @classmethod
    def read(cls, path):
        """From a file."""
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")), path)
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error

    def fixed(self, expected):
        """Refuse the file if it asks for anything else."""
        for key, value in expected.items():
            if self.values.get(key, value) != value:
                asked = json.dumps(self.values[key])[:80]
                raise UserError(
                    f"{self.name}: {key} is {asked}; only {json.dumps(value)} is supported, as in Stable Diffusion 1.x"
                )

    def one_of(self, key, choices, default):
        """One of a few words."""
        value = self.values.get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise UserError(f"{self.name}: {key} is {value!r:.80}; supported: {', '.join(choices)}")
        return value

    def integer(self, key, most, default=None):
        """A whole number from 1 to `most`."""
        return self.check(key, self.values.get(key, default), most)

    def integers(self, key, most, length, default=None):
        """A list of `length` such numbers, or one number that stands for them all. length None: any up to 8."""
        value = self.values.get(key, default)
        if not isinstance(value, list):
            value = [value] * (length or 1)
        if not 1 <= len(value) <= 8 or length not in (None, len(value)):
            raise UserError(f"{self.name}: {key} should be a list of {length or '1 to 8'} numbers")
        return tuple(self.check(key, item, most) for item in value)

    def check(self, key, value, most):
        """`value`, if it is a whole number from 1 to `most`."""
        if type(value) is not int or not 1 <= value <= most:
            raise UserError(f"{self.name}: {key} is {value!r:.80}; a whole number from 1 to {most} is needed")
        return value

    def must(self, condition, what):
        """Refuse the file unless `condition`."""
        if not condition:
            raise UserError(f"{self.name}: {what}")


def unet_from(config):
    """diffusers' UNet2DConditionModel configuration (a Config) -> UNetConfig."""
    config.fixed(UNET_FIXED)
    channels = config.integers("block_out_channels", 8192, None)
    count = len(channels)
    types = config.values.get("down_block_types")
    known = isinstance(types, list) and len(types) == count and all(t in ATTENTION_BLOCKS for t in map(str, types))
    config.must(known, f"down_block_types should be {count} of {', '.join(ATTENTION_BLOCKS)}")
    mirrored = [UP_BLOCKS[t] for t in reversed(types)]
    up_types = config.values.get("up_block_types", mirrored)
    config.must(up_types == mirrored, "up_block_types must mirror down_block_types")
    # diffusers' attention_head_dim is, for historical reasons, the NUMBER of heads where num_attention_heads is unset
    key = "num_attention_heads" if config.values.get("num_attention_heads") else "attention_head_dim"
    heads = config.integers(key, 1024, count, default=8)
    groups = config.integer("norm_num_groups", 1024, default=32)
    for width, number in zip(channels, heads, strict=True):
        config.must(width % groups == 0, f"{width} channels cannot be split into {groups} groups")
        config.must(width % number == 0, f"{width} channels cannot be split into {number} heads")
    return UNetConfig(
        levels=tuple(Level(c, ATTENTION_BLOCKS[t], h) for c, t, h in zip(channels, types, heads, strict=True)),
        resblocks=config.integer("layers_per_block", 16, default=2),
        in_channels=config.integer("in_channels", 64, default=4),
        out_channels=config.integer("out_channels", 64, default=4),
        context_width=config.integer("cross_attention_dim", 16384, default=1280),
        groups=groups,
    )


def unet_json(config):
    """UNetConfig -> diffusers' configuration."""
    types = ["CrossAttnDownBlock2D" if level.attention else "DownBlock2D" for level in config.levels]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attention_head_dim": [level.heads for level in config.levels],
        "block_out_channels": [level.channels for level in config.levels],
        "cross_attention_dim": config.context_width,
        "down_block_types": types,
        "in_channels": config.in_channels,
        "layers_per_block": config.resblocks,
        "norm_num_groups": config.groups,
        "out_channels": config.out_channels,
        "up_block_types": [UP_BLOCKS[t] for t in reversed(types)],
    }


def vae_from(config):
    """diffusers' AutoencoderKL configuration (a Config) -> VAEConfig."""
    config.fixed(VAE_FIXED)
    channels = config.integers("block_out_channels", 8192, None)
    groups = config.integer("norm_num_groups", 1024, default=32)
    config.must(all(width % groups == 0 for width in channels), f"channels cannot be split into {groups} groups")
    scaling = config.values.get("scaling_factor", VAEConfig.scaling)
    config.must(type(scaling) in (int, float) and 0 < scaling < 1000, "scaling_factor should be a positive number")
    return VAEConfig(
        channels=channels,
        resblocks=config.integer("layers_per_block", 16, default=1),
        latent_channels=config.integer("latent_channels", 64, default=4),
        groups=groups,
        scaling=float(scaling),
    )


def vae_json(config):
    """VAEConfig -> diffusers' configuration."""
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "block_out_channels": list(config.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.resblocks,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scaling,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_from(config, projected):
    """transformers' CLIPTextConfig (a Config) -> CLIPTextConfig; projected: the tower carries CLIP's projection."""
    width, heads = tower_width(config, 512, 8)
    vocabulary = config.integer("vocab_size", 1_000_000, default=49408)
    end = config.values.get("eos_token_id", 49407)
    end = vocabulary - 1 if end == 2 else end  # 2 stands in many published files by mistake
    config.must(type(end) is int and 0 <= end < vocabulary, "eos_token_id is not in the vocabulary")
    return CLIPTextConfig(
        vocabulary=vocabulary,
        tokens=config.integer("max_position_embeddings", 4096, default=77),
        width=width,
        layers=config.integer("num_hidden_layers", 256, default=12),
        heads=heads,
        activation=config.one_of("hidden_act", tuple(ACTIVATIONS), "quick_gelu"),
        end_token=end,
        projection=config.integer("projection_dim", 16384, default=512) if projected else None,
    )


def text_json(config):
    """CLIPTextConfig -> transformers' configuration."""
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": config.end_token - 1,
        "eos_token_id": config.end_token,
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "max_position_embeddings": config.tokens,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "pad_token_id": config.end_token,
        "projection_dim": config.projection or config.width,
        "torch_dtype": "float32",  # what diffusers' default is for the other networks, too, whatever the files hold
        "vocab_size": config.vocabulary,
    }


def image_from(config):
    """transformers' CLIPVisionConfig (a Config) -> CLIPImageConfig."""
    width, heads = tower_width(config, 768, 12)
    size = config.integer("image_size", 4096, default=224)
    patch = config.integer("patch_size", 4096, default=32)
    config.must(size % patch == 0, f"image_size {size} is no multiple of patch_size {patch}")
    return CLIPImageConfig(
        size=size,
        patch=patch,
        width=width,
        layers=config.integer("num_hidden_layers", 256, default=12),
        heads=heads,
        activation=config.one_of("hidden_act", tuple(ACTIVATIONS), "quick_gelu"),
        projection=config.integer("projection_dim", 16384, default=512),
    )


def image_json(config):
    """CLIPImageConfig -> transformers' configuration."""
    return {
        "hidden_act": config.activation,
        "hidden_size": config.width,
        "image_size": config.size,
        "intermediate_size": 4 * config.width,
        "model_type": "clip_vision_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "patch_size": config.patch,
        "projection_dim": config.projection,
    }


def tower_width(config, width, heads):
    """Width and heads of a CLIP tower, checked; the arguments are transformers' defaults."""
    config.fixed({"layer_norm_eps": 1e-5})
    width = config.integer("hidden_size", 16384, default=width)
    heads = config.integer("num_attention_heads", 1024, default=heads)
    config.must(width % heads == 0, f"hidden_size {width} cannot be split into {heads} heads")
    mlp = config.values.get("intermediate_size", 4 * width)
    config.must(mlp == 4 * width, "intermediate_size must be 4 hidden_size")
    return width, heads


def clip_from(config):
    """transformers' CLIPConfig (a Config) -> (CLIPTextConfig, CLIPImageConfig)."""
    width = config.integer("projection_dim", 16384, default=512)
    towers = []
    for key in ("text_config", "vision_config"):
        values = config.values.get(key)
        config.must(isinstance(values, dict), f"{key} is missing")
        towers.append(Config({**values, "projection_dim": width}, f"{config.name}, {key}"))
    return text_from(towers[0], projected=True), image_from(towers[1])


def clip_json(config):
    """(CLIPTextConfig, CLIPImageConfig) -> transformers' configuration."""
    text, image = config
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": image.projection,
        "text_config": text_json(text),
        "vision_config": image_json(image),
    }


def scheduler_json():
    """The paper's sampler for diffusers."""
    return {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        **SCHEDULER_FIXED,
        "steps_offset": 1,
        "timestep_spacing": "linspace",
    }


def index_json(in_channels):
    """model_index.json: which classes of diffusers and transformers the folders are for."""
    editor = in_channels == 8
    return {
        "_class_name": "StableDiffusionInstructPix2PixPipeline" if editor else "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
