"""A server on this machine that speaks a language model's protocol, and misbehaves as it is told."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ERRORS = {  # what a request is answered with: status, code and message
    "429": (429, "rate_limit_exceeded", "no"), "quota": (429, "insufficient_quota", "pay first"),
    "500": (500, "server_error", "no"), "503": (503, "overloaded", "no"),
    "401": (401, "invalid_api_key", "wrong key: {key}"), "404": (404, "model_not_found", "no such model"),
    "400": (400, "bad_schema", "json_schema is not supported"), "400 filter": (400, "content_filter", "no"),
}  # fmt: skip
CONTENTS = {  # what the model writes instead of the two texts
    "wrong schema": '{"edit": "x", "caption": "y"}', "numbers": '{"edit": 1, "output": 2}', "list": "[]",
    "prose": "make it night: at night", "nothing": None, "deep": "[" * 100_000,
    "blank": '{"edit": "  ", "output": "x"}', "surrogate": '{"edit": "\\ud800", "output": "x"}',
    "huge": json.dumps({"edit": "x" * 2**20, "output": "x"}),
    "unicode": json.dumps({"edit": "mach es \u2028\u202e zu \U0001f319", "output": "n\u0303acht \u591c\n\tam Meer"}),
}  # fmt: skip


class LanguageModel:
    """Answers chats about captions, moderations, uploads and fine-tuning jobs.

    behave(caption, time) -> what to do when a caption is asked about for the first, second, ... time: a name of the
    tables or in `Handler.chat`. `asked` counts the requests for every caption, `answered` those answered well.
    """

    def __init__(self, behave=lambda caption, time: "good"):
        self.behave, self.asked, self.answered = behave, Counter(), Counter()
        self.requests, self.keys, self.uploads, self.jobs = [], set(), [], []
        self.flagged, self.states, self.lock = set(), ["running", "succeeded"], threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"model": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    model = None

    def log_message(self, *_):
        pass

    def reply(self, value, status=200, raw=None, kind="application/json"):
        body = raw or json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": kind, "Retry-After-Ms": "5", "Content-Length": str(len(body))}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        states = self.model.states
        status = states.pop(0) if len(states) > 1 else states[0]
        error = {"message": "too few tokens", "code": "x", "param": None} if status == "failed" else None
        job = {"id": "ftjob-1", "object": "fine_tuning.job", "status": status, "error": error}
        self.reply({**job, "fine_tuned_model": "ft:small:ours" if status == "succeeded" else None})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.model.keys.add(self.headers["Authorization"])
        if self.path.endswith("/files"):
            self.model.uploads.append(body)
            return self.reply({"id": "file-1", "object": "file", "purpose": "fine-tune", "filename": "x"})
        request = json.loads(body)
        if self.path.endswith("/jobs"):
            self.model.jobs.append(request)
            return self.reply({"id": "ftjob-1", "object": "fine_tuning.job", "status": "queued"})
        if self.path.endswith("/moderations"):
            results = [{"flagged": any(word in text for word in self.model.flagged)} for text in request["input"]]
            return self.reply({"id": "m", "model": "m", "results": results})
        return self.chat(request)

    def chat(self, request):
        model, caption = self.model, request["messages"][-1]["content"]
        with model.lock:
            model.asked[caption] += 1
            model.requests.append(request) if len(model.requests) < 100 else None
            what = model.behave(caption, model.asked[caption])
        if what in ERRORS:
            status, code, text = ERRORS[what]
            error = {"message": text.format(key=self.headers["Authorization"]), "code": code}
            return self.reply({"error": error | {"type": "test", "param": None}}, status)
        if what == "drop":
            self.close_connection = True
            return None
        if what == "sleep":
            time.sleep(1.5)
        output = f" {caption.upper()}! " if what == "same" else f"{caption} at night"
        content = CONTENTS.get(what, json.dumps({"edit": "make it night", "output": output}))
        message = {"role": "assistant", "content": content, "refusal": None}
        if what == "refusal":
            message.update(content=None, refusal="I cannot do that")
        choice = {"index": 0, "finish_reason": "content_filter" if what == "filtered" else "stop", "message": message}
        if what == "no message":
            del choice["message"]
        choices = [] if what == "empty choices" else [choice]
        answer = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
        if what != "no usage":
            answer["usage"] = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
        if what == "torn":
            return self.reply(None, raw=json.dumps(answer).encode()[:-40])
        if what == "page":
            return self.reply(None, raw=b"<html>busy</html>", kind="text/html")
        if what in ("good", "sleep", "no usage"):
            model.answered[caption] += 1
        return self.reply(answer)
