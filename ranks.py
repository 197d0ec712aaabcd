"""Several processes that train one network: what torch.distributed does for them, and being told to stop.

torchrun starts them; each computes its rows of every batch, and their gradients meet in DistributedDataParallel.
Without torchrun there is one process, and nothing of this costs anything.
"""

import os
import signal
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cli import UserError, own_device

PATIENCE = timedelta(hours=2)  # the others wait while the first one saves, measures and draws samples


class Ranks:
    """This process among all of them."""

    def __init__(self, device):
        """Join the others that torchrun started. device: "cpu" or "cuda", of which each process has one of its own."""
        self.device = own_device(device)
        self.count, self.number = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.first = self.number == 0
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu:
            compute_alike()
        if self.count > 1:
            if on_gpu:
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)

    def share(self, network):
        """The network to compute with: its gradients become the mean over all processes."""
        return DistributedDataParallel(network, gradient_as_bucket_view=True) if self.count > 1 else network

    def sharing(self, network, last):
        """A context for one pass of a step: until the last one, gradients only add up within each process."""
        return nullcontext() if self.count == 1 or last else network.no_sync()

    def agree(self, loss, stop):
        """(the mean of all processes' losses, has any of them been asked to stop?)"""
        if self.count == 1:
            return loss.item(), stop
        both = torch.stack([loss.float(), torch.tensor(float(stop), device=loss.device)])
        dist.all_reduce(both)
        return both[0].item() / self.count, both[1].item() > 0

    def check_same(self, step):
        """Raise UserError unless all processes begin with the same step."""
        if self.count > 1:
            steps = torch.tensor([step, -step], device=self.device)
            dist.all_reduce(steps, op=dist.ReduceOp.MAX)
            if steps[0] != -steps[1]:
                raise UserError("the processes would go on from different states; --out should be a folder they share")

    def leave(self):
        """Part from the others."""
        if self.count > 1:
            dist.destroy_process_group()


def compute_alike():
    """Let a GPU compute the same bits every time, as CPUs do: a resumed run equals one that was never stopped."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read before the first matrix is multiplied
    torch.use_deterministic_algorithms(True)  # not `warn_only`, under which attention's way back stays as it is
    torch.utils.deterministic.fill_uninitialized_memory = False  # only of use to find bugs


class StopSignal:
    """SIGTERM and Ctrl-C, answered at the end of a step; a second one at once."""

    def __enter__(self):
        """From here on."""
        self.asked, self.number = False, signal.SIGTERM
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def ask(self, number, frame):
        """Note it; whoever asks again is answered as ever."""
        self.asked, self.number = True, number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def __exit__(self, *error):
        """As it was before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
