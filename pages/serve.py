"""A page to edit with, in a browser on this machine.

    python -m pages.serve

The edits are sample.py's own. One at a time is sampled, in a thread of its own; others wait in a queue. Requests are
taken from this machine's own pages alone, and files are written to one folder alone.
"""

import base64
import io
import json
import mimetypes
import re
import secrets
import threading
from argparse import Namespace
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cli
from cli import UserError, reported_as, run_program

import sample
from editing.flags import make_parser, variants
from editing.record import decode_small, spread
from images import open_image, save_png, to_image
from pages.form import data_url, fill, jpeg_url

BYTES = 20_000_000  # of an image that is sent
WAITING, KEPT, VARIANTS, PREVIEWS = 100, 200, 16, 12  # jobs at most, variants of one edit, clean guesses shown
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "scene.png"
NUMBERS = {"cfg_text": float, "cfg_image": float, "steps": int, "seed": int, "num": int}  # that the page sends


class Cancelled(Exception):  # noqa: N818
    """The user wants no more of a job."""


@dataclass
class Job:
    """An edit that was asked for, and what the page shows of it."""

    name: str
    settings: dict
    state: str = "waiting"  # then running; at last done, failed or cancelled
    step: int = 0
    total: int = 0
    preview: str = ""
    message: str = ""
    files: list = field(default_factory=list)
    cancelled: bool = False


class Studio:
    """A model, its jobs, and the folder where each has a folder of its own."""

    def __init__(self, model, options, folder):
        self.model, self.options, self.folder = model, options, folder
        self.jobs, self.changed = {}, threading.Condition()  # jobs by name, in the order in which they came

    def add(self, request):
        """A job from what a page sent. Raises UserError for what cannot be edited."""
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
        with self.changed:
            if sum(other.state == "waiting" for other in self.jobs.values()) >= WAITING:
                raise UserError(f"{WAITING} edits are waiting already; try again later")
            (self.folder / job.name).mkdir(parents=True)
            (self.folder / job.name / "input").write_bytes(data)
            self.jobs[job.name] = job
            finished = [name for name, other in self.jobs.items() if other.state not in ("waiting", "running")]
            for name in finished[: max(0, len(self.jobs) - KEPT)]:
                del self.jobs[name]  # its files stay
            self.changed.notify()
        return job

    def view(self, job):
        """A job, as the page takes it; place: how many are sampled before it."""
        with self.changed:
            active = [other for other in self.jobs.values() if other.state in ("waiting", "running")]
            place = active.index(job) if job in active else 0
        return {**vars(job), "place": place}

    def cancel(self, job):
        """Take a job from the queue, or stop it at its next step."""
        with self.changed:
            job.cancelled = True
            if job.state == "waiting":
                job.state = "cancelled"

    def work(self):
        """Sample for one job after another, for ever."""
        while True:
            with self.changed:
                while not (waiting := [job for job in self.jobs.values() if job.state == "waiting"]):
                    self.changed.wait()
                job = waiting[0]
                job.state = "running"
            try:
                self.edit(job)
                job.state = "done"
            except Cancelled:
                job.state = "cancelled"
            except Exception as error:  # whatever it is, the next job has its turn
                job.state, job.message = "failed", str(error) or type(error).__name__
            job.preview = ""

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
                job.preview = jpeg_url(to_image(decode_small(self.model, denoised)[1][0]))

        edit = sample.Edit(options, str(folder / "input"), [options.instr], folder / "edit.png", self.model)
        sample.run(self.model, [edit], options, step_done)
        edit.write()
        save_png(edit.before, folder / "before.png")
        names = [path.name for path in variants(edit.out, options).values()] or ["edit.png"]
        names = ["input", "before.png", *names, *["explain.html"] * single]
        job.files = [f"/files/{job.name}/{name}" for name in names]


class Handler(BaseHTTPRequestHandler):
    """The requests; `studio` and `page` are of the class that `make_server` makes."""

    timeout = 30  # seconds that a connection may be silent

    def do_GET(self):  # noqa: N802
        """The page, a job, all jobs, a file of a job."""
        match self.path.strip("/").split("/"):
            case [""]:
                self.answer(200, self.page, "text/html; charset=utf-8")
            case ["jobs"]:
                self.answer(200, [self.studio.view(job) for job in list(self.studio.jobs.values())])
            case ["jobs", name] if job := self.studio.jobs.get(name):
                self.answer(200, self.studio.view(job))
            case ["files", name, _] if (job := self.studio.jobs.get(name)) and self.path in job.files:
                kind = mimetypes.guess_type(self.path)[0] or "application/octet-stream"
                self.answer(200, (self.studio.folder / name / Path(self.path).name).read_bytes(), kind)
            case _:
                self.answer(404, {"message": "there is nothing here"})

    def do_POST(self):  # noqa: N802
        """A new job, or the end of one."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > BYTES * 4 // 3 + 10_000:
            return self.answer(413, {"message": f"an image of at most {BYTES // 10**6} MB is needed"})
        body = self.rfile.read(int(length))
        match self.path.strip("/").split("/"):
            case ["jobs"] if len(body) == int(length):
                try:
                    with reported_as("the request cannot be read"):
                        request = json.loads(body)
                    self.answer(200, self.studio.view(self.studio.add(request)))
                except (UserError, OSError) as error:
                    self.answer(400, {"message": str(error)})
            case ["jobs", name, "cancel"] if job := self.studio.jobs.get(name):
                self.studio.cancel(job)
                self.answer(200, self.studio.view(job))
            case _:
                self.answer(404, {"message": "there is nothing here"})
        return None

    def parse_request(self):
        """Refuse what comes from another page: by its origin, or by a name that only leads here (DNS rebinding)."""
        if not super().parse_request():
            return False
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        port = self.server.server_address[1]
        if host in (f"127.0.0.1:{port}", f"localhost:{port}") and origin in (None, f"http://{host}"):
            return True
        self.answer(403, {"message": "only pages of this server may ask it"})
        return False

    def answer(self, status, content, kind="application/json"):
        """Send bytes, or anything that JSON can hold."""
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": len(content), "Cache-Control": "no-store"}
        for name, value in (headers | {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY"}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Be quiet."""


class Server(ThreadingHTTPServer):
    """On this machine's own address; a browser that goes away in the middle of an answer is no error."""

    request_queue_size = 128

    def handle_error(self, request, address):
        """Close the connection; what a job did wrong stands in the job."""


def make_server(model, options, folder, port):
    """A server whose jobs are sampled from now on; options: of sample.py, as `sample.load_model` leaves them."""
    studio = Studio(model, options, folder)
    threading.Thread(target=studio.work, daemon=True).start()
    own = {name: getattr(options, name) for name in ("cfg_text", "cfg_image", "steps", "seed", "weights", "resolution")}
    own |= {"bytes": BYTES, "variants": VARIANTS, "example": data_url(EXAMPLE.read_bytes(), "image/png")}
    handler = type("OwnHandler", (Handler,), {"studio": studio, "page": fill("serve.html", own).encode()})
    return Server(("127.0.0.1", port), handler)


def main():
    """Load the model and serve."""
    parser = cli.Parser(prog="pages.serve", description="A page to edit with, on this machine alone.")
    add = parser.add_argument
    add("--weights", default="mini", metavar="PATH", help="as of sample.py (default: mini)")
    add("--device", default="auto", metavar="D", help="as of sample.py (default: auto)")
    add("--port", type=cli.between(1, 65535), default=8000, help="(default: 8000)")
    add("--out", type=Path, default=Path("runs/served"), metavar="DIR", help="(default: %(default)s)")
    own = parser.parse_args()
    options = make_parser().parse_args([f"--weights={own.weights}", f"--device={own.device}"])
    model = sample.load_model(options)
    server = make_server(model, options, own.out, own.port)
    print(f"http://127.0.0.1:{own.port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run_program(main)
