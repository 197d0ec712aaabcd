"""Where weights come from: a path, a bundled model, or a repository of the Hugging Face hub; some have short names."""

import re
import sys
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from cli import UserError, reported_as

WAIT = 5  # seconds for the hub's first answer: with what starting takes, no one waits longer than 10 s in vain
MINI = Path(__file__).resolve().parents[1] / "models" / "mini"


class Public(NamedTuple):
    """A public model."""

    repository: str
    what: str
    gigabytes: float
    licence: str  # as the repository's card has it


PUBLIC = {  # by their short names
    "ip2p": Public("timbrooks/instruct-pix2pix", "the authors' InstructPix2Pix", 4.3, "MIT"),
    "sd15": Public("stable-diffusion-v1-5/stable-diffusion-v1-5", "Stable Diffusion 1.5", 4.3, "CreativeML OpenRAIL-M"),
    "clip": Public("openai/clip-vit-large-patch14", "CLIP ViT-L/14", 1.7, "MIT"),
    "clip-b32": Public("openai/clip-vit-base-patch32", "CLIP ViT-B/32", 0.6, "MIT"),
    "dino": Public("facebook/dino-vits16", "DINO ViT-S/16", 0.09, "Apache-2.0"),
    "vae": Public("stabilityai/sd-vae-ft-mse", "the fine-tuned autoencoder", 0.3, "MIT"),
}


class Kind(NamedTuple):
    """What a program looks for."""

    example: str  # a short name
    bundled: str  # the folder in models/mini that "mini" stands for
    parts: tuple[str, ...]  # folders with a network each, in a hub repository; "" for the repository itself


KINDS = {
    "editor": Kind("ip2p", "editor", ("unet", "vae", "text_encoder")),
    "sd": Kind("sd15", "sd", ("unet", "vae", "text_encoder")),
    "clip": Kind("clip", "clip", ("",)),
    "vae": Kind("vae", "sd", ("vae",)),
    "dino": Kind("dino", "", ("",)),
    "tokenizer": Kind("clip", "clip", ()),
}
WEIGHTS = re.compile(r"(?:diffusion_pytorch_|pytorch_)?model(\.fp16)?(-\d{5}-of-\d{5})?(\.fp16)?\.(safetensors|bin)")


def best_weights(names):
    """Of the files in a network's folder, those that hold its weights in the best format: one, or all shards."""
    found = {}
    for name in sorted(names):
        if match := WEIGHTS.fullmatch(name):
            half, shard, half_too, ending = match.groups()
            found.setdefault((ending == "bin", bool(half or half_too), bool(shard)), []).append(name)
    if not found:
        return []
    first = found[min(found)][0]  # a shard's name says how many there are
    count = int(shards[1]) if (shards := re.search(r"-of-(\d+)", first)) else 1
    return [re.sub(r"-\d+-of-", f"-{number:05d}-of-", first) for number in range(1, count + 1)]


def choose_files(names, kind):
    """Of the names of a repository's files, those that loading needs; none if it lacks the weights of any part."""
    alone = kind == "vae" and best_weights(names)  # an autoencoder's own repository
    prefixes = [f"{part}/" if part and not alone else "" for part in KINDS[kind].parts]
    weights = [[p + w for w in best_weights(n[len(p) :] for n in names if n.startswith(p))] for p in prefixes]
    texts = [n for n in names if n.count("/") < 2 and n.endswith((".json", "merges.txt"))]
    tokenizer = kind in ("vae", "dino") or any(n.endswith(("merges.txt", "tokenizer.json")) for n in texts)
    whole = tokenizer and all(part and set(part) <= set(names) for part in weights)
    return [*sum(weights, []), *texts] if whole else []


def find(path, kind="editor"):
    """A path -> itself; a short name or a hub id -> its folder on this machine, downloaded if it is not there.

    kind: of `KINDS`, says which files are needed and which model "mini" is. A short name wins over a folder of that
    name, which is ./NAME. Raises UserError.
    """
    if path == "mini" and kind != "dino":
        return MINI / KINDS[kind].bundled
    repository = PUBLIC[path].repository if path in PUBLIC else str(path)
    if path not in PUBLIC:
        if Path(path).exists():
            return of_run(Path(path), kind)
        if Path(path).parent.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
            wanted = f"a folder, a .safetensors file, a hub id, or a short name: {KINDS[kind].example}, mini"
            raise UserError(f"there are no weights at {path}; give {wanted}")
    return cached(repository, kind) or download(repository, kind)


def lasting(path):
    """The full path of what is there, so that it is found from any folder; short names and hub ids as they are."""
    return str(Path(path).resolve()) if path not in (*PUBLIC, "mini") and Path(path).exists() else path


def of_run(path, kind):
    """A path, or for the folder of a training the editor in it. Raises UserError."""
    if kind == "clip" and path.is_file():
        raise UserError(f"{path} is a file; give the folder in which CLIP and its tokenizer are")
    if not (path / "states").is_dir():
        return path
    if not (path / "model").is_dir():
        raise UserError(f"{path} is a training that has not ended; `train.py export --run {path}` writes its editor")
    return path / "model"


def cached(repository, kind):
    """The folder of a repository in this machine's hub cache, or None if it lacks any file that `kind` needs."""
    from huggingface_hub import snapshot_download  # here, since it takes a second
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    with reported_as(f"{repository} is no hub id", HFValidationError):
        try:
            folder = Path(snapshot_download(repository, local_files_only=True, allow_patterns=[]))  # for its path alone
        except LocalEntryNotFoundError:
            return None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return folder if choose_files(names, kind) else None


def download(repository, kind):
    """Fetch what `kind` needs of a repository into the hub's cache, after a line that says what it is; its folder."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    known = next((public for public in PUBLIC.values() if public.repository == repository), None)
    what = f"{known.what} ({repository})" if known else repository
    absent = f"{what} is not in this machine's hub cache, and"
    by_hand = f"fetch it elsewhere from huggingface.co/{repository} and name its folder by a path"
    mini = "or give mini, as in --weights mini, for the small world that is bundled"
    unreachable = reported_as(f"{absent} the hub cannot be reached; {by_hand}, {mini}")
    unknown = reported_as(f"{absent} the hub has no such model, or it needs `hf auth login`", RepositoryNotFoundError)
    with unreachable, unknown:
        info = in_time(WAIT, lambda: HfApi().model_info(repository, files_metadata=True, timeout=WAIT))
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    files = choose_files(list(sizes), kind)
    if not files:
        raise UserError(f"{repository} lacks what is needed here; download the file that you mean, and give its path")
    licence = known.licence if known else (info.card_data or {}).get("license", "unknown")
    size = f"{sum(sizes[name] for name in files) / 1e9:.2g} GB"
    print(f"downloading {what}, once: {size}, licence {licence}", file=sys.stderr)
    with reported_as(f"{what} cannot be downloaded; the same command resumes"):
        return Path(snapshot_download(repository, allow_patterns=files))


def in_time(seconds, function):
    """function(), or TimeoutError: asking a name server, for example, cannot be given a limit of its own."""
    future = Future()

    def call():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=call, daemon=True).start()  # a daemon, which the end of the program does not wait for
    try:
        return future.result(seconds)
    except TimeoutError as error:
        raise TimeoutError(f"no answer within {seconds} s") from error
