"""Edit an image by a written instruction (Sec. 3.2).

    python sample.py --image x.png --instr "make it night"
"""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

# torch and the model are imported when the arguments are read, so that --help and mistakes are answered at once
import cli
from cli import PIXELS, SCALE, SEED, STEPS, Parser, UserError, as_flags, between, find_images, run_program

WORLD, SHEET = 64, "sheet.png"  # pixels a side of the bundled model's images; the sheet of several edits
SWEEP_TEXT = (0.4, 0.7, 1, 1.5)  # times --cfg-text: the columns of Fig. 4
SWEEP_IMAGE = (0.7, 1, 1.4)  # times --cfg-image: its rows


def make_parser():
    """The command line."""
    parser = Parser(prog="sample.py", description=__doc__.splitlines()[0], epilog="A PNG has its settings, for --again")
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
    cli.add_savings(parser)

    group = parser.add_argument_group("keeping the rest of the image")
    add = group.add_mutually_exclusive_group().add_argument
    add("--mask", metavar="FILE", help="an image as large: white may change, black keeps its pixels")
    add("--region", metavar="TEXT", help='a mask that is found: where "the hat" is; shown in a sheet')
    group.add_argument("--full-size", action="store_true", help="put the edit back into the original, at its size")
    group.add_argument("--sheet", action="store_true", help="input and result side by side, too, in out_sheet.png")

    add = parser.add_argument_group("the machine").add_argument
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="(default: the fastest)")
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
    if options.full_size and not (options.mask or options.region):
        raise UserError("--full-size needs --mask or --region, which say what to put back into the original")
    jobs = make_jobs(options)
    for image, texts, out in jobs:
        for text in texts:
            cli.check_instruction(text)
        if out.suffix.lower() != ".png" or out.is_dir():
            raise UserError(f"the output {out} should be a file that ends in .png, where settings can be kept, too")
        written = [path for path in (out, *variants(out, options).values()) if path.exists()]
        if os.path.exists(image) and any(path.samefile(image) for path in written):
            raise UserError(f"the output would overwrite the input {image}; choose another --out")
    return options, jobs


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


def choose_weights(options, jobs):
    """The weights that were named; else mini if all images are as large as its scenes; else ip2p.

    Raises UserError for a mask, or an image that is alone, that cannot be used: before a model is loaded.
    """
    from images import fit_mask, open_image

    mask = open_image(options.mask) if options.mask else None
    for path, *_ in jobs:
        with suppress(*[UserError] * (len(jobs) > 1)):  # one of many is reported when it is its turn
            image = open_image(path)
            if mask:
                fit_mask(mask, image, WORLD)
            if image.size != (WORLD, WORLD):
                return options.weights or "ip2p"
    return options.weights or "mini"


def load_model(options):
    """The model that the settings name, on the device and in the number format that they name."""
    import torch

    from gpu.compiled import NOTICE, compile_model
    from ip2p import InstructPix2Pix

    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    cli.check_device(options.device)
    if options.dtype == "auto":
        options.dtype = cli.fast_format(options.device)
    torch.backends.cudnn.deterministic = True  # so that --again gives the same pixels
    say(f"loading {options.weights}")
    parts = options.tokenizer, options.vae, options.lora, options.ema
    model = InstructPix2Pix.load(options.weights, options.device, getattr(torch, options.dtype), *parts)
    if options.compile:
        # a CUDA graph leaves every result in the same place, which neither of these two allows
        compile_model(model, mode=None if options.low_memory or options.deep_every else "reduce-overhead")
        say(NOTICE)
    own = {name: getattr(model.sampling, name) for name in ("steps", "resolution", "sampler", "schedule")}
    own |= {"cfg_text": model.sampling.text_guidance, "cfg_image": model.sampling.image_guidance}
    own["batch_size"] = 1 if options.device == "cpu" else 4  # in a batch, a CPU's last bits differ
    vars(options).update((name, value) for name, value in own.items() if getattr(options, name) is None)
    return model


class Edit:
    """An image, its instructions, and what comes of them with all seeds or guidance scales that were asked for."""

    def __init__(self, options, image, texts, out, model):
        """Open the image and the mask. Raises UserError."""
        from images import fit_mask, open_image, resize_and_crop

        self.options, self.path, self.texts, self.out, self.whole = options, image, texts, out, open_image(image)
        self.before, self.mask = resize_and_crop(self.whole, options.resolution), None
        if options.mask or options.region:
            self.mask = open_image(options.mask) if options.mask else model.region(self.whole, options.region)
            self.small_mask = fit_mask(self.mask, self.whole, options.resolution)
        image_factors, text_factors = (SWEEP_IMAGE, SWEEP_TEXT) if options.sweep else ([1], [1])
        self.rows = [min(100, options.cfg_image * factor) for factor in image_factors]
        self.columns = [min(100, options.cfg_text * factor) for factor in text_factors]
        self.seeds = range(options.seed, options.seed + options.num)
        self.settings = [(s_t, s_i, seed) for s_i in self.rows for s_t in self.columns for seed in self.seeds]
        self.results = []  # for each of the settings, an image after each instruction

    def write(self):
        """Write the results, and sheets of them."""
        from images import enlarge, grid, put_back

        options, edited = self.options, [stages[-1] for stages in self.results]
        shown = [enlarge(image) for image in (self.before, *edited)]
        if options.full_size:
            edited = [put_back(image, self.whole, self.mask) for image in edited]
        result = edited[0]
        if options.sweep:
            titles = [f"s_T = {s_t:g}" for s_t in self.columns], [f"s_I = {s_i:g}" for s_i in self.rows]
            title = f"{self.texts[0]} (seed {options.seed}, {options.steps} steps)"
            result = grid(shown[1:], len(self.columns), None, *titles, title, beside=("input", shown[0]))
        elif options.num > 1:
            for (seed, path), one in zip(variants(self.out, options).items(), edited, strict=True):
                self.save(one, path, seed=seed, num=1)
            labels = ["input", *(f"seed {seed}" for seed in self.seeds)]
            result = grid(shown, min(4, len(shown)), labels, title=" - ".join(self.texts))
        self.save(result, self.out)
        if options.sheet or options.region:
            panels, labels = self.panels()
            self.save(grid(panels, len(panels), labels), self.out.with_name(f"{self.out.stem}_sheet.png"))

    def panels(self):
        """What a sheet shows of this edit, images and their labels: the input, the region, the result of each text."""
        from images import enlarge, outside_dimmed

        images, labels = [self.before], ["input"]
        if self.mask:
            images.append(outside_dimmed(self.before, self.small_mask))
            labels.append(self.options.region or "mask")
        return [enlarge(image) for image in (*images, *self.results[0])], [*labels, *self.texts]

    def save(self, image, path, **changed):
        """Write a PNG with the settings that repeat it, and print its path."""
        from images import save_png

        settings = {**vars(self.options), "image": self.path, "instr": self.texts[0], **changed}
        save_png(image, path, {name: value for name, value in settings.items() if name not in ("out", "again")})
        print(path)


def run(model, edits, options):
    """Sample for edits of images of one size, `options.batch_size` at once. Raises UserError if memory runs out."""
    from gpu.savings import Savings

    runs = [(edit, *settings) for edit in edits for settings in edit.settings]
    for start in range(0, len(runs), options.batch_size):
        batch, *scales, seeds = map(list, zip(*runs[start : start + options.batch_size], strict=True))
        images, masks, stages = [edit.whole for edit in batch], [edit.mask for edit in batch if edit.mask], []
        more = {name: getattr(options, name) for name in ("negative", "low_memory", "sampler", "schedule")}
        more["savings"] = Savings.of(options)
        for texts in zip(*(edit.texts for edit in batch), strict=True):
            settings = *scales, options.steps, seeds, options.resolution
            with cli.memory_reported("try --low-memory, a smaller --resolution or --batch-size 1"):
                images = model.edit(images, list(texts), *settings, mask=masks or None, progress=True, **more)
            masks = [edit.small_mask for edit in batch if edit.mask]  # as large as these images
            stages.append(images)
        for edit, results in zip(batch, zip(*stages, strict=True), strict=True):
            edit.results.append(results)


def say(message):
    """Tell the user something, on stderr: stdout is for the paths of what was written."""
    print(f"sample.py: {' '.join(message.splitlines())}", file=sys.stderr)


def main(arguments=None):
    """Read the settings, load the model, edit, write."""
    options, jobs = parse(arguments)
    from images import grid, save_png, thumbnail

    options.weights = choose_weights(options, jobs)
    model = load_model(options)
    start, failed, waiting, shown, labels = time.monotonic(), [], [], [], []

    def finish_waiting():
        run(model, waiting, options)
        for edit in waiting:
            edit.write()
            images, names = edit.panels()
            shown.extend(thumbnail(image) for image in images)
            labels.extend([Path(edit.path).name, *names[1:]])
        waiting.clear()

    for image, texts, out in jobs:
        try:
            edit = Edit(options, image, texts, out, model)
        except UserError as error:
            if len(jobs) == 1:
                raise
            failed.append(image)
            say(f"skipped: {error}")
            continue
        for cut_off in filter(None, map(model.tokenizer.cut_off, texts)):
            say(f'the instruction is too long; the model does not see its end: "{cut_off}"')
        if waiting and (edit.before.size != waiting[0].before.size or len(waiting) >= options.batch_size):
            finish_waiting()
        waiting.append(edit)
        say(f"editing at {edit.before.width}x{edit.before.height}, {options.steps} steps, on {options.device}")
    finish_waiting()
    if len(jobs) > 1 and shown:
        save_png(grid(shown, len(shown) // (len(jobs) - len(failed)), labels), jobs[0][2].with_name(SHEET))
        print(jobs[0][2].with_name(SHEET))
    say(f"done in {time.monotonic() - start:.1f} s")
    if failed:
        sys.exit(f"sample.py: {len(failed)} of {len(jobs)} images were skipped: {', '.join(failed)}")


if __name__ == "__main__":
    run_program(main)
