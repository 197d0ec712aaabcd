"""Fine-tune a text-to-image model into an editor on pairs of pictures with instructions (Sec. 3.2).

    python train.py --preset mini --data runs/mini/pairs --init models/mini/sd --out runs/editor
    python train.py --preset mini --data runs/mini/pairs --init models/mini/sd --out runs/one --overfit 1 --steps 300
    torchrun --nproc-per-node 8 train.py --preset paper --data DIR --init SD_1.5 --out runs/paper
    python train.py export --run runs/paper --out editor.safetensors

The UNet gets input channels for the picture to edit, their weights zero; autoencoder and text encoder stay as they are.
What a step sees and draws by chance follows from the seed and the step: a run may be stopped, gone on with by --resume,
and spread over another number of processes without a change to what it learns. In --out: states to resume from,
metrics.jsonl, loss.png, samples.png, and in the end the editor, as the folder `model`.
"""

import os
import sys

import torch

from cli import make_folder, run_program
from editor_training import Training
from export import export, replace_model
from plan import print_plan
from presets import parse, parse_export
from progress import Progress
from ranks import Ranks, StopSignal


def train(options):
    """Train, and write the editor as a model folder."""
    ranks = Ranks(options.device)
    run = Training(options, ranks)
    if ranks.first:
        make_folder(options.out)
    run.read_data()
    progress = Progress(options.out, options.steps, run.start, run.seconds, options.total, ranks.first)
    done, stopped = run.start, False
    with StopSignal() as signal, progress:
        while done < options.steps and not stopped:
            loss, stopped = ranks.agree(run.backward(done), signal.asked)
            run.watch(done, loss)
            run.update(done)
            done += 1
            progress.step(done, loss)
            if not ranks.first:
                continue
            last = done == options.steps
            if stopped or last or done % options.save_every == 0:
                with progress.beside():
                    run.save(done, progress.seconds)
            if last or done % options.look_every == 0:
                with progress.beside():
                    validation = run.look()
                progress.note(done, validation=round(validation, 6))
                progress.draw()
        if stopped:
            progress.note(done)
    ranks.leave()
    if done < options.steps:
        if ranks.first:
            print(f"stopped at step {done}; the same command with --resume goes on")
        sys.exit(128 + signal.number)
    if ranks.first:
        if gaps := int(run.pairs.broken.sum()):
            print(f"{gaps} pairs are missing or damaged and were left out")
        run.average.put(run.average.values)
        replace_model(run.model, options.out / "model")
        print(options.out / "model")


def main(arguments=None):
    """Check the settings, and train or export."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["export"]:
        export(parse_export(arguments[1:]))
        return
    options = parse(arguments, processes=int(os.environ.get("WORLD_SIZE", 1)))
    if options.plan:
        print_plan(options)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    train(options)


if __name__ == "__main__":
    run_program(main)
