"""Fine-tune a language model on hand-written triplets, the paper's GPT-3 step on today's API (Sec. 3.1.1)."""

import json
import time

from cli import UserError, atomic_write

from openai import OpenAI, OpenAIError

from language.writer import RETRIES, chat, explain, need_key, read_examples

POLL = 10.0  # seconds between two requests for the job's state
ENDS = ("succeeded", "failed", "cancelled")
LEAST = 10  # examples: fewer are refused by the API


def finetune(options):
    """Check and convert the triplets, upload them, start the job, follow it, and print the model's name."""
    if options.job is None:
        examples = read_examples(options.examples)
        if len(examples) < LEAST:
            raise UserError(f"{options.examples} holds {len(examples)} triplets; at least {LEAST} are needed")
        write_chats(examples, options.out)
        print(f"{options.out}: {len(examples)} conversations")
        if options.dry_run:
            return
    need_key()
    client = OpenAI(max_retries=RETRIES)
    try:
        job = options.job or start(client, options.out, options.model, options.epochs)
        print(f"job {job} (to follow it again: --job {job})", flush=True)
        print(follow(client, job))
    except OpenAIError as error:
        raise UserError(explain(error)) from error


def write_chats(examples, path):
    """Triplets as the API's training file: {"messages": [...]}, a line each."""
    with atomic_write(path) as beside, open(beside, "w", encoding="utf-8") as file:
        for example in examples:
            print(json.dumps({"messages": chat([example])}, ensure_ascii=False), file=file)


def start(client, path, model, epochs):
    """Upload the training file and start a job; returns its id."""
    with open(path, "rb") as file:
        uploaded = client.files.create(file=file, purpose="fine-tune")
    supervised = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": epochs}}}
    return client.fine_tuning.jobs.create(model=model, training_file=uploaded.id, method=supervised).id


def follow(client, job):
    """Wait for a job's end, printing what state it is in; returns the model's name. Raises UserError if it fails."""
    shown = None
    while True:
        found = client.fine_tuning.jobs.retrieve(job)
        if found.status != shown:
            print(f"{job}: {found.status}", flush=True)
            shown = found.status
        if shown in ENDS:
            break
        time.sleep(POLL)
    if shown != "succeeded":
        reason = found.error.message if found.error and found.error.message else "no reason was given"
        raise UserError(f"the job {job} ended as {shown}: {reason}")
    return found.fine_tuned_model
