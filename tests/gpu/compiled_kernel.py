"""Compile kernel.py for a GPU that is not there, with what `attend_values` itself passes to it.

A program of its own, since triton's interpreter must be off. Arguments: a number, such as 90 for sm_90, and cases
S,D,dtype. It prints a line of JSON for each case.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget

from gpu import kernel


class Driver:
    """As much of a GPU's driver as compiling asks for."""

    def __init__(self, architecture):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


def compiled(values, width, dtype):
    """The kernel for 77 queries and keys, of 2 * 8 heads."""
    made, run = [], kernel.attend_kernel.run
    kernel.attend_kernel.run = lambda *args, warmup, **settings: made.append(run(*args, warmup=True, **settings))
    q = torch.zeros(1, 2, 77, 8, width, dtype=dtype).transpose(2, 3)  # as split_heads makes it
    kernel.attend_values(q, q, q[:, None].expand(-1, values, -1, -1, -1, -1))
    kernel.attend_kernel.run = run
    return made[0]


def spilled(binary):
    """Bytes of a thread's sums that did not fit into registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver(int(sys.argv[1])))
    for case in sys.argv[2:]:
        values, width, dtype = case.split(",")
        made = compiled(int(values), int(width), getattr(torch, dtype))
        multiplies = sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|tf32", made.asm["ptx"])))
        facts = {"shared": made.metadata.shared, "spilled": spilled(made.asm["cubin"]), "multiplies": multiplies}
        print(json.dumps({"case": case, **facts}), flush=True)
