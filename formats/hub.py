"""Models by hub id, through huggingface_hub: from its cache on this machine if whole there, else downloaded."""

from pathlib import Path

from cli import UserError

# What to fetch of a repository, and what its copy in the cache must hold to be whole (patterns of file names).
MODEL = (
    ["*.json", "*/merges.txt"]
    + [f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")]
    + ["text_encoder/model.safetensors"],
    ["unet/*model.*", "vae/*model.*", "text_encoder/*model.*", "tokenizer/*"],
)
CLIP = (["config.json", "vocab.json", "merges.txt", "model.safetensors"], ["config.json", "merges.txt", "*model.*"])
TOKENIZER = (["vocab.json", "merges.txt", "tokenizer/*"], ["**/merges.txt"])


def find(repository, kind):
    """The local folder of a repository such as "timbrooks/instruct-pix2pix"; kind: MODEL, CLIP or TOKENIZER."""
    return cached(repository, kind) or fetched(repository, kind)


def cached(repository, kind):
    """The folder in this machine's cache, or None if it is not there, or not whole."""
    try:
        folder = snapshot(repository, kind, local_files_only=True)
    except Exception:  # the library has many exceptions for what is not there
        return None
    return folder if is_whole(folder, kind) else None


def fetched(repository, kind):
    """The folder, downloaded into the cache. Raises UserError."""
    try:
        folder = snapshot(repository, kind)
    except Exception as error:  # likewise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{repository} is not in this machine's hub cache and cannot be fetched: {reason}") from error
    if not is_whole(folder, kind):  # the hub cannot be reached, or never had it
        raise UserError(f"{repository} is not whole in this machine's hub cache, and the hub does not give the rest")
    return folder


def snapshot(repository, kind, **options):
    """huggingface_hub's own function, imported only when it is needed, since that takes a second."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, allow_patterns=kind[0], **options))


def is_whole(folder, kind):
    """Does the folder hold all that a model of this kind needs?"""
    return all(any(folder.glob(pattern)) for pattern in kind[1])
