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

# Our field: (its key in a config.json, the value that diffusers or transformers take where the key is missing).
UNET = {
    "resblocks": ("layers_per_block", 2), "in_channels": ("in_channels", 4), "out_channels": ("out_channels", 4),
    "context_width": ("cross_attention_dim", 1280), "groups": ("norm_num_groups", 32),
}
VAE = {
    "channels": ("block_out_channels", [64]), "resblocks": ("layers_per_block", 1), "groups": ("norm_num_groups", 32),
    "latent_channels": ("latent_channels", 4), "scaling": ("scaling_factor", 0.18215),
}
TEXT = {
    "vocabulary": ("vocab_size", 49408), "tokens": ("max_position_embeddings", 77), "width": ("hidden_size", 512),
    "layers": ("num_hidden_layers", 12), "heads": ("num_attention_heads", 8),
}
IMAGE = {
    "size": ("image_size", 224), "patch": ("patch_size", 32), "width": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12), "heads": ("num_attention_heads", 12),
}

# What diffusers can vary and Stable Diffusion 1.x never does. Any other key has to be None, False or 0, or else to be
# in the list of those that change nothing here.
UNET_FIXED = {
    "act_fn": "silu", "attention_type": "default", "conv_in_kernel": 3, "conv_out_kernel": 3, "downsample_padding": 1,
    "flip_sin_to_cos": True, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5, "resnet_out_scale_factor": 1, "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional", "transformer_layers_per_block": 1,
}
UNET_HARMLESS = (
    *("block_out_channels", "attention_head_dim", "num_attention_heads"),  # `unet_from` reads them
    *("sample_size", "upcast_attention", "addition_embed_type_num_heads", "time_cond_proj_dim"),
)
VAE_FIXED = {
    "act_fn": "silu", "in_channels": 3, "out_channels": 3, "mid_block_add_attention": True, "use_quant_conv": True,
    "use_post_quant_conv": True,
}
VAE_HARMLESS = ("sample_size", "force_upcast")
SCHEDULER_FIXED = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
SCHEDULER_HARMLESS = (  # how diffusers samples; what a network was trained with stands above
    *("algorithm_type", "clip_sample", "clip_sample_range", "disable_corrector", "dynamic_thresholding_ratio"),
    *("euler_at_final", "final_sigmas_type", "flow_shift", "interpolation_type", "lambda_min_clipped"),
    *("lower_order_final", "original_inference_steps", "predict_x0", "sample_max_value", "set_alpha_to_one"),
    *("sigma_max", "sigma_min", "skip_prk_steps", "solver_order", "solver_type", "steps_offset", "thresholding"),
    *("time_shift_type", "timestep_scaling", "timestep_spacing", "timestep_type", "use_beta_sigmas"),
    *("use_exponential_sigmas", "use_karras_sigmas", "use_lu_lambdas", "variance_type"),
)


class Config:
    """A JSON object from a file, which is `name` in errors."""

    def __init__(self, values, name):
        if not isinstance(values, dict):
            raise UserError(f"{name} is damaged: a JSON object is expected")
        self.values, self.name = values, name

    @classmethod
    def read(cls, path):
        """From a file."""
        with reported_as(f"{path} cannot be read"):
            return cls(json.loads(path.read_text(encoding="utf-8-sig")), path)

    def must(self, condition, what):
        """Refuse the file unless `condition`."""
        if not condition:
            raise UserError(f"{self.name}: {what}")

    def fixed(self, expected):
        """Refuse the file if it asks for anything else."""
        for key, value in expected.items():
            asked = self.values.get(key, value)
            self.must(asked == value, f"{key} is {asked!r:.80}; only {value!r}, Stable Diffusion 1.x's, is supported")

    def known(self, *keys):
        """Refuse the file if it sets, neither to None, False nor 0, any key that is not among these."""
        for key, asked in self.values.items():
            good = key in keys or key.startswith("_") or asked in (None, False)
            self.must(good, f"{key} is {asked!r:.80}; only Stable Diffusion 1.x is supported, which does not set it")

    def sizes(self, table):
        """{our field: number or tuple of numbers} for one of the tables above."""
        sizes = {}
        for field, (key, default) in table.items():
            value = self.values.get(key, default)
            value = tuple(value) if isinstance(value, list) else value
            numbers = value if isinstance(value, tuple) else (value,)
            most = 256 if "layers" in key else 1_000_000  # a damaged file should not ask for endless layers
            good = all(type(number) in (int, type(default)) and 0 < number <= most for number in numbers)
            self.must(good, f"{key} is {value!r:.80}; numbers up to {most} are needed")
            sizes[field] = value
        return sizes


def written(config, table):
    """The opposite of `Config.sizes`: {key of config.json: value}."""
    return {key: getattr(config, field) for field, (key, _) in table.items()}


def block_types(attention):
    """diffusers' names for a UNet's levels, from which of them have transformers."""
    down = ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attention]
    return {"down_block_types": down, "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)]}


def unet_from(config):
    """diffusers' UNet2DConditionModel configuration (a Config) -> UNetConfig."""
    attention = [kind == "CrossAttnDownBlock2D" for kind in config.values["down_block_types"]]
    fixed = {**UNET_FIXED, **block_types(attention)}
    config.fixed(fixed)
    config.known(*fixed, *UNET_HARMLESS, *(key for key, _ in UNET.values()))
    # diffusers' attention_head_dim is, for historical reasons, the NUMBER of heads where num_attention_heads is unset
    key = "num_attention_heads" if config.values.get("num_attention_heads") else "attention_head_dim"
    channels, heads = config.sizes({"channels": ("block_out_channels", []), "heads": (key, 8)}).values()
    heads = heads if isinstance(heads, tuple) else [heads] * len(channels)
    levels = tuple(Level(*level) for level in zip(channels, attention, heads, strict=True))
    config.must(all(level.channels % level.heads == 0 for level in levels), "channels cannot be split into the heads")
    sizes = config.sizes(UNET)
    if width := config.values.get("time_cond_proj_dim"):
        editor = sizes["in_channels"] == 2 * sizes["out_channels"]
        config.must(editor, f"time_cond_proj_dim is {width!r:.80}; it is supported for distilled editors alone")
        sizes |= config.sizes({"scales_width": ("time_cond_proj_dim", 0)})
    return UNetConfig(levels=levels, **sizes)


def unet_json(config):
    """UNetConfig -> diffusers' configuration."""
    return {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": DIFFUSERS_VERSION,
        "attention_head_dim": [level.heads for level in config.levels],
        "block_out_channels": [level.channels for level in config.levels],
        **block_types(level.attention for level in config.levels), **written(config, UNET),
        **({"time_cond_proj_dim": config.scales_width} if config.scales_width else {}),
    }


def vae_from(config):
    """diffusers' AutoencoderKL configuration (a Config) -> VAEConfig."""
    sizes = config.sizes(VAE)
    fixed = {**VAE_FIXED, **vae_block_types(sizes["channels"])}
    config.fixed(fixed)
    config.known(*fixed, *VAE_HARMLESS, *(key for key, _ in VAE.values()))
    return VAEConfig(**sizes)


def vae_block_types(channels):
    """diffusers' names for a VAE's levels."""
    down = ["DownEncoderBlock2D"] * len(channels)
    return {"down_block_types": down, "up_block_types": ["UpDecoderBlock2D"] * len(channels)}


def vae_json(config):
    """VAEConfig -> diffusers' configuration."""
    return {
        "_class_name": "AutoencoderKL", "_diffusers_version": DIFFUSERS_VERSION,
        **vae_block_types(config.channels), **written(config, VAE),
    }


def tower_from(config, table):
    """The sizes and the activation of a CLIP tower."""
    config.fixed({"layer_norm_eps": 1e-5})
    sizes = config.sizes(table)
    config.must(sizes["width"] % sizes["heads"] == 0, "hidden_size cannot be split into the heads")
    activation = config.values.get("hidden_act", "quick_gelu")
    config.must(activation in ACTIVATIONS, f"hidden_act is {activation!r:.80}, not one of {', '.join(ACTIVATIONS)}")
    return {**sizes, "activation": activation}


def tower_json(config, table, model_type):
    """A CLIP tower's configuration -> transformers' configuration."""
    fixed = {"hidden_act": config.activation, "intermediate_size": 4 * config.width, "model_type": model_type}
    return {**fixed, **written(config, table)}


def text_from(config):
    """transformers' CLIPTextConfig (a Config) -> CLIPTextConfig, without CLIP's projection."""
    sizes, end = tower_from(config, TEXT), config.values.get("eos_token_id", 49407)
    last = sizes["vocabulary"] - 1
    return CLIPTextConfig(**sizes, end_token=last if end == 2 else end)  # 2 stands in many published files by mistake


def text_json(config):
    """CLIPTextConfig -> transformers' configuration."""
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": config.end_token - 1, "eos_token_id": config.end_token, "pad_token_id": config.end_token,
        "projection_dim": config.projection or config.width,
        "torch_dtype": "float32",  # what diffusers' default is for the other networks, too, whatever the files hold
        **tower_json(config, TEXT, "clip_text_model"),
    }


def clip_from(config):
    """transformers' CLIPConfig (a Config) -> (CLIPTextConfig, CLIPImageConfig)."""
    text, image = (Config(config.values.get(key), f"{config.name}, {key}") for key in ("text_config", "vision_config"))
    shared = config.sizes({"projection": ("projection_dim", 512)})
    return replace(text_from(text), **shared), CLIPImageConfig(**tower_from(image, IMAGE), **shared)


def dino_from(config):
    """transformers' ViTConfig (a Config) -> CLIPImageConfig."""
    config.fixed({"hidden_act": "gelu", "qkv_bias": True})
    sizes = config.sizes(IMAGE | {"patch": ("patch_size", 16)})
    return CLIPImageConfig(**sizes, activation="gelu", projection=sizes["width"])


def clip_json(config):
    """(CLIPTextConfig, CLIPImageConfig) -> transformers' configuration."""
    text, image = config
    shared = {"projection_dim": image.projection}
    return {
        "architectures": ["CLIPModel"], "model_type": "clip", "text_config": text_json(text),
        "vision_config": {**tower_json(image, IMAGE, "clip_vision_model"), **shared},
        **shared,
    }


SCHEDULER = {  # the paper's sampler for diffusers
    "_class_name": "EulerAncestralDiscreteScheduler", "_diffusers_version": DIFFUSERS_VERSION,
    **SCHEDULER_FIXED, "steps_offset": 1, "timestep_spacing": "linspace",
}
EDITOR = {  # model_index.json: which classes of diffusers and transformers the folders are for
    "_class_name": "StableDiffusionInstructPix2PixPipeline", "_diffusers_version": DIFFUSERS_VERSION,
    "feature_extractor": [None, None], "image_encoder": [None, None], "safety_checker": [None, None],
    "requires_safety_checker": False, "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
}
TEXT_TO_IMAGE = {**EDITOR, "_class_name": "StableDiffusionPipeline"}
