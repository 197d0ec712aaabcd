"""Edit a picture by a written instruction.

    python sample.py --image x.png --instr "make it night" --weights timbrooks/instruct-pix2pix
"""

# Nothing heavy is imported before the arguments are read, so that --help and mistakes are answered at once.
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

from cli import Parser, UserError, check_device, check_instruction, check_sampling, check_seeds, run_program

BUNDLED = Path(__file__).resolve().parent / "models" / "mini" / "editor"
WORLD = 64  # pixels a side of the pictures that it was made for
BATCH = 4  # edits made at once by --num and --sweep; one at a time with --low-memory
SWEEP_TEXT = (0.4, 0.7, 1, 1.5)  # times --cfg-text: the columns of Fig. 4
SWEEP_IMAGE = (0.7, 1, 1.4)  # times --cfg-image: its rows

# The settings of an edit: they are written into the picture, and are all that --again needs.
DEFAULTS = {
    "image": None,
    "instr": None,
    "weights": None,  # the bundled miniature
    "tokenizer": None,
    "vae": None,
    "steps": None,  # None: the model's own default
    "cfg_text": None,
    "cfg_image": None,
    "resolution": None,
    "seed": 0,
    "num": 1,
    "sweep": False,
    "device": "auto",
    "dtype": "auto",
    "compile": False,
    "low_memory": False,
}
PATHS = ("image", "weights", "tokenizer", "vae")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KINDS = {  # what the settings are once an edit was made
    (str,): ("image", "instr", "device", "dtype"),
    (str, type(None)): ("weights", "tokenizer", "vae"),
    (int,): ("steps", "resolution", "seed", "num"),
    (int, float): ("cfg_text", "cfg_image"),
    (bool,): ("sweep", "compile", "low_memory"),
}


def parse(arguments=None):
    """The command line. An option that is not given stays None, so that --again can tell it from a choice."""
    parser = Parser(
        prog="sample.py",
        description="Edit a picture by a written instruction (InstructPix2Pix).",
        epilog="The PNG that is written carries its settings; --again reads them from there.",
    )
    add = parser.add_argument
    add("--image", metavar="FILE", help="the picture to edit")
    add("--instr", metavar="TEXT", help='what to change, such as "make it night"')
    add("--out", metavar="FILE.png", help="where to write the edited picture (default: out.png)")
    add("--again", metavar="FILE.png", help="repeat the edit that wrote this file; other options change that edit")

    add = parser.add_argument_group("the model").add_argument
    add("--weights", metavar="PATH", help="a folder, a .safetensors file or a hub id (default: the bundled miniature)")
    add("--tokenizer", metavar="DIR", help="for a single file (default: beside it, else from the hub's cache)")
    add("--vae", metavar="PATH", help="another autoencoder than the one that comes with the weights")

    brackets = "Defaults come with the model; those of the public weights stand in brackets."
    add = parser.add_argument_group("the edit", brackets).add_argument
    add("--steps", type=int, metavar="N", help="denoising steps [100]")
    add("--cfg-text", type=float, metavar="S_T", help="how strongly to follow the instruction [7.5]")
    add("--cfg-image", type=float, metavar="S_I", help="how closely to keep to the picture [1.5]")
    add("--resolution", type=int, metavar="R", help="pixels of the longer side, about [512]")
    add("--seed", type=int, metavar="S", help="of the noise (default: 0)")
    add("--num", type=int, metavar="N", help="make N variants, seeds S, S+1, ..., and a sheet of them")
    add("--sweep", action="store_true", default=None, help="make a grid over both guidance scales, as in Fig. 4")

    add = parser.add_argument_group("the machine").add_argument
    add("--device", metavar="D", help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    add("--dtype", choices=DTYPES, help="number format of the networks")
    add("--compile", action="store_true", default=None, help="compile the networks first: for many edits on a GPU")
    add("--low-memory", action="store_true", default=None, help="slower, in less memory")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Read the settings, load the model, edit, write."""
    options = parse(arguments)
    given = {key: value for key, value in vars(options).items() if key in DEFAULTS and value is not None}
    if options.again:
        settings, prints, only = recorded(options.again, given)
        out = Path(options.out or Path(options.again).with_name(f"{Path(options.again).stem}_again.png"))
    else:
        settings, prints, only = {**DEFAULTS, **given}, {}, None
        out = Path(options.out or "out.png")
    check(settings, out)

    from images import fit, open_image

    image = open_image(settings["image"])
    if not settings["weights"] and image.size != (WORLD, WORLD):
        say(
            f"the bundled model knows only its own world, scenes of {WORLD}x{WORLD} pixels as in examples/; yours "
            "is resized, and the edit may make no sense. For photographs: --weights timbrooks/instruct-pix2pix"
        )
    now = {"image": hashlib.sha256(image.tobytes()).hexdigest()}
    compare(prints, now, "image", settings["image"])
    model = load_model(settings)
    unet, vae = model.unet, model.vae
    now["weights"] = fingerprint(unet.conv_in, unet.conv_out, model.text_encoder.norm_out)
    now["vae"] = fingerprint(vae.encoder.conv_in, vae.decoder.conv_out)
    compare(prints, now, "weights", settings["weights"] or BUNDLED)
    compare(prints, now, "vae", settings["vae"] or settings["weights"] or BUNDLED)
    fill_in(settings, model)
    cut_off = model.tokenizer.cut_off(settings["instr"])
    if cut_off:
        say(f'the instruction is too long; the model does not see its end: "{cut_off}"')

    edits = plan(settings)
    before = fit(image, settings["resolution"])
    say(f"editing at {before.width}x{before.height}, {settings['steps']} steps, on {settings['device']}")
    start = time.monotonic()
    wanted = range(len(edits)) if only is None else batch_of(only, len(edits), settings["low_memory"])
    pictures = make(model, image, settings, edits, wanted)
    write(out, settings, now, edits, pictures, before, only)
    say(f"{len(pictures)} {'edit' if len(pictures) == 1 else 'edits'} in {time.monotonic() - start:.1f} s")


def recorded(path, given):
    """The settings that a picture carries, changed by what is `given`: (settings, fingerprints, number of the edit).

    The number is None for a sheet or a sweep. Paths are noted relative to the picture that carries them.
    """
    from images import read_settings

    note = read_settings(path)
    try:
        settings = {key: note["settings"][key] for key in DEFAULTS}
        prints, only = dict(note["fingerprints"]), note["edit"]
        right = all(type(settings[key]) in kinds for kinds, keys in KINDS.items() for key in keys)
        right &= settings["dtype"] in DTYPES
        right &= only is None or (type(only) is int and 0 <= only < settings["num"])
        if not right:
            raise ValueError("a value that sample.py does not write")
        for key in PATHS:
            local = Path(path).parent / str(settings[key])
            if settings[key] is not None and os.path.exists(local):
                settings[key] = str(local)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} carries settings of another kind; it cannot be repeated") from error
    if {"num", "sweep"} & set(given):
        only = None
    chosen = set(given)  # and need not be what it was
    if {"weights", "dtype"} & chosen:  # the numbers of weights differ with their format
        chosen |= {"weights", "vae"}
    return {**settings, **given}, {key: value for key, value in prints.items() if key not in chosen}, only


def check(settings, out):
    """Raise UserError for whatever can be told from the settings alone, before anything is loaded."""
    if not settings["image"]:
        raise UserError("name the picture to edit with --image")
    if settings["instr"] is None:
        raise UserError('say what to change with --instr, such as --instr "make it night"')
    check_instruction(settings["instr"])
    check_sampling(settings["steps"], settings["cfg_text"], settings["cfg_image"], settings["resolution"])
    if not 1 <= settings["num"] <= 1000:
        raise UserError(f"--num should be between 1 and 1000, not {settings['num']}")
    if settings["sweep"] and settings["num"] > 1:
        raise UserError("--num and --sweep cannot be used together")
    check_seeds([settings["seed"], settings["seed"] + settings["num"] - 1])
    if not settings["weights"] and not BUNDLED.is_dir():
        raise UserError(f"there is no bundled model in {BUNDLED}; name one: --weights timbrooks/instruct-pix2pix")

    if out.suffix.lower() != ".png":
        raise UserError(f"the output {out} should end in .png, which keeps the settings along with the picture")
    variants = settings["num"] if settings["num"] > 1 else 0
    written = [out, *(variant_path(out, settings["seed"] + i) for i in range(variants))]
    image = settings["image"]
    try:
        if out.is_dir():
            raise UserError(f"the output {out} is a folder; name a file")
        if not out.parent.is_dir():
            raise UserError(f"there is no folder {out.parent} to write to; make it first")
        replaced = [path for path in written if path.exists()]
        if os.path.exists(image) and any(path.samefile(image) for path in replaced):
            raise UserError(f"the output would overwrite the input {image}; choose another --out")
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error


def load_model(settings):
    """Load the model that the settings name, and note in them the device and the number format that were chosen."""
    import torch

    from gpu.compiled import NOTICE, compile_model
    from ip2p import InstructPix2Pix

    if settings["device"] == "auto":
        settings["device"] = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    check_device(settings["device"])
    if settings["dtype"] == "auto":
        settings["dtype"] = "float16" if settings["device"].startswith("cuda") else "float32"
    torch.backends.cudnn.deterministic = True  # so that --again gives the same pixels

    weights = settings["weights"] or BUNDLED
    say(f"loading {weights}")
    dtype = getattr(torch, settings["dtype"])
    model = InstructPix2Pix.load(weights, settings["device"], dtype, settings["tokenizer"], settings["vae"])
    if settings["compile"]:
        say(NOTICE)
        compile_model(model)
    return model


def fill_in(settings, model):
    """Replace the settings that are still None by the model's defaults."""
    defaults = {
        "steps": model.sampling.steps,
        "cfg_text": model.sampling.text_guidance,
        "cfg_image": model.sampling.image_guidance,
        "resolution": model.sampling.resolution,
    }
    settings.update({key: value for key, value in defaults.items() if settings[key] is None})


def plan(settings):
    """The edits to make, as a list of (seed, text guidance, image guidance)."""
    seed, text, image = settings["seed"], settings["cfg_text"], settings["cfg_image"]
    if settings["sweep"]:
        rows = [min(100, image * factor) for factor in SWEEP_IMAGE]
        columns = [min(100, text * factor) for factor in SWEEP_TEXT]
        return [(seed, column, row) for row in rows for column in columns]
    return [(seed + i, text, image) for i in range(settings["num"])]


def batch_of(number, count, low_memory):
    """The numbers of the edits that are made in a batch with edit `number`: equal batches, equal pixels."""
    size = 1 if low_memory else BATCH
    start = number // size * size
    return range(start, min(start + size, count))


def make(model, image, settings, edits, wanted):
    """Make the edits whose numbers are `wanted`, in batches: {number: picture}. Raises UserError if memory runs out."""
    import torch

    pictures = {}
    while len(pictures) < len(wanted):
        numbers = batch_of(wanted[len(pictures)], wanted.stop, settings["low_memory"])
        chosen_seeds, text, image_scales = zip(*(edits[number] for number in numbers), strict=True)
        try:
            made = model.edit(
                image,
                settings["instr"],
                text_guidance=text,
                image_guidance=image_scales,
                steps=settings["steps"],
                seed=chosen_seeds,
                resolution=settings["resolution"],
                low_memory=settings["low_memory"],
                progress=True,
            )
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
                raise UserError("there is not enough memory; try --low-memory, or a smaller --resolution") from error
            raise
        pictures.update(zip(numbers, made, strict=True))
    return pictures


def write(out, settings, prints, edits, pictures, before, only):
    """Write one picture, or every variant and their sheet, or the sweep's grid."""
    from images import enlarge, grid, save_png

    def save(path, picture, number):
        here = {**settings, **{key: relative(settings[key], path) for key in PATHS}}
        save_png(picture, path, {"settings": here, "fingerprints": prints, "edit": number})
        print(path)

    if only is not None or len(edits) == 1:
        number = only or 0
        save(out, pictures[number], number)
    elif settings["sweep"]:
        columns = len(SWEEP_TEXT)
        titles = [f"s_T = {edits[column][1]:g}" for column in range(columns)]
        rows = [f"s_I = {edits[row * columns][2]:g}" for row in range(len(SWEEP_IMAGE))]
        title = f"{settings['instr']} (seed {settings['seed']}, {settings['steps']} steps)"
        large = [enlarge(picture) for picture in pictures.values()]
        sheet = grid(large, columns, None, titles, rows, title, beside=("input", enlarge(before)))
        save(out, sheet, None)
    else:
        for number, (seed, _, _) in enumerate(edits):
            save(variant_path(out, seed), pictures[number], number)
        labels = ["input", *(f"seed {seed}" for seed, _, _ in edits)]
        columns = min(4, len(labels))
        large = [enlarge(picture) for picture in (before, *pictures.values())]
        save(out, grid(large, columns, labels, title=settings["instr"]), None)


def variant_path(out, seed):
    """Where the variant with a seed is written: out.png -> out_seed7.png."""
    return out.with_name(f"{out.stem}_seed{seed}.png")


def relative(path, picture):
    """A local path as seen from a picture's folder, so that both can move together and no private path is told."""
    if path is None or not Path(path).exists():
        return path  # the bundled model, or a hub id
    try:
        return os.path.relpath(path, picture.resolve().parent)
    except ValueError:  # on another drive
        return str(Path(path).resolve())


def fingerprint(*layers):
    """A short name for weights. Training changes every layer, so a network's first and last tell enough."""
    import torch

    ends = torch.cat([layer.weight.detach().float().flatten() for layer in layers])
    return hashlib.sha256(ends.cpu().numpy().tobytes()).hexdigest()


def compare(then, now, key, path):
    """Raise UserError if a file is not the one that the picture to repeat was made from."""
    if then.get(key, now[key]) != now[key]:
        raise UserError(f"{path} has changed since the edit was made; to use it all the same, pass --{key} {path}")


def say(message):
    """Tell the user something, on stderr: stdout is for the paths of what was written."""
    print(f"sample.py: {' '.join(message.splitlines())}", file=sys.stderr)


if __name__ == "__main__":
    run_program(main)
