"""Fine-tune a text-to-image model into an editor on pairs of pictures with instructions (Sec. 3.2).

    python train.py --preset mini --data runs/mini/pairs --init models/mini/sd --out runs/editor
    python train.py --preset mini --data runs/mini/pairs --init models/mini/sd --out runs/one --overfit 1 --steps 300
    torchrun --nproc-per-node 8 train.py --preset paper --data DIR --init SD_1.5 --out runs/paper
    python train.py export --run runs/paper --out editor.safetensors

The UNet gets input channels for the picture to edit, their weights zero; autoencoder and text encoder stay as they are.
A step's examples and random numbers follow from (seed, step): a run may be stopped, gone on with by --resume, and
spread over another number of processes without a change to what it learns. In --out: states to resume from,
metrics.jsonl, loss.png, samples.png, and in the end the editor, as the folder `model`.
"""

import math
import os
import sys

import torch

from editor_training import Training
from errors import UserError, run_program
from export import export, write_model
from presets import parse, parse_export
from progress import Progress
from ranks import Ranks, StopSignal
from report import make_folder
from states import state_paths

MEAN_OF, TOO_MUCH = 50, 5  # the mean loss of so many steps, so many times the lowest so far: training has gone astray


def train(options):
    """Train, and write the editor as a model folder."""
    ranks = Ranks(options.device)
    run = Training(options, ranks)
    if ranks.first:
        make_folder(options.out)
    run.read_data()
    progress = Progress(options.out, options.steps, run.start, run.seconds, options.total, ranks.first)
    done, stopped, losses, lowest = run.start, False, [], math.inf
    with StopSignal() as signal, progress:
        while done < options.steps and not stopped:
            loss, stopped = ranks.agree(run.backward(done), signal.asked)
            losses, lowest = watch(options.out, done, [*losses, loss], lowest)
            run.update(done)
            done += 1
            progress.step(done, loss)
            if ranks.first and (stopped or done % options.save_every == 0 or done == options.steps):
                run.save(done, progress.seconds)
            if ranks.first and not stopped and (done % options.look_every == 0 or done == options.steps):
                progress.note(done, validation=round(run.look(), 6))
                progress.draw()
    ranks.leave()
    if done < options.steps:
        print(f"stopped at step {done}; the same command with --resume goes on")
        sys.exit(128 + signal.number)
    if ranks.first:
        run.average.put(run.average.values)
        write_model(run.model, options, options.out / "model")
        print(options.out / "model")


def watch(out, step, losses, lowest):
    """(the last losses, the lowest mean of so many). Raises UserError where the loss is no number or explodes."""
    losses = losses[-MEAN_OF:]
    mean = sum(losses) / MEAN_OF if len(losses) == MEAN_OF else lowest
    if math.isfinite(losses[-1]) and not mean > TOO_MUCH * lowest:
        return losses, min(lowest, mean)
    states = [path.name for path in state_paths(out)]
    kept = f"the last good state is {states[-1]}: go on from it with --resume and a" if states else "try a"
    what = f"has grown to {TOO_MUCH} times what it was" if math.isfinite(losses[-1]) else f"is {losses[-1]}"
    raise UserError(f"the loss {what} at step {step + 1}; {kept} lower --lr")


def main(arguments=None):
    """Check the settings, and train or export."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["export"]:
        export(parse_export(arguments[1:]))
        return
    options = parse(arguments, processes=int(os.environ.get("WORLD_SIZE", 1)))
    if options.threads:
        torch.set_num_threads(options.threads)
    train(options)


if __name__ == "__main__":
    run_program(main)
