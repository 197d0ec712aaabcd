"""Edit an image by a written instruction (Sec. 3.2).

    python sample.py --image x.png --instr "make it night" --weights timbrooks/instruct-pix2pix
"""

import os
import re
import sys
import time
from pathlib import Path

# torch and the model are imported when the arguments are read, so that --help and mistakes are answered at once
from cli import PIXELS, SCALE, SEED, STEPS, Parser, UserError, between, check_device, check_instruction, run_program

BUNDLED = Path(__file__).resolve().parent / "models" / "mini" / "editor"
WORLD = 64  # pixels a side of the images that the bundled model was made for
SWEEP_TEXT = (0.4, 0.7, 1, 1.5)  # times --cfg-text: the columns of Fig. 4
SWEEP_IMAGE = (0.7, 1, 1.4)  # times --cfg-image: its rows


def make_parser():
    """The command line."""
    parser = Parser(
        prog="sample.py",
        description="Edit an image by a written instruction (InstructPix2Pix).",
        epilog="The PNG that is written carries its settings; --again takes them from there.",
    )
    add = parser.add_argument
    add("--image", metavar="FILE", help="the image to edit")
    add("--instr", metavar="TEXT", help='what to change, such as "make it night"')
    add("--out", type=Path, metavar="FILE.png", help="where to write the edited image (default: out.png)")
    add("--again", type=Path, metavar="FILE.png", help="repeat the edit that wrote this file; other options change it")

    add = parser.add_argument_group("the model").add_argument
    add("--weights", metavar="PATH", help="a folder, a .safetensors file or a hub id (default: the bundled miniature)")
    add("--tokenizer", metavar="DIR", help="for a single file (default: beside it, else from the hub's cache)")
    add("--vae", metavar="PATH", help="another autoencoder than the one that comes with the weights")
    add("--lora", metavar="FILE[:S]", help="a LoRA to merge into the weights, S times (default: 1)")
    add("--ema", choices=["yes", "no"], help="of a file with averaged weights (EMA): take them? (default: if sane)")

    brackets = "Defaults come with the model; those of the public weights stand in brackets."
    add = parser.add_argument_group("the edit", brackets).add_argument
    add("--steps", type=STEPS, metavar="N", help="denoising steps [100]")
    add("--cfg-text", type=SCALE, metavar="S_T", help="how strongly to follow the instruction [7.5]")
    add("--cfg-image", type=SCALE, metavar="S_I", help="how closely to keep to the image [1.5]")
    add("--resolution", type=PIXELS, metavar="R", help="pixels of the longer side, about [512]")
    add("--seed", type=SEED, default=0, metavar="S", help="of the noise (default: 0)")
    add("--num", type=between(1, 1000), default=1, metavar="N", help="N variants, seeds S, S+1, ..., and a sheet")
    add("--sweep", action="store_true", help="make a grid over both guidance scales, as in Fig. 4")

    add = parser.add_argument_group("the machine").add_argument
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="number format")
    add("--compile", action="store_true", help="compile the networks first: for many edits on a GPU")
    add("--low-memory", action="store_true", help="slower, in less memory")
    return parser


def parse(arguments=None):
    """The settings of an edit, with --again those of another one as defaults. Raises UserError before any loading."""
    parser = make_parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    if options.again:
        from images import read_settings

        again, settings = options.again, read_settings(options.again)
        flags = {f"--{name.replace('_', '-')}": value for name, value in settings.items() if value is not None}
        then = [flag if value is True else f"{flag}={value}" for flag, value in flags.items() if value is not False]
        options = parser.parse_args([*then, *arguments])  # what is said now comes last and wins
        options.out = options.out or again.with_name(f"{again.stem}_again.png")
    options.out = options.out or Path("out.png")
    if not options.image or options.instr is None:
        raise UserError('name the image to edit with --image, and what to change with --instr "make it night"')
    check_instruction(options.instr)
    if options.sweep and options.num > 1:
        raise UserError("--num and --sweep cannot be used together")
    if options.out.suffix.lower() != ".png" or options.out.is_dir():
        raise UserError(f"the output {options.out} should be a file that ends in .png, where settings can be kept, too")
    written = [path for path in (options.out, *variants(options).values()) if path.exists()]
    if os.path.exists(options.image) and any(path.samefile(options.image) for path in written):
        raise UserError(f"the output would overwrite the input {options.image}; choose another --out")
    return options


def variants(options):
    """Where the variants of --num are written, by their seeds: out.png -> out_seed7.png."""
    seeds = range(options.seed, options.seed + options.num) if options.num > 1 else ()
    return {seed: options.out.with_name(f"{options.out.stem}_seed{seed}.png") for seed in seeds}


def load_model(options):
    """The model that the settings name, on the device and in the number format that they name."""
    import torch

    from gpu.compiled import NOTICE, compile_model
    from ip2p import InstructPix2Pix

    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    check_device(options.device)
    if options.dtype == "auto":
        options.dtype = "float16" if options.device.startswith("cuda") else "float32"
    torch.backends.cudnn.deterministic = True  # so that --again gives the same pixels
    weights, dtype = options.weights or BUNDLED, getattr(torch, options.dtype)
    say(f"loading {weights}")
    parts = options.tokenizer, options.vae, options.lora, options.ema
    model = InstructPix2Pix.load(weights, options.device, dtype, *parts)
    if options.compile:
        # a CUDA graph leaves every result in the same place, and --low-memory collects several
        compile_model(model, mode=None if options.low_memory else "reduce-overhead")
        say(NOTICE)
    own = {"steps": model.sampling.steps, "resolution": model.sampling.resolution}
    own |= {"cfg_text": model.sampling.text_guidance, "cfg_image": model.sampling.image_guidance}
    vars(options).update((name, value) for name, value in own.items() if getattr(options, name) is None)
    return model


def edit(model, image, options, seed, cfg_text, cfg_image):
    """One edit. Raises UserError if memory runs out."""
    settings = cfg_text, cfg_image, options.steps, seed, options.resolution
    try:
        return model.edit(image, options.instr, *settings, low_memory=options.low_memory, progress=True)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
            raise UserError("there is not enough memory; try --low-memory, or a smaller --resolution") from error
        raise


def write_edits(model, image, before, options):
    """One edit; or one for each of --num seeds, and a sheet of them; or a grid over both guidance scales (Fig. 4)."""
    from images import enlarge, grid, save_png

    def write(image, path, **changed):
        settings = {**vars(options), **changed}  # which repeat it
        save_png(image, path, {name: value for name, value in settings.items() if name not in ("out", "again")})
        print(path)

    rows, columns, seeds = [options.cfg_image], [options.cfg_text], variants(options) or {options.seed: options.out}
    if options.sweep:
        rows = [min(100, options.cfg_image * factor) for factor in SWEEP_IMAGE]
        columns = [min(100, options.cfg_text * factor) for factor in SWEEP_TEXT]
    edited = [edit(model, image, options, seed, s_t, s_i) for s_i in rows for s_t in columns for seed in seeds]
    result, shown = edited[0], [enlarge(x) for x in (before, *edited)]
    if options.sweep:
        titles = [f"s_T = {s_t:g}" for s_t in columns], [f"s_I = {s_i:g}" for s_i in rows]
        title = f"{options.instr} (seed {options.seed}, {options.steps} steps)"
        result = grid(shown[1:], len(columns), None, *titles, title, beside=("input", shown[0]))
    elif options.num > 1:
        for (seed, path), one in zip(seeds.items(), edited, strict=True):
            write(one, path, seed=seed, num=1)
        labels = ["input", *(f"seed {seed}" for seed in seeds)]
        result = grid(shown, min(4, len(shown)), labels, title=options.instr)
    write(result, options.out)


def say(message):
    """Tell the user something, on stderr: stdout is for the paths of what was written."""
    print(f"sample.py: {' '.join(message.splitlines())}", file=sys.stderr)


def main(arguments=None):
    """Read the settings, load the model, edit, write."""
    options = parse(arguments)

    from images import open_image, resize_and_crop

    image = open_image(options.image)
    if not options.weights and image.size != (WORLD, WORLD):
        say("the bundled model knows only its own world; photographs need --weights timbrooks/instruct-pix2pix")
    model = load_model(options)
    if cut_off := model.tokenizer.cut_off(options.instr):
        say(f'the instruction is too long; the model does not see its end: "{cut_off}"')
    before = resize_and_crop(image, options.resolution)
    say(f"editing at {before.width}x{before.height}, {options.steps} steps, on {options.device}")
    start = time.monotonic()
    write_edits(model, image, before, options)
    say(f"done in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    run_program(main)
