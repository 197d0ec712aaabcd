"""Fine-tune a language model on hand-written triplets, the paper's GPT-3 step on today's API (Sec. 3.1.1)."""

import json
import time

from cli import UserError, atomic_write, reported_as

from openai import OpenAI

from language.captions import read_edits
from language.endpoint import connect, reported
from language.writer import chat

POLL = 10.0  # seconds between two requests for the job's state


def finetune(options):
    """Convert the triplets to the API's training file, upload it, start the job, follow it, print the model's name."""
    if options.job is None:
        examples = read_edits(options.examples)
        with atomic_write(options.out) as beside, open(beside, "w", encoding="utf-8") as file:
            for example in examples:
                print(json.dumps({"messages": chat([example])}, ensure_ascii=False), file=file)
        print(f"{options.out}: {len(examples)} conversations")
        if options.dry_run:
            return
    with reported(), reported_as("the endpoint offers no fine-tuning", (AttributeError, ValueError)):
        client, job = connect(OpenAI), options.job
        if job is None:
            uploaded = client.files.create(file=options.out, purpose="fine-tune")
            method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": options.epochs}}}
            job = client.fine_tuning.jobs.create(model=options.model, training_file=uploaded.id, method=method).id
        if not job:
            raise ValueError("it named no job")
        follow(client, job)


def follow(client, job):
    """Print each new state of a job, and at last the name of the model. Raises UserError where the job failed."""
    print(f"job {job}", flush=True)
    status = None
    try:
        while status not in ("succeeded", "failed", "cancelled"):
            found = client.fine_tuning.jobs.retrieve(job)
            if found.status == status:
                time.sleep(POLL)
            else:
                status = found.status
                print(f"{job}: {status}", flush=True)
    except BaseException:  # Ctrl-C as well
        print(f"\nthe job goes on; to follow it again: python datagen.py finetune --job {job}", flush=True)
        raise
    if status != "succeeded":
        reason = (found.error and found.error.message) or "no reason given"
        raise UserError(f"the job {job} ended as {status}: {reason}")
    print(found.fine_tuned_model)
