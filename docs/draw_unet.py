"""Draw the UNet as a diagram, docs/unet.svg, from what really runs: shapes are recorded in a forward pass.

    python docs/draw_unet.py
"""

import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cli import run_program  # noqa: E402

import torch  # noqa: E402

from clip_text import CLIP_L_TEXT  # noqa: E402
from unet import INSTRUCT_PIX2PIX, ResBlock, Transformer, UNet  # noqa: E402

OUT = ROOT / "docs" / "unet.svg"
WIDTH, LEFT, RIGHT, TOP = 1000, 24, 976, 118  # of the diagram; its margins, and where the levels begin
ROW, INDENT, HEIGHT = 92, 14, 46  # from one level to the next, down and inwards; of a block
BLOCK = {ResBlock: 86, Transformer: 56}  # widths
NAMES = {ResBlock: "Res", Transformer: "Attn"}
STYLE = """
text { font-family: -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px; fill: #1f2328 }
.page { fill: #ffffff }
.head { font-size: 17px; font-weight: 600 }
.name { font-weight: 600 }
.note, .small { fill: #59636e } .small { font-size: 11.5px }
.code { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 12.5px; fill: #0550ae }
.box { fill: #f6f8fa; stroke: #8c959f }
.ResBlock { fill: #ddf4ff; stroke: #0969da }
.Transformer { fill: #fff8c5; stroke: #9a6700 }
.arrow { stroke: #59636e; stroke-width: 1.6; fill: none; marker-end: url(#tip) }
.skip { stroke-dasharray: 5 4 }
.tip { fill: #59636e }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .page { fill: #0d1117 } .note, .small { fill: #9da7b3 } .code { fill: #79c0ff }
.box { fill: #161b22; stroke: #6e7681 } .ResBlock { fill: #0c2d4d; stroke: #388bfd }
.Transformer { fill: #3b2a0a; stroke: #bb8009 } .tip { fill: #9da7b3 } .arrow { stroke: #9da7b3 }
}
"""


def trace(config, side):
    """Run a UNet without memory on latents of side x side: {"down.0" and so on: its blocks, as (block, in, out)}.

    in and out are shapes [C, H, W]; "conv_in" and "conv_out" hold one entry each, the convolution.
    """
    with torch.device("meta"):
        unet, z = UNet(config), torch.empty(1, config.in_channels, side, side)
        t, context = torch.empty(1), torch.empty(1, CLIP_L_TEXT.tokens, config.context_width)
    stages = {}

    def note(name):
        def hook(block, inputs, output):
            stages.setdefault(name, []).append((block, *(tuple(x.shape[1:]) for x in (inputs[0], output))))

        return hook

    for name, block in unet.named_modules():
        if isinstance(block, ResBlock | Transformer) or name in ("conv_in", "conv_out"):
            stage = name.split(".")[: 1 if name.startswith(("middle", "conv")) else 2]
            block.register_forward_hook(note(".".join(stage)))
    unet(z, t, context)
    return stages


def text(x, y, words, kind="note", anchor="middle"):
    """A line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x, y, width, kind, *lines):
    """A box with one or two lines; the first stands out."""
    middle, first = x + width / 2, y + HEIGHT / 2 + (5 if len(lines) == 1 else -4)
    kinds = ("name", "small")
    words = (text(middle, first + 17 * i, line, kinds[i]) for i, line in enumerate(lines))
    return "\n".join([f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width}" height="{HEIGHT}" rx="6"/>', *words])


def arrow(*points, kind=""):
    """An arrow through points (x, y)."""
    return f'<path class="arrow {kind}" d="M{"L".join(f"{x:g} {y:g}" for x, y in points)}"/>'


def stage_width(blocks):
    """The width of a row of blocks."""
    return sum(BLOCK[type(block)] + 4 for block, *_ in blocks) - 4


def draw_stage(blocks, x, y):
    """A row of blocks from x on, in the order in which they run."""
    parts = []
    for block, before, after in blocks:
        line = f"{before[0]} → {after[0]}" if isinstance(block, ResBlock) else f"{block.self_attention.heads} heads"
        parts.append(box(x, y, BLOCK[type(block)], type(block).__name__, NAMES[type(block)], line))
        x += BLOCK[type(block)] + 4
    return parts


def draw_levels(stages, levels, widest):
    """The levels, from the largest to the smallest, way down and way up, and the arrows between them."""
    parts = []
    for level in range(levels):
        down, up, y = stages[f"down.{level}"], stages[f"up.{levels - 1 - level}"], TOP + ROW * level
        x_down, x_up = LEFT + INDENT * level, RIGHT - INDENT * level - widest
        end, (channels, height, width) = x_down + stage_width(down), down[-1][2]
        skips = sum(isinstance(block, ResBlock) for block, *_ in up)
        middle = (end + x_up) / 2
        parts += [*draw_stage(down, x_down, y), *draw_stage(up, x_up, y)]
        parts.append(arrow((end + 4, y + HEIGHT / 2), (x_up - 4, y + HEIGHT / 2), kind="skip"))
        parts.append(text(middle, y + HEIGHT / 2 - 7, f"{channels} x {height} x {width}", "name"))
        parts.append(text(middle, y + HEIGHT / 2 + 18, f"{skips} skip connections", "small"))
        if level < levels - 1:
            above, below, x_next = y + HEIGHT + 4, y + ROW - 4, x_down + INDENT + 40
            parts.append(arrow((end - 20, above), (end - 20, above + 14), (x_next, above + 14), (x_next, below)))
            parts.append(text(x_next + 10, below - 6, "half the size", "small", "start"))
            last = x_up - INDENT + stage_width(stages[f"up.{levels - 2 - level}"]) - 20
            parts.append(arrow((last, below), (last, below - 14), (x_up + 40, below - 14), (x_up + 40, above)))
            parts.append(text(x_up + 50, above + 15, "twice the size", "small", "start"))
    return parts


def draw_middle(stages, levels, widest):
    """The middle, below the smallest level."""
    blocks, y, indent = stages["middle"], TOP + ROW * levels, INDENT * (levels - 1)
    x, half, above = (WIDTH - stage_width(blocks)) / 2 - INDENT, y + HEIGHT / 2, y - ROW + HEIGHT + 4
    begin = LEFT + indent + stage_width(stages[f"down.{levels - 1}"]) - 20
    end, last = x + stage_width(blocks) + 4, RIGHT - indent - widest + 40
    parts = [*draw_stage(blocks, x, y), text(x + stage_width(blocks) / 2, y + HEIGHT + 18, "middle", "small")]
    parts.append(arrow((begin, above), (begin, half), (x - 4, half)))
    return [*parts, arrow((end, half), (end + 14, half), (end + 14, y - 18), (last, y - 18), (last, above))]


def draw_ends(stages):
    """What goes in, and what comes out."""
    (_, z, first), (_, last, eps) = stages["conv_in"][0], stages["conv_out"][0]
    inputs = f"noisy latent, {z[0] // 2} channels, and the input image's, {z[0] // 2}"
    return [
        text(LEFT, 72, inputs, anchor="start"), text(LEFT, 90, f"convolution {z[0]} → {first[0]}", "name", "start"),
        arrow((LEFT + 40, 96), (LEFT + 40, TOP - 4)), arrow((RIGHT - 40, TOP - 4), (RIGHT - 40, 96)),
        text(RIGHT, 72, f"the noise in it: eps, {eps[0]} channels", anchor="end"),
        text(RIGHT, 90, f"convolution {last[0]} → {eps[0]}", "name", "end"),
    ]  # fmt: skip


def draw_legend(config, y):
    """What the blocks are."""
    context = f"{CLIP_L_TEXT.tokens} tokens of width {config.context_width}"
    legend = {
        ResBlock: "two convolutions, and the time t between them (channels in → out; on the way up with a skip's)",
        Transformer: f"self-attention over all places, cross-attention to the text ({context}), a feed-forward layer",
    }
    for kind, words in legend.items():
        yield f'<rect class="{kind.__name__}" x="{LEFT}" y="{y}" width="44" height="22" rx="5"/>'
        yield text(LEFT + 22, y + 16, NAMES[kind], "name")
        yield text(LEFT + 56, y + 16, f"{kind.__name__}: {words}", anchor="start")
        y += 30


def draw(config, side):
    """The diagram as SVG."""
    stages, levels = trace(config, side), len(config.levels)
    widest = max(stage_width(stages[f"up.{level}"]) for level in range(levels))
    bottom = TOP + ROW * levels + HEIGHT + 44
    size = f'width="{WIDTH}" height="{bottom + 70}"'
    parts = [text(LEFT, 34, f"The UNet, for a {8 * side}x{8 * side} image", "head", "start")]
    parts += [text(RIGHT, 34, "unet.UNet.forward", "code", "end"), *draw_ends(stages)]
    parts += [*draw_levels(stages, levels, widest), *draw_middle(stages, levels, widest), *draw_legend(config, bottom)]
    lines = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} {bottom + 70}" role="img"
  aria-labelledby="t">
<title id="t">The UNet of InstructPix2Pix: {levels} levels, down, middle and up, with skip connections</title>
<style>{STYLE}</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>
<rect class="page" {size} rx="8"/>
{lines}
</svg>
"""


def main():
    """Write the diagram."""
    OUT.write_text(draw(INSTRUCT_PIX2PIX, 64), encoding="utf-8")
    print(OUT.relative_to(ROOT))


if __name__ == "__main__":
    run_program(main)
