"""Edit an image by a written instruction (Sec. 3.2).

    python sample.py --image x.png --instr "make it night"
"""

import sys
import time
from contextlib import suppress
from pathlib import Path

# torch and the model are imported when the arguments are read, so that --help and mistakes are answered at once
import cli
from cli import UserError, run_program

from editing.flags import SHEET, parse, variants

WORLD = 64  # pixels a side of the bundled model's images
SWEEP_TEXT = (0.4, 0.7, 1, 1.5)  # times --cfg-text: the columns of Fig. 4
SWEEP_IMAGE = (0.7, 1, 1.4)  # times --cfg-image: its rows


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

    def __init__(self, options, image, texts, out, model, chooser=None):
        """Open the image and the mask. Raises UserError."""
        from editing.best import candidates
        from images import fit_mask, open_image, resize_and_crop

        self.options, self.path, self.texts, self.out, self.whole = options, image, texts, out, open_image(image)
        self.before, self.mask = resize_and_crop(self.whole, options.resolution), None
        if options.mask or options.region:
            self.mask = open_image(options.mask) if options.mask else model.region(self.whole, options.region)
            self.small_mask = fit_mask(self.mask, self.whole, options.resolution)
        image_factors, text_factors = (SWEEP_IMAGE, SWEEP_TEXT) if options.sweep else ([1], [1])
        self.rows = [min(100, options.cfg_image * factor) for factor in image_factors]
        self.columns = [min(100, options.cfg_text * factor) for factor in text_factors]
        self.seeds, self.chooser = range(options.seed, options.seed + options.num), chooser
        self.settings = [(s_t, s_i, seed) for s_i in self.rows for s_t in self.columns for seed in self.seeds]
        if chooser:
            self.settings = candidates(options.best, options.cfg_text, options.cfg_image, options.seed)
        self.results = []  # for each of the settings, an image after each instruction

    def record(self, model, callback):
        """Options of `InstructPix2Pix.edit` that note what the explain page shows."""
        from attention import fused
        from editing.record import Recorder

        self.recorder = recorder = Recorder(model, self.texts, [0], [0], self.options.steps)

        def step_done(*step):
            recorder.next_step(*step)
            if callback:
                callback(*step)

        return {"attend": recorder.watch(fused), "trace": recorder.trace, "callback": step_done}

    def write(self):
        """Write the results, and sheets of them."""
        from images import enlarge, grid, put_back

        options, edited, chosen = self.options, [stages[-1] for stages in self.results], {}
        if self.chooser:
            best = self.chooser.choose(self.before, edited)
            self.results, edited = [self.results[best]], [edited[best]]
            chosen = dict(zip(("cfg_text", "cfg_image", "seed"), self.settings[best], strict=True))
            say(f"of {options.best} the best is {', '.join(f'{name} {value:g}' for name, value in chosen.items())}")
            chosen |= {"best": None, "caption_before": None, "caption_after": None}  # repeated, it is one edit
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
        self.save(result, self.out, **chosen)
        if options.sheet or options.region:
            panels, labels = self.panels()
            self.save(grid(panels, len(panels), labels), self.out.with_name(f"{self.out.stem}_sheet.png"))
        if options.explain:
            from pages.explain import write_edit_page

            images = self.whole, self.before, self.results[0][0]
            write_edit_page(self.recorder, options.explain, self.texts[0], *images, self.repeated_by())
            print(options.explain)

    def panels(self):
        """What a sheet shows of this edit, images and their labels: the input, the region, the result of each text."""
        from images import enlarge, outside_dimmed

        images, labels = [self.before], ["input"]
        if self.mask:
            images.append(outside_dimmed(self.before, self.small_mask))
            labels.append(self.options.region or "mask")
        return [enlarge(image) for image in (*images, *self.results[0])], [*labels, *self.texts]

    def repeated_by(self, **changed):
        """The settings that repeat this edit."""
        settings = {**vars(self.options), "image": self.path, "instr": self.texts[0], **changed}
        return {name: value for name, value in settings.items() if name not in ("out", "again", "explain")}

    def save(self, image, path, **changed):
        """Write a PNG with the settings that repeat it, and print its path."""
        from images import save_png

        save_png(image, path, self.repeated_by(**changed))
        print(path)


def run(model, edits, options, callback=None):
    """Sample for edits of images of one size, `options.batch_size` at once; callback as in `InstructPix2Pix.edit`.

    Raises UserError if memory runs out.
    """
    from gpu.savings import Savings

    runs = [(edit, *settings) for edit in edits for settings in edit.settings]
    for start in range(0, len(runs), options.batch_size):
        batch, *scales, seeds = map(list, zip(*runs[start : start + options.batch_size], strict=True))
        images, masks, stages = [edit.whole for edit in batch], [edit.mask for edit in batch if edit.mask], []
        more = {name: getattr(options, name) for name in ("negative", "low_memory", "sampler", "schedule")}
        more |= {"savings": Savings.of(options), "callback": callback}
        if options.explain:
            more |= batch[0].record(model, callback)
        for texts in zip(*(edit.texts for edit in batch), strict=True):
            settings = *scales, options.steps, seeds, options.resolution
            with cli.memory_reported("try --low-memory, a smaller --resolution or --batch-size 1"):
                images = model.edit(images, list(texts), *settings, mask=masks or None, progress=True, **more)
            masks = [edit.small_mask for edit in batch if edit.mask]  # as large as these images
            stages.append(images)
        for edit, results in zip(batch, zip(*stages, strict=True), strict=True):
            edit.results.append(results)


def edit_one(model, options, image, out, callback):
    """Edit one image and write the results; callback as in `run`. Returns the `Edit`."""
    edit = Edit(options, image, [options.instr], out, model)
    run(model, [edit], options, callback)
    edit.write()
    return edit


def say(message):
    """Tell the user something, on stderr: stdout is for the paths of what was written."""
    print(f"sample.py: {' '.join(message.splitlines())}", file=sys.stderr)


def main(arguments=None):
    """Read the settings, load the model, edit, write."""
    options, jobs = parse(arguments)
    from editing.best import Chooser
    from images import grid, save_png, thumbnail

    options.weights = choose_weights(options, jobs)
    model, chooser = load_model(options), None
    if options.best:
        captions = [options.caption_before, options.caption_after] if options.caption_before else None
        chooser = Chooser(captions, options.clip or ("mini" if options.weights == "mini" else "clip"), options.device)
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
            edit = Edit(options, image, texts, out, model, chooser)
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
