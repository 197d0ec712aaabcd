"""Fig. 9: the edits of all methods side by side, of a user's image or of chosen edits."""

from functools import partial
from pathlib import Path

from cli import UserError

from images import enlarge, grid, open_image, save_png
from section4.edits import Case, find_cases
from section4.lab import Lab, add_models
from section4.methods import METHODS

COLUMNS = "sdedit", "sdedit-instruction", "text2live", "p2p-null", "ip2p"  # in the paper's order


def add_flags(parser):
    """The flags of `evaluate.py compare`."""
    add_models(parser, 7, batch_size=1)
    add, known = parser.add_argument, f"of {', '.join(METHODS)} (default: those of Fig. 9)"
    add("--methods", nargs="+", choices=METHODS, default=COLUMNS, metavar="NAME", help=known)
    add("--image", type=Path, metavar="FILE", help="an image to edit, in place of --edits; needs --instr")
    add("--instr", metavar="TEXT", help="what to change in it")
    add("--caption-before", default="", metavar="TEXT", help="what the image shows, for methods that need it")
    add("--caption-after", default="", metavar="TEXT", help="what it should show then")


def run(options):
    """Write compare.png, a row for each edit, and every image in compare/."""
    cases = own_case(options) if options.image else find_cases(options, options.count)
    lab, columns = Lab(options), ["input", *(METHODS[name].name for name in options.methods)]
    columns += ["true image"] * bool(cases[0].images(lab.side)[1])
    jobs = {name: partial(METHODS[name].edit, lab, METHODS[name].usual) for name in options.methods}
    shown, labels = [], []
    for number, paths in enumerate(lab.edited(cases, jobs)):
        before, after = cases[number].images(lab.side)
        shown += [before, *map(open_image, paths), *([after] if after else [])]
        labels += [cases[number].instruction, *[""] * (len(columns) - 1)]
    sheet = grid([enlarge(image, 192) for image in shown], len(columns), labels, columns)
    save_png(sheet, lab.out / "compare.png")
    print(f"{lab.out / 'compare.png'}: {len(cases)} edits by {len(options.methods)} methods")


def own_case(options):
    """The case of --image. Raises UserError."""
    if not options.instr:
        raise UserError('say what to change in the image: --instr "make it night"')
    image, captions = open_image(options.image), (options.caption_before, options.caption_after)
    return [Case(options.instr, captions, options.seed, lambda: (image, None))]
