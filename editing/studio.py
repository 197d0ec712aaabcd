"""Edits that wait for their turn: one at a time is sampled, in a thread of its own, and all can be looked at meanwhile.

They are sample.py's own edits. Files are written to one folder alone.
"""

import base64
import io
import re
import secrets
import threading
from argparse import Namespace
from dataclasses import dataclass, field
from queue import SimpleQueue

import cli
from cli import UserError, reported_as

from editing.flags import variants
from editing.record import decode_small, spread
from images import open_image, save_png, to_image

BYTES = 20_000_000  # of an image
VARIANTS, PREVIEWS = 16, 12  # at most, of one edit
NUMBERS = {"cfg_text": float, "cfg_image": float, "steps": int, "seed": int, "num": int}  # that a request gives


class Cancelled(Exception):  # noqa: N818
    """The user wants no more of a job."""


@dataclass
class Job:
    """An edit that was asked for, and how far it is."""

    name: str  # of its folder, too
    settings: dict
    state: str = "waiting"  # then running; at last done, failed or cancelled
    step: int = 0
    total: int = 0
    preview: object = None  # the latest clean guess, an RGB image
    message: str = ""  # why it failed
    files: list = field(default_factory=list)  # the input, the input as it was edited, the edits, the explain page
    cancelled: bool = False


class Studio:
    """A model, its jobs, and the folder where each has a folder of its own."""

    def __init__(self, model, options, folder, edit_one):
        """options: of sample.py, as `sample.load_model` leaves them; edit_one: `sample.edit_one`."""
        self.model, self.options, self.folder, self.edit_one = model, options, folder, edit_one
        self.jobs, self.queue = {}, SimpleQueue()  # jobs by name, in the order in which they came
        threading.Thread(target=self.work, daemon=True).start()

    def add(self, request):
        """A job from {"image": a data URL, "instr", NUMBERS}. Raises UserError for what cannot be edited."""
        with reported_as("the request cannot be read"):
            settings = {name: kind(request[name]) for name, kind in NUMBERS.items()}
            data = base64.b64decode(request["image"].partition("base64,")[2], validate=True)
        settings["instr"], own = request.get("instr"), self.options
        cli.check_instruction(settings["instr"])
        cli.check_seeds([settings["seed"], settings["seed"] + settings["num"]])
        scales = settings["cfg_text"], settings["cfg_image"]
        cli.check_sampling(settings["steps"], *scales, own.resolution, own.sampler, own.schedule)
        if not 1 <= settings["num"] <= VARIANTS:
            raise UserError(f"the number of variants should be from 1 to {VARIANTS}")
        if len(data) > BYTES:
            raise UserError(f"the image has more than {BYTES // 10**6} MB")
        try:
            open_image(io.BytesIO(data))
        except UserError as error:
            raise UserError(re.sub("^<.*?>", "the image", str(error))) from error
        job = Job(secrets.token_hex(8), settings)
        (self.folder / job.name).mkdir(parents=True)
        (self.folder / job.name / "input").write_bytes(data)
        self.jobs[job.name] = job
        self.queue.put(job)
        return job

    def place(self, job):
        """How many jobs are to be sampled before this one."""
        active = [other for other in list(self.jobs.values()) if other.state in ("waiting", "running")]
        return active.index(job) if job in active else 0

    def cancel(self, job):
        """Take a job from the queue, or stop it at its next step."""
        job.cancelled = True
        if job.state == "waiting":
            job.state = "cancelled"

    def work(self):
        """Sample for one job after another, for ever."""
        while True:
            job = self.queue.get()
            if job.cancelled:
                continue
            job.state = "running"
            try:
                self.edit(job)
                job.state = "done"
            except Cancelled:
                job.state = "cancelled"
            except Exception as error:  # whatever it is, the next job has its turn
                job.state, job.message = "failed", str(error) or type(error).__name__
            job.preview = None

    def edit(self, job):
        """Sample and write, as sample.py does with these settings."""
        folder, steps = self.folder / job.name, job.settings["steps"]
        options = Namespace(**{**vars(self.options), **job.settings})
        job.total = steps * -(-options.num // options.batch_size)
        single = options.num == 1 and not self.model.unet.config.scales_width
        options.explain = folder / "explain.html" if single else None
        previews = spread(steps, PREVIEWS)

        def step_done(step, sigma, denoised):
            if job.cancelled:
                raise Cancelled
            job.step += 1
            if step in previews:
                job.preview = to_image(decode_small(self.model, denoised)[1][0])

        edit = self.edit_one(self.model, options, str(folder / "input"), folder / "edit.png", step_done)
        save_png(edit.before, folder / "before.png")
        edits = [path.name for path in variants(edit.out, options).values()] or ["edit.png"]
        job.files = ["input", "before.png", *edits, *["explain.html"] * single]
