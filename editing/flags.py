"""The command line of sample.py: its flags, and the edits that they ask for."""

import os
import sys
from pathlib import Path

import cli
from cli import PIXELS, SCALE, SEED, STEPS, Parser, UserError, as_flags, between, find_images, html_file

SHEET = "sheet.png"  # of several edits


def make_parser():
    """The command line."""
    epilog = "The PNG that is written carries its settings; --again takes them from there."
    parser = Parser(prog="sample.py", description="Edit images by written instructions.", epilog=epilog)
    add = parser.add_argument
    add("--image", nargs="+", metavar="FILE", help="the image to edit; or several, a folder, a pattern in quotes")
    add("--instr", metavar="TEXT", help='what to change, such as "make it night"; or a text file with one a line')
    add("--then", action="append", metavar="TEXT", help="another instruction, for the result; may be repeated")
    add("--out", type=Path, metavar="FILE.png", help="where to write (default: out.png; for several edits: folder out)")
    add("--again", type=Path, metavar="FILE.png", help="repeat the edit that wrote this file; other options change it")

    add = parser.add_argument_group("the model").add_argument
    choice = "mini, ip2p, a folder, a .safetensors file or a hub id (default: mini for 64x64 scenes, else ip2p)"
    add("--weights", metavar="PATH", help=choice)
    add("--tokenizer", metavar="DIR", help="for a single file (default: beside it, else from the hub's cache)")
    add("--vae", metavar="PATH", help="another autoencoder than the one that comes with the weights")
    add("--lora", metavar="FILE[:S]", help="a LoRA to merge into the weights, S times (default: 1)")
    add("--ema", choices=["yes", "no"], help="of a file with averaged weights (EMA): take them? (default: if sane)")

    brackets = "Defaults come with the model; those of the public weights stand in brackets."
    add = parser.add_argument_group("the edit", brackets).add_argument
    add("--steps", type=STEPS, metavar="N", help="denoising steps [100]")
    cli.add_sampler(add)
    add("--cfg-text", type=SCALE, metavar="S_T", help="how strongly to follow the instruction [7.5]")
    add("--cfg-image", type=SCALE, metavar="S_I", help="how closely to keep to the image [1.5]")
    add("--negative", default="", metavar="TEXT", help="what guidance leads away from (default: the empty text)")
    add("--resolution", type=PIXELS, metavar="R", help="pixels of the longer side, about [512]")
    add("--seed", type=SEED, default=0, metavar="S", help="of the noise (default: 0)")
    add("--num", type=between(1, 1000), default=1, metavar="N", help="N variants, seeds S, S+1, ..., and a sheet")
    add("--sweep", action="store_true", help="make a grid over both guidance scales, as in Fig. 4")
    add("--explain", type=html_file, metavar="FILE.html", help="write a page that shows this edit from inside, too")
    cli.add_savings(parser)

    add = parser.add_argument_group("scales for this image").add_argument
    add("--best", type=between(2, 1000), metavar="N", help="try N scales and seeds, keep the best one")
    add("--caption-before", metavar="TEXT", help="what the image shows: lets CLIP choose, not the samples' agreement")
    add("--caption-after", metavar="TEXT", help="what it should show after the edit")
    add("--clip", metavar="DIR", help="the CLIP that chooses (default: mini for mini, else clip)")

    group = parser.add_argument_group("keeping the rest of the image")
    add = group.add_mutually_exclusive_group().add_argument
    add("--mask", metavar="FILE", help="an image as large: white may change, black keeps its pixels")
    add("--region", metavar="TEXT", help='a mask that is found: where "the hat" is; shown in a sheet')
    group.add_argument("--full-size", action="store_true", help="put the edit back into the original, at its size")
    group.add_argument("--sheet", action="store_true", help="input and result side by side, too, in out_sheet.png")

    add = parser.add_argument_group("the machine").add_argument
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="(auto: the fastest)")
    add("--batch-size", type=between(1), metavar="B", help="edits at once (default: 1 on a CPU, else 4)")
    add("--compile", action="store_true", help="compile the networks first: for many edits on a GPU")
    add("--low-memory", action="store_true", help="slower, in less memory")
    return parser


def parse(arguments=None):
    """The settings, with those of --again as defaults, and what `make_jobs` makes of them. Raises UserError."""
    parser = make_parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    if options.again:
        from images import read_settings

        options = parser.parse_args([*as_flags(read_settings(options.again)), *arguments])  # the last of equals wins
        options.out = options.out or options.again.with_name(f"{options.again.stem}_again.png")
    if not options.image or options.instr is None:
        raise UserError('name the image to edit with --image, and what to change with --instr "make it night"')
    if options.sweep and (options.num > 1 or options.then):
        raise UserError("--sweep cannot be used together with --num or --then")
    if options.best and (options.sweep or options.num > 1):
        raise UserError("--best cannot be used together with --sweep or --num")
    if bool(options.caption_before) != bool(options.caption_after) or (options.caption_before and not options.best):
        raise UserError("--caption-before and --caption-after belong together, and to --best")
    if options.full_size and not (options.mask or options.region):
        raise UserError("--full-size needs --mask or --region, which say what to put back into the original")
    jobs = make_jobs(options)
    if options.explain:
        check_explain(options, jobs)
    if options.caption_before and len(jobs) > 1:
        raise UserError("the captions of --best describe one image; edit several in several runs")
    for image, texts, out in jobs:
        for text in texts:
            cli.check_instruction(text)
        if out.suffix.lower() != ".png" or out.is_dir():
            raise UserError(f"the output {out} should be a file that ends in .png, where settings can be kept, too")
        written = [path for path in (out, *variants(out, options).values()) if path.exists()]
        if os.path.exists(image) and any(path.samefile(image) for path in written):
            raise UserError(f"the output would overwrite the input {image}; choose another --out")
    return options, jobs


def check_explain(options, jobs):
    """Raise UserError unless --explain has one edit to show, with all of its branches as one batch."""
    left_out = options.null_every or options.deep_every or options.cfg_above or options.cfg_below
    if len(jobs) > 1 or options.num > 1 or options.sweep or options.then:
        raise UserError("--explain shows one edit: one image, one instruction, without --num, --sweep and --then")
    if left_out or options.low_memory or options.compile:
        raise UserError("--explain cannot be used together with --low-memory, --compile or what leaves out parts")


def make_jobs(options):
    """A list of (image, [instruction, what --then adds...], output), one an edit."""
    images = [path for name in options.image for path in find_images(name)]
    instructions = [options.instr]
    if os.path.isfile(options.instr):
        from formats.tables import read_rows, text_of

        instructions = [text_of(row, [""]) for _, row in read_rows(options.instr)]
    count = max(len(images), len(instructions))
    if not {len(images), len(instructions)} <= {1, count}:
        found = f"there are {len(images)} images and {len(instructions)} instructions"
        raise UserError(f"{found}; give one of either, or as many of both")
    if count == 1:
        outputs = [options.out or Path("out.png")]
    else:
        folder = options.out or Path("out")
        if folder.suffix.lower() == ".png" or folder.is_file():
            raise UserError(f"{count} edits are written to a folder, and {folder} is named like a file")
        outputs = cli.name_outputs(folder, images * (count // len(images)), SHEET)
    every = zip(images * (count // len(images)), instructions * (count // len(instructions)), outputs, strict=True)
    return [(image, [text, *(options.then or ())], out) for image, text, out in every]


def variants(out, options):
    """Where the variants of --num are written, by their seeds: out.png -> out_seed7.png."""
    seeds = range(options.seed, options.seed + options.num) if options.num > 1 else ()
    return {seed: out.with_name(f"{out.stem}_seed{seed}.png") for seed in seeds}
