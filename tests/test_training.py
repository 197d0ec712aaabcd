"""The training loop: it learns, it can be stopped at any step, and it says what went wrong."""

import copy
import itertools
import json
import multiprocessing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cli import UserError
from training import WORKERS, Crew, Plan, fast_training, fit, follow, random_at

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = Plan(steps=40, batch=16, lr=0.02, warmup=5)
TARGET = torch.tensor([1.0, -2.0, 0.5])


class StoppedError(Exception):
    """As if someone pressed Ctrl-C."""


def toy(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))


def regression(network, stop_at=None, seen=None):
    """loss_of for the line y = TARGET x; it raises StoppedError at a step, and notes the steps it saw."""

    def loss_of(step, generator, batch):
        if step == stop_at:
            raise StoppedError
        if seen is not None:
            seen.append(step)
        x = torch.randn(batch, 3, generator=generator)
        return (network(x).float()[:, 0] - x @ TARGET).square().mean()

    return loss_of


def equal(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; `clock.forward(loss_of)` makes it show two seconds more after each step."""
    shown = SimpleNamespace(seconds=0)

    def forward(loss_of):
        def slow(step, generator, batch):
            shown.seconds += 2
            return loss_of(step, generator, batch)

        return slow

    monkeypatch.setattr("training.time.monotonic", lambda: shown.seconds)
    return SimpleNamespace(forward=forward)


def test_it_learns(tmp_path):
    network, plan = toy(), replace(PLAN, steps=400)
    average = fit(network, regression(network), plan, tmp_path / "toy")
    x = torch.randn(500, 3, generator=random_at(99, 0))
    y = x @ TARGET
    for learnt in (network, average):
        assert (learnt(x)[:, 0] - y).square().mean() < 0.1 * y.square().mean()
    assert not average.training
    assert not any(weight.requires_grad for weight in average.parameters())
    assert not equal(network, average)
    assert log_of(tmp_path / "toy")[-1]["loss"] > 0


@pytest.mark.parametrize("stop_at", [1, 17, 39])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path, stop_at):
    whole = toy()
    whole_average = fit(whole, regression(whole), PLAN, tmp_path / "whole")

    network = toy()
    with pytest.raises(StoppedError):
        fit(network, regression(network, stop_at=stop_at), PLAN, tmp_path / "parts", save_every=0)
    resumed, seen = toy(seed=5), []
    average = fit(resumed, regression(resumed, seen=seen), PLAN, tmp_path / "parts", save_every=0)
    assert seen == list(range(stop_at, 40))
    assert equal(resumed, whole)
    assert equal(average, whole_average)
    assert not equal(network, whole)


def test_a_finished_run_is_not_trained_again(tmp_path):
    network, again, seen = toy(), toy(seed=5), []
    average = fit(network, regression(network), PLAN, tmp_path / "toy")
    average_again = fit(again, regression(again, seen=seen), PLAN, tmp_path / "toy")
    assert seen == []
    assert equal(again, network)
    assert equal(average_again, average)


def test_the_state_is_saved_now_and_then(tmp_path, clock):
    """The first step that ends more than ten seconds after the last saving is the sixth."""
    network, saved = toy(), []
    state = tmp_path / "toy" / "state.pt"

    def loss_of(step, generator, batch):
        saved.append(torch.load(state)["step"] if state.exists() else None)
        return regression(network)(step, generator, batch)

    fit(network, clock.forward(loss_of), replace(PLAN, steps=14), tmp_path / "toy", save_every=10)
    assert saved == [None] * 6 + [6] * 6 + [12] * 2
    assert torch.load(state)["step"] == 14
    assert [path.name for path in (tmp_path / "toy").iterdir() if path.name.startswith(".")] == []


def test_the_log(tmp_path, clock):
    """A JSON object a line, about every five seconds and at the end; losses are means since the line before.

    The minutes are those of the whole run, without the time between its parts.
    """
    network = nn.Linear(1, 1)

    def loss_of(step, generator, batch):
        return network.weight.sum() * 0 + step

    fit(network, clock.forward(loss_of), Plan(steps=8, batch=4, lr=0.0), tmp_path / "toy")
    lines = [(3, (0 + 1 + 2) / 3), (6, (3 + 4 + 5) / 3), (8, (6 + 7) / 2)]
    fit(network, clock.forward(loss_of), Plan(steps=11, batch=4, lr=0.0), tmp_path / "toy")
    lines.append((11, (8 + 9 + 10) / 3))
    told = [{"step": step, "loss": loss, "per_s": 2.0, "minutes": step * 2 / 60} for step, loss in lines]
    assert log_of(tmp_path / "toy") == [pytest.approx(line) for line in told]


def test_show_comes_ten_times(tmp_path):
    network, shown = toy(), []
    average = fit(
        network, regression(network), PLAN, tmp_path / "toy", show=lambda average, step: shown.append((step, average))
    )
    assert [step for step, _ in shown] == list(range(4, 41, 4))
    assert all(given is average for _, given in shown)


# ---- the learning rate, the average, the chance ----


def test_the_learning_rate_rises_stays_and_falls():
    plan = Plan(steps=1000, batch=1, lr=0.5, warmup=100, decay=0.25)
    rates = [plan.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[49] == pytest.approx(0.5)
    assert set(rates[99:751]) == {1.0}
    assert rates[875] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.01)
    assert all(a < b for a, b in zip(rates[:99], rates[1:100], strict=True))
    assert all(a > b for a, b in zip(rates[750:997], rates[751:998], strict=True))
    assert min(rates) == pytest.approx(0.01)
    assert Plan(steps=1, batch=1, lr=1.0).rate(0) == pytest.approx(0.01)


def test_fit_keeps_to_it(tmp_path):
    """Under a constant gradient Adam moves a weight by the learning rate, neither more nor less."""
    network, weights = nn.Linear(1, 1, bias=False), []
    plan = Plan(steps=30, batch=1, lr=0.01, warmup=10, weight_decay=0.0)

    def loss_of(step, generator, batch):
        weights.append(network.weight.item())
        return network.weight.sum()

    fit(network, loss_of, plan, tmp_path / "toy")
    moves = -torch.tensor([*weights, network.weight.item()]).diff()
    rates = torch.tensor([0.01 * plan.rate(step) for step in range(30)])
    torch.testing.assert_close(moves, rates, rtol=1e-3, atol=1e-6)


def test_the_moving_average():
    average, network = toy(1), toy(2)
    expected = [0.9 * a + 0.1 * b for a, b in zip(average.parameters(), network.parameters(), strict=True)]
    before = copy.deepcopy(network)
    follow(average, network, 0.9)
    torch.testing.assert_close(list(average.parameters()), expected)
    assert equal(network, before)
    follow(average, network, 0.0)
    assert equal(average, network)


def test_the_average_follows_fast_at_first(tmp_path):
    """Its decay is (n + 1) / (n + 10) after n steps, and at most the plan's."""
    network, weights = toy(), []

    def loss_of(step, generator, batch):
        weights.append(copy.deepcopy(network))
        return regression(network)(step, generator, batch)

    average = fit(network, loss_of, replace(PLAN, ema=0.7), tmp_path / "toy")
    weights.append(network)
    expected = weights[0]
    for step, after in enumerate(weights[1:]):
        decay = min(0.7, (step + 1) / (step + 10))
        with torch.no_grad():
            for ours, new in zip(expected.parameters(), after.parameters(), strict=True):
                ours.copy_(decay * ours + (1 - decay) * new)
    torch.testing.assert_close(list(average.parameters()), list(expected.parameters()), rtol=1e-5, atol=1e-6)


def test_steps_seeds_and_workers_have_their_own_chance():
    keys = list(itertools.product(range(3), (0, 1, 7, 100_000), (0, 1, 3)))
    draws, again = ([tuple(torch.rand(4, generator=random_at(*key)).tolist()) for key in keys] for _ in range(2))
    assert draws == again
    assert len(set(draws)) == len(keys) == 36
    assert torch.equal(torch.rand(4, generator=random_at(1, 7)), torch.rand(4, generator=random_at(1, 7, 0)))


def test_fast_training_is_close_to_exact():
    """Attention and its gradient, in whatever number format the machine has for training."""
    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=random_at(0, 0)).requires_grad_()
    exact = nn.functional.scaled_dot_product_attention(q, k, v)
    (expected,) = torch.autograd.grad(exact.square().sum(), q)
    with fast_training("cpu"):
        fast = nn.functional.scaled_dot_product_attention(q, k, v)
        (gradient,) = torch.autograd.grad(fast.float().square().sum(), q)
    assert (fast - exact).norm() < 0.02 * exact.norm()
    assert (gradient - expected).norm() < 0.05 * expected.norm()
    assert not torch.is_autocast_enabled("cpu")


# ---- several processes ----


@pytest.fixture
def two_processes(one_thread):
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_two_processes_share_a_batch(tmp_path, two_processes):
    """Each takes one half, with its own random numbers; the gradient is the mean of theirs."""
    network, seen = toy(), []
    average = fit(network, regression(network, seen=seen), replace(PLAN, steps=12), tmp_path / "two")
    assert seen == list(range(12))  # by the first process; what the other one saw stayed there
    assert torch.get_num_threads() == 2
    assert not multiprocessing.active_children()

    torch.set_num_threads(1)
    alone = toy()

    def both_parts(step, generator, batch):
        parts = [regression(alone)(step, random_at(PLAN.seed, step, worker), batch // 2) for worker in (0, 1)]
        return sum(parts) / 2

    average_alone = fit(alone, both_parts, replace(PLAN, steps=12), tmp_path / "one")
    torch.testing.assert_close(list(network.parameters()), list(alone.parameters()), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(list(average.parameters()), list(average_alone.parameters()), rtol=1e-3, atol=1e-4)
    assert log_of(tmp_path / "two")[-1]["loss"] == pytest.approx(log_of(tmp_path / "one")[-1]["loss"], rel=1e-3)

    fit(single := toy(), regression(single), replace(PLAN, steps=12), tmp_path / "single")
    assert (single[0].weight - network[0].weight).abs().max() > 1e-3


def test_two_processes_can_be_stopped(tmp_path, two_processes):
    whole = toy()
    average = fit(whole, regression(whole), PLAN, tmp_path / "whole")
    network = toy()
    with pytest.raises((StoppedError, RuntimeError)):
        fit(network, regression(network, stop_at=11), PLAN, tmp_path / "parts", save_every=0)
    assert not multiprocessing.active_children()
    resumed = toy(seed=5)
    average_resumed = fit(resumed, regression(resumed), PLAN, tmp_path / "parts")
    assert equal(resumed, whole)
    assert equal(average_resumed, average)


def test_a_process_that_dies_ends_the_run(tmp_path, two_processes):
    network, first = toy(), multiprocessing.current_process().pid

    def loss_of(step, generator, batch):
        if step == 3 and multiprocessing.current_process().pid != first:
            raise StoppedError
        return regression(network)(step, generator, batch)

    with pytest.raises(RuntimeError, match="a process that computes gradients has died"):
        fit(network, loss_of, PLAN, tmp_path / "toy")
    assert not multiprocessing.active_children()
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("batch", "count"), [(16, 2), (5, 1), (1, 1)])
def test_a_batch_is_split_only_into_equal_parts(tmp_path, two_processes, batch, count):
    network, sizes = toy(), []

    def loss_of(step, generator, part):
        sizes.append(part)
        return regression(network)(step, generator, part)

    fit(network, loss_of, replace(PLAN, batch=batch, steps=2), tmp_path / "toy")
    assert sizes == [batch // count] * 2


def test_a_machine_of_many_cores_is_not_all_used(monkeypatch):
    """Each process draws from a stream of its own, and there are so many streams a step."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 128)
    network = toy()
    assert Crew(network, regression(network), replace(PLAN, batch=256), 0, "cpu").count == WORKERS
    assert random_at(0, 0, WORKERS - 1).initial_seed() < random_at(0, 1).initial_seed()


def test_the_gradient_is_the_mean_over_both_processes(two_processes):
    """Adam would hide a wrong factor."""
    network, other = toy(), toy()
    with Crew(network, regression(network), replace(PLAN, steps=1), 0, "cpu") as crew:
        loss = crew.backward(0)
    with fast_training("cpu"):
        parts = [regression(other)(0, random_at(PLAN.seed, 0, worker), 8) for worker in (0, 1)]
        (sum(parts) / 2).backward()
    assert loss.item() == pytest.approx(sum(parts).item() / 2, rel=1e-4)
    for ours, expected in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=2e-2, atol=1e-3)


# ---- what goes wrong ----


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run(tmp_path, bad):
    network = toy()

    def loss_of(step, generator, batch):
        return regression(network)(step, generator, batch) * (bad if step == 5 else 1)

    with pytest.raises(UserError, match=f"the loss of toy is {bad} at step 6; lower the learning rate"):
        fit(network, loss_of, replace(PLAN, steps=6), tmp_path / "toy")
    assert not (tmp_path / "toy" / "state.pt").exists()


def test_a_state_is_never_saved_from_a_loss_that_is_no_number(tmp_path):
    """Else every later run would go on from it."""
    network, steps = toy(), []

    def loss_of(step, generator, batch):
        steps.append(step)
        return regression(network)(step, generator, batch) * (float("nan") if step >= 2 else 1)

    with pytest.raises(UserError, match="nan"):
        fit(network, loss_of, replace(PLAN, steps=9), tmp_path / "toy", save_every=0)
    state = torch.load(tmp_path / "toy" / "state.pt")
    assert state["step"] == 2
    assert all(weight.isfinite().all() for weight in state["network"].values())
    assert steps[-1] == 2


def spoil(kind, state):
    """Damage a state in one of the ways that happen."""
    whole = state.read_bytes()
    if kind == "cut short":
        state.write_bytes(whole[: len(whole) // 2])
    elif kind == "empty":
        state.write_bytes(b"")
    elif kind == "text":
        state.write_text("hello")
    else:
        torch.save({"network": {}}, state)


@pytest.mark.parametrize("kind", ["cut short", "empty", "text", "another file"])
def test_a_damaged_state_is_refused(tmp_path, kind):
    network = toy()
    fit(network, regression(network), replace(PLAN, steps=2), tmp_path / "toy")
    spoil(kind, tmp_path / "toy" / "state.pt")
    with pytest.raises(UserError, match=r"state.pt is damaged, or of another run \(.+\); remove its folder"):
        fit(network, regression(network), PLAN, tmp_path / "toy")


def test_the_state_of_another_network_is_refused(tmp_path):
    network = toy()
    fit(network, regression(network), replace(PLAN, steps=2), tmp_path / "toy")
    other = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    with pytest.raises(UserError, match=r"state.pt is damaged, or of another run \(.*size mismatch"):
        fit(other, regression(other), PLAN, tmp_path / "toy")
