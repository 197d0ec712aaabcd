"""A page to edit with, in a browser on this machine.

    python -m pages.serve

Requests are taken from this machine's own pages alone; `Studio` samples what they ask for, one edit at a time.
"""

import json
import mimetypes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cli
from cli import UserError, reported_as, run_program

import sample
from editing.flags import make_parser
from editing.studio import BYTES, VARIANTS, Studio
from pages.form import data_url, fill, jpeg_url

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "scene.png"


class Handler(BaseHTTPRequestHandler):
    """The requests; the studio and the page are the server's."""

    timeout = 30  # seconds that a connection may be silent

    def do_GET(self):  # noqa: N802
        """The page, a job, all jobs, a file of a job."""
        studio = self.server.studio
        match self.path.strip("/").split("/"):
            case [""]:
                self.answer(200, self.server.page, "text/html; charset=utf-8")
            case ["jobs"]:
                self.answer(200, [self.shown(job) for job in list(studio.jobs.values())])
            case ["jobs", name] if job := studio.jobs.get(name):
                self.answer(200, self.shown(job))
            case ["files", name, file] if (job := studio.jobs.get(name)) and file in job.files:
                kind = mimetypes.guess_type(file)[0] or "application/octet-stream"
                self.answer(200, (studio.folder / name / file).read_bytes(), kind)
            case _:
                self.answer(404, {"message": "there is nothing here"})

    def do_POST(self):  # noqa: N802
        """A new job, or the end of one."""
        studio, length = self.server.studio, self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > BYTES * 4 // 3 + 10_000:
            self.answer(413, {"message": f"an image of at most {BYTES // 10**6} MB is needed"})
            return
        body = self.rfile.read(int(length))
        match self.path.strip("/").split("/"):
            case ["jobs"]:
                try:
                    with reported_as("the request cannot be read"):
                        request = json.loads(body)
                    self.answer(200, self.shown(studio.add(request)))
                except (UserError, OSError) as error:
                    self.answer(400, {"message": str(error)})
            case ["jobs", name, "cancel"] if job := studio.jobs.get(name):
                studio.cancel(job)
                self.answer(200, self.shown(job))
            case _:
                self.answer(404, {"message": "there is nothing here"})

    def shown(self, job):
        """A job, as the page takes it."""
        preview, files = job.preview, [f"/files/{job.name}/{name}" for name in job.files]
        place = self.server.studio.place(job)
        return {**vars(job), "place": place, "files": files, "preview": jpeg_url(preview) if preview else ""}

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
    """A server of a new `Studio`."""
    server = Server(("127.0.0.1", port), Handler)
    server.studio = Studio(model, options, folder, sample.edit_one)
    own = {name: getattr(options, name) for name in ("cfg_text", "cfg_image", "steps", "seed", "weights", "resolution")}
    own |= {"bytes": BYTES, "variants": VARIANTS, "example": data_url(EXAMPLE.read_bytes(), "image/png")}
    server.page = fill("serve.html", own).encode()
    return server


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
