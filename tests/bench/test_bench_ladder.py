"""bench_ladder.py: all rungs appear, give the same numbers and count the right operations. Nothing is said of times."""

import functools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_bench import Here, same_environment  # noqa: F401, a fixture that runs by itself
from torch import nn

from attention import reference
from bench import __main__ as bench
from bench import ladder as bench_ladder
from bench import plot as bench_plot
from bench import sides as bench_sides
from bench.ladder import LABELS, Ladder, Rung
from bench.sides import Settings
from cli import UserError
from gpu import compiled
from unet import UNet

pytestmark = pytest.mark.usefixtures("one_thread")

ON_CPU = ["reference", "fused", "once", "compiled", "channels_last", "diffusers", "diffusers_compiled"]
SMALL = ["--only", "ladder", "--small", "--size", "64", "--runs", "2"]


@pytest.fixture
def in_process(monkeypatch):
    """No process is started, nothing is repeated, and what is compiled is traced but not translated."""

    class Process(Here):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(bench_ladder, "own_process", Process)
    monkeypatch.setattr(bench_sides, "SHORT", 1e-9)
    monkeypatch.setattr(compiled, "compiled", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # bench.py sets another, which goes after the test
    yield
    bench_sides.prepared.cache_clear()
    bench_ladder.prepared_rungs.cache_clear()
    torch.compiler.reset()


def empty(*shape):
    """A tensor that is a shape alone."""
    return torch.empty(shape, device="meta")


def table_of(text):
    """The ladder's table: {first cell: {column: cell}}."""
    lines = text[text.index("## The ladder") :].splitlines()
    header, _, *rows = [line for line in lines if line.startswith("|")]
    columns, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows))
    return {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rows}


def test_every_rung_of_a_cpu(in_process, tmp_path, capsys):
    plot = tmp_path / "ladder.png"
    bench.main([*SMALL, "--plot", str(plot)])
    captured = capsys.readouterr()
    rows = table_of(captured.out)
    assert list(rows) == [LABELS[name] for name in ON_CPU]
    number = r"[\d,]+(\.\d+)?(e-\d+)?"
    for cells in rows.values():
        assert re.fullmatch(f"{number} ms", cells["a step"])
        assert re.fullmatch(f"{number} s", cells["an edit"])
        assert re.fullmatch(f"{number} s", cells["first call"])
        assert re.fullmatch(number, cells["TFLOP/s"])
        assert re.fullmatch(r"\d+%", cells["of the ceiling"])
        assert re.fullmatch(r"\d+\.\d\d GB|unknown", cells["step memory"])
        for base in ("reference attention", "diffusers", "diffusers, compiled"):
            middle, low, high = map(float, re.findall(r"\d+\.\d{3}", cells[f"through {base}"]))
            assert 0 < low <= middle <= high
        assert 0 <= float(cells["difference"]) <= 1e-5
    for base in ("reference attention", "diffusers", "diffusers, compiled"):
        assert rows[base][f"through {base}"] == "**1.000** (1.000 to 1.000)"
    assert re.search(rf"^- the floor: {number} ms, for {number} TFLOP at the ceiling", captured.out, re.MULTILINE)
    assert "ours through theirs" not in captured.out  # that is about the other tables
    assert all(line.startswith("bench.py: ") for line in captured.err.splitlines())
    assert Image.open(plot).format == "PNG"


def test_the_rungs_that_were_asked_for_in_the_order_of_the_ladder(in_process, capsys):
    """And where diffusers is not among them, nothing is compared with it."""
    bench.main([*SMALL, "--rungs", "once,fused"])
    rows = table_of(capsys.readouterr().out)
    assert list(rows) == ["+ fused attention", "+ text and times once"]
    assert [column for column in rows["+ fused attention"] if "through" in column] == ["through + fused attention"]


def test_each_rung_is_what_it_says(in_process, monkeypatch):
    """Which attention runs, whether text and time are read at every step, what is compiled."""
    seen, fused = [], F.scaled_dot_product_attention

    def noted(name, function):
        return lambda *inputs, **settings: seen.append(name) or function(*inputs, **settings)

    monkeypatch.setattr("attention.reference", noted("reference", reference))
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", noted("fused", fused))
    for name in ("read", "embed_time"):
        monkeypatch.setattr(UNet, name, noted(name, getattr(UNet, name)))
    monkeypatch.setattr(compiled, "compiled", lambda function, **settings: noted(f"compiled {settings}", function))
    rungs = bench_ladder.prepared_rungs("ours", Settings("cpu", "float32", 64, True))

    def traits(name):
        seen.clear()
        rungs[name]()
        return set(seen)

    assert traits("reference") == {"reference", "read", "embed_time"}
    assert traits("fused") == {"fused", "read", "embed_time"}
    assert traits("once") == {"fused"}
    assert traits("compiled") == traits("channels_last") == {"fused", "compiled {'fullgraph': True}"}
    assert traits("graphs") == {"fused", "compiled {'fullgraph': True, 'mode': 'reduce-overhead'}"}


def test_channels_last_is_the_layout_of_convolutions_alone_and_takes_no_second_copy_of_the_rest():
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 2))
    turned = bench_ladder.in_channels_last(network)
    assert turned[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network[0].weight.is_contiguous()
    for ours, theirs in zip(network.parameters(), turned.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert (ours is theirs) == (ours.dim() != 4)


def test_the_rungs_of_diffusers_give_the_same_numbers(monkeypatch):
    """With their layout, but not compiled."""
    monkeypatch.setattr(compiled, "compiled", lambda function, **settings: function)
    settings = Settings("cpu", "float32", 64, True)
    network, configs, noise = bench_sides.made("diffusers", "unet", settings)
    with torch.no_grad():
        rungs = bench_ladder.their_rungs(network, *bench_sides.step_inputs(configs, noise, settings))
        outputs = {name: run().numpy() for name, run in rungs.items()}
    assert list(outputs) == ["diffusers", "diffusers_compiled", "diffusers_graphs"]
    for output in outputs.values():
        assert bench_sides.relative_error(output, outputs["diffusers"]) <= 1e-5


def test_a_rung_with_another_output_is_not_timed(in_process, monkeypatch):
    monkeypatch.setattr("attention.reference", lambda q, k, v, layer: v[:, :, :1] + 0 * q)
    monkeypatch.setattr(bench_ladder, "turn", None)
    message = r"\+ fused attention: the output differs by \d\.\de[+-]\d\d from that of reference attention; .*"
    with pytest.raises(UserError, match=message):
        bench.main(SMALL)


def test_what_cannot_be_compiled_is_said_in_a_line(in_process, monkeypatch):
    def refused(graph, inputs):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(compiled, "compiled", functools.partial(torch.compile, backend=refused))
    with pytest.raises(UserError, match=r"^the networks could not be compiled here \(.*\); try --no-compile$"):
        bench.main([*SMALL, "--rungs", "fused,compiled"])


@pytest.mark.parametrize(
    ("function", "operations"),
    [
        (lambda: F.linear(empty(2, 5, 16), empty(8, 16)), 2 * (2 * 5 * 16 * 8)),
        (lambda: F.conv2d(empty(2, 3, 16, 16), empty(8, 3, 3, 3), padding=1), 2 * (2 * 16 * 16 * 8 * 3 * 9)),
        (lambda: reference(*(empty(2, 4, 9, 8) for _ in range(3))), 2 * 2 * (2 * 4 * 9 * 9 * 8)),
    ],
)
def test_operations_as_counted_by_hand(function, operations):
    """An addition and a multiplication for every product."""
    assert bench_ladder.flops(function) == operations


def test_operations_of_a_step_are_those_of_the_network_at_work():
    settings = Settings("cpu", "float32", 64, True)
    network, configs, noise = bench_sides.made("ours", "unet", settings)
    z, t, context = bench_sides.step_inputs(configs, noise, settings)
    counted = bench_ladder.flops(lambda: network(z, t, context, reference))
    assert bench_ladder.step_flops(settings) == counted > 0


def test_the_numbers_of_the_table():
    """Two rounds at different speeds: the ratios are those within a round."""
    slow = Rung("reference", 5.0, 0.0, [(2.0, 3_000_000_000), (4.0, 2_000_000_000)])
    fast = Rung("graphs", 70.0, 1e-6, [(1.0, None), (1.0, None)])
    theirs = Rung("diffusers", 5.0, 1e-6, [(2.0, 10_000_000), (2.0, 10_000_000)])
    ladder = Ladder([slow, fast, theirs], {"ours": 10.0, "diffusers": 20.0}, 3 * 10**12, 6e12)
    rows = table_of("\n".join(bench_ladder.report(ladder)))
    assert list(rows["+ CUDA graphs"].values()) == [
        "1,000 ms",
        "110 s",  # 100 steps and what is beside them
        "**0.375** (0.250 to 0.500)",
        "**0.500** (0.500 to 0.500)",
        "unknown",
        "3",
        "50%",
        "70 s",
        "1.0e-06",
    ]
    assert rows["reference attention"]["a step"] == "3,000 ms"
    assert rows["reference attention"]["step memory"] == "3.00 GB"
    assert rows["diffusers"]["an edit"] == "220 s"


@pytest.mark.parametrize("milliseconds", [(0.004, 0.02), (61.0, 20.0), (12_000.0, 9_999.0)])
def test_the_plot_has_a_bar_a_rung_as_long_as_its_step(tmp_path, milliseconds):
    """And nothing is written beyond its edges."""
    names = ["reference", "diffusers"]
    rungs = [Rung(name, 1.0, 0.0, [(ms / 1e3, None)]) for name, ms in zip(names, milliseconds, strict=True)]
    floor = milliseconds[1] / 1e3  # as far to the right as its long words can get
    bench_plot.draw(Ladder(rungs, {}, 10**12, 1e12 / floor), "what, where", tmp_path / "plot.png")
    picture = Image.open(tmp_path / "plot.png").convert("RGB")
    pixels = np.array(picture)
    blue, orange = ((pixels == colour).all(axis=2).sum() for colour in ((31, 95, 174), (194, 87, 26)))
    assert blue / orange == pytest.approx(milliseconds[0] / milliseconds[1], rel=0.02)
    edges = pixels[:, :8], pixels[:, -8:], pixels[:8], pixels[-8:]
    assert all((edge == 255).all() for edge in edges)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "x.png"], "--rungs, --no-compile and --plot are about the ladder: add --only ladder"),
        (["--no-compile"], "--rungs, --no-compile and --plot are about the ladder: add --only ladder"),
        (
            ["--only", "ladder", "--rungs", "once,fast"],
            f"--rungs knows {', '.join(ON_CPU)} here, not 'fast'",
        ),
        (
            ["--only", "ladder", "--rungs", "compiled", "--no-compile"],
            "--rungs knows reference, fused, once, diffusers here, not 'compiled'",
        ),
        (["--only", "ladder", "--plot", "no/such/x.png"], "there is no folder no/such to write the plot to"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        bench.parse(arguments)


def test_what_is_measured_by_default():
    """The ladder only where it is asked for; CUDA graphs only on CUDA."""
    options, parts = bench.parse([])
    assert "ladder" not in parts
    assert options.rungs == ON_CPU
    assert bench.parse(["--only", "ladder", "--device", "cuda"])[0].rungs == list(LABELS)
    assert bench.parse(["--only", "ladder", "--no-compile"])[0].rungs == [*ON_CPU[:3], "diffusers"]
