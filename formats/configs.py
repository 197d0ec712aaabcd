"""The `config.json` files of diffusers and transformers, to and from our configuration dataclasses.

A file that asks for something these networks do not do is refused, by name; nothing is silently computed otherwise.
"""

import json
from dataclasses import replace

from cli import UserError, reported_as

from clip_image import CLIPImageConfig
from clip_text import ACTIVATIONS, CLIPTextConfig
from unet import Level, UNetConfig
from vae import VAEConfig

DIFFUSERS_VERSION = "0.30.0"  # of the layout that we write
UP_BLOCKS = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}

# Our field: (its key in a config.json, the value that diffusers or transformers take where the key is missing).
UNET = {
    "resblocks": ("layers_per_block", 2), "in_channels": ("in_channels", 4), "out_channels": ("out_channels", 4),
    "context_width": ("cross_attention_dim", 1280), "groups": ("norm_num_groups", 32),
}
VAE = {
    "resblocks": ("layers_per_block", 1), "latent_channels": ("latent_channels", 4), "groups": ("norm_num_groups", 32),
}
TEXT = {
    "vocabulary": ("vocab_size", 49408), "tokens": ("max_position_embeddings", 77), "width": ("hidden_size", 512),
    "layers": ("num_hidden_layers", 12), "heads": ("num_attention_heads", 8),
}
IMAGE = {
    "size": ("image_size", 224), "patch": ("patch_size", 32), "width": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12), "heads": ("num_attention_heads", 12), "projection": ("projection_dim", 512),
}
CLIP = {"projection": ("projection_dim", 512)}  # beside the configurations of the two towers

# What diffusers can vary and Stable Diffusion 1.x never does. A file need not name them.
UNET_FIXED = {
    "act_fn": "silu", "addition_embed_type": None, "center_input_sample": False, "class_embed_type": None,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "downsample_padding": 1, "dual_cross_attention": False,
    "encoder_hid_dim": None, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-5, "only_cross_attention": False,
    "resnet_time_scale_shift": "default", "time_embedding_dim": None, "time_embedding_type": "positional",
    "transformer_layers_per_block": 1, "use_linear_projection": False,
}
VAE_FIXED = {
    "act_fn": "silu", "in_channels": 3, "latents_mean": None, "latents_std": None, "mid_block_add_attention": True,
    "out_channels": 3, "shift_factor": None, "use_post_quant_conv": True, "use_quant_conv": True,
}
SCHEDULER_FIXED = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
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
        with reported_as(f"{path} cannot be read"):
            return cls(json.loads(path.read_text(encoding="utf-8")), path)

    def must(self, condition, what):
        """Refuse the file unless `condition`."""
        if not condition:
            raise UserError(f"{self.name}: {what}")

    def fixed(self, expected):
        """Refuse the file if it asks for anything else."""
        for key, value in expected.items():
            asked = self.values.get(key, value)
            only = f"only {json.dumps(value)} is supported, as in Stable Diffusion 1.x"
            self.must(asked == value, f"{key} is {json.dumps(asked)[:80]}; {only}")

    def numbers(self, key, count=None, default=None):
        """`count` whole numbers, or one that stands for them all. count None: any up to 8."""
        value = self.values.get(key, default)
        value = value if isinstance(value, list) else [value] * (count or 1)
        self.must(1 <= len(value) <= 8 and count in (None, len(value)), f"{key} should be {count or '1 to 8'} numbers")
        most = 256 if "layers" in key else 1_000_000  # a damaged file should not ask for endless layers
        for number in value:
            good = type(number) is int and 1 <= number <= most
            self.must(good, f"{key} is {number!r:.80}; a whole number from 1 to {most} is needed")
        return tuple(value)

    def sizes(self, table):
        """{our field: number} for one of the tables above."""
        return {field: self.numbers(key, 1, default)[0] for field, (key, default) in table.items()}


def written(config, table):
    """The opposite of `Config.sizes`: {key of config.json: number}."""
    return {key: getattr(config, field) for field, (key, _) in table.items()}


def unet_from(config):
    """diffusers' UNet2DConditionModel configuration (a Config) -> UNetConfig."""
    config.fixed(UNET_FIXED)
    channels, sizes = config.numbers("block_out_channels"), config.sizes(UNET)
    types = config.values.get("down_block_types")
    known = isinstance(types, list) and len(types) == len(channels) and all(t in UP_BLOCKS for t in map(str, types))
    config.must(known, f"down_block_types should be {len(channels)} of {', '.join(UP_BLOCKS)}")
    config.fixed({"up_block_types": [UP_BLOCKS[t] for t in reversed(types)]})
    # diffusers' attention_head_dim is, for historical reasons, the NUMBER of heads where num_attention_heads is unset
    key = "num_attention_heads" if config.values.get("num_attention_heads") else "attention_head_dim"
    heads = config.numbers(key, len(channels), default=8)
    for width, number in zip(channels, heads, strict=True):
        good = width % sizes["groups"] == 0 and width % number == 0
        config.must(good, f"{width} channels cannot be split into {sizes['groups']} groups and {number} heads")
    levels = zip(channels, (t == "CrossAttnDownBlock2D" for t in types), heads, strict=True)
    return UNetConfig(levels=tuple(Level(*level) for level in levels), **sizes)


def unet_json(config):
    """UNetConfig -> diffusers' configuration."""
    types = ["CrossAttnDownBlock2D" if level.attention else "DownBlock2D" for level in config.levels]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attention_head_dim": [level.heads for level in config.levels],
        "block_out_channels": [level.channels for level in config.levels],
        "down_block_types": types,
        "up_block_types": [UP_BLOCKS[t] for t in reversed(types)],
        **written(config, UNET),
    }


def vae_from(config):
    """diffusers' AutoencoderKL configuration (a Config) -> VAEConfig."""
    config.fixed(VAE_FIXED)
    channels, sizes = config.numbers("block_out_channels"), config.sizes(VAE)
    good = all(width % sizes["groups"] == 0 for width in channels)
    config.must(good, f"channels cannot be split into {sizes['groups']} groups")
    scaling = config.values.get("scaling_factor", VAEConfig.scaling)
    config.must(type(scaling) in (int, float) and 0 < scaling < 1000, "scaling_factor should be a positive number")
    return VAEConfig(channels=channels, scaling=float(scaling), **sizes)


def vae_json(config):
    """VAEConfig -> diffusers' configuration."""
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "block_out_channels": list(config.channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(config.channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(config.channels),
        "scaling_factor": config.scaling,
        **written(config, VAE),
    }


def tower_from(config, table):
    """The sizes and the activation of a CLIP tower."""
    config.fixed({"layer_norm_eps": 1e-5})
    sizes, activation = config.sizes(table), config.values.get("hidden_act", "quick_gelu")
    config.must(sizes["width"] % sizes["heads"] == 0, f"hidden_size cannot be split into {sizes['heads']} heads")
    config.fixed({"intermediate_size": 4 * sizes["width"]})
    known = str(activation) in ACTIVATIONS
    config.must(known, f"hidden_act is {activation!r:.80}; supported: {', '.join(ACTIVATIONS)}")
    return {**sizes, "activation": activation}


def text_from(config):
    """transformers' CLIPTextConfig (a Config) -> CLIPTextConfig, without CLIP's projection."""
    sizes = tower_from(config, TEXT)
    end = config.values.get("eos_token_id", 49407)
    end = sizes["vocabulary"] - 1 if end == 2 else end  # 2 stands in many published files by mistake
    config.must(type(end) is int and 0 <= end < sizes["vocabulary"], "eos_token_id is not in the vocabulary")
    return CLIPTextConfig(**sizes, end_token=end)


def text_json(config):
    """CLIPTextConfig -> transformers' configuration."""
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": config.end_token - 1,
        "eos_token_id": config.end_token,
        "hidden_act": config.activation,
        "intermediate_size": 4 * config.width,
        "model_type": "clip_text_model",
        "pad_token_id": config.end_token,
        "projection_dim": config.projection or config.width,
        "torch_dtype": "float32",  # what diffusers' default is for the other networks, too, whatever the files hold
        **written(config, TEXT),
    }


def clip_from(config):
    """transformers' CLIPConfig (a Config) -> (CLIPTextConfig, CLIPImageConfig)."""
    text, image = (Config(config.values.get(key), f"{config.name}, {key}") for key in ("text_config", "vision_config"))
    sizes, shared = tower_from(image, IMAGE), config.sizes(CLIP)
    image.must(sizes["size"] % sizes["patch"] == 0, "image_size should be a multiple of patch_size")
    return replace(text_from(text), **shared), CLIPImageConfig(**{**sizes, **shared})


def clip_json(config):
    """(CLIPTextConfig, CLIPImageConfig) -> transformers' configuration."""
    text, image = config
    vision = {"hidden_act": image.activation, "intermediate_size": 4 * image.width, "model_type": "clip_vision_model"}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": image.projection,
        "text_config": text_json(text),
        "vision_config": {**vision, **written(image, IMAGE)},
    }


SCHEDULER = {  # the paper's sampler for diffusers
    "_class_name": "EulerAncestralDiscreteScheduler", "_diffusers_version": DIFFUSERS_VERSION,
    **SCHEDULER_FIXED, "steps_offset": 1, "timestep_spacing": "linspace",
}


def index_json(in_channels):
    """model_index.json: which classes of diffusers and transformers the folders are for."""
    return {
        "_class_name": "StableDiffusionInstructPix2PixPipeline" if in_channels == 8 else "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None], "image_encoder": [None, None],
        "requires_safety_checker": False, "safety_checker": [None, None],
        "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
