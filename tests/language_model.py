"""A server on this machine that speaks a language model's protocol, and misbehaves as it is told."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MEGABYTE = 1 << 20


class LanguageModel:
    """Answers chats about captions, moderations, uploads and fine-tuning jobs.

    behave(caption, time) -> what to do when a caption is asked about for the first, second, ... time: one of the names
    in `Handler.chat`. `asked` counts the requests for every caption, `answered` those that got a good answer.
    """

    def __init__(self, behave=lambda caption, time: "good"):
        self.behave, self.asked, self.answered = behave, Counter(), Counter()
        self.requests, self.keys, self.uploads, self.jobs = [], set(), [], []
        self.flagged, self.states, self.lock = set(), ["running", "succeeded"], threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"model": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


def after(caption):
    """What the model writes for a caption."""
    return "make it night", f"{caption} at night"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    model = None

    def log_message(self, *_):
        pass

    def reply(self, status, value, raw=None, **headers):
        body = json.dumps(value).encode() if raw is None else raw
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def fail(self, status, code, text="no", **headers):
        self.reply(status, {"error": {"message": text, "code": code, "type": "test", "param": None}}, **headers)

    def do_GET(self):
        states = self.model.states
        status = states.pop(0) if len(states) > 1 else states[0]
        error = {"message": "too few tokens", "code": "x", "param": None} if status == "failed" else None
        name = "ft:small:ours" if status == "succeeded" else None
        self.reply(200, {"id": "ftjob-1", "object": "fine_tuning.job", "status": status, "error": error}
                   | {"fine_tuned_model": name})  # fmt: skip

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.model.keys.add(self.headers["Authorization"])
        if self.path.endswith("/files"):
            self.model.uploads.append(body)
            return self.reply(200, {"id": "file-1", "object": "file", "purpose": "fine-tune", "filename": "x"})
        request = json.loads(body)
        if self.path.endswith("/jobs"):
            self.model.jobs.append(request)
            return self.reply(200, {"id": "ftjob-1", "object": "fine_tuning.job", "status": "queued"})
        if self.path.endswith("/moderations"):
            results = [{"flagged": any(word in text for word in self.model.flagged)} for text in request["input"]]
            return self.reply(200, {"id": "m", "model": "m", "results": results})
        return self.chat(request)

    def chat(self, request):
        model, caption = self.model, request["messages"][-1]["content"]
        with model.lock:
            model.asked[caption] += 1
            model.requests.append(request) if len(model.requests) < 100 else None
            what = model.behave(caption, model.asked[caption])
        edit, output = after(caption)
        texts = {"edit": edit, "output": output}
        message = {"role": "assistant", "content": json.dumps(texts), "refusal": None}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        answer = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        answer["usage"] = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
        soon = {"retry_after_ms": "5"}
        if what == "429":
            return self.fail(429, "rate_limit_exceeded", Retry_After="0.02")
        if what == "500":
            return self.fail(500, "server_error", **soon)
        if what == "503":
            return self.fail(503, "overloaded", **soon)
        if what == "quota":
            return self.fail(429, "insufficient_quota", "pay first", **soon)
        if what == "401":
            return self.fail(401, "invalid_api_key", f"wrong key: {self.headers['Authorization']}")
        if what == "404":
            return self.fail(404, "model_not_found", "no such model")
        if what == "400 filter":
            return self.fail(400, "content_filter")
        if what == "400":
            return self.fail(400, "bad_schema", "json_schema is not supported")
        if what == "drop":
            self.close_connection = True
            return None
        if what == "sleep":
            time.sleep(1.5)
        if what == "torn":
            return self.reply(200, None, raw=json.dumps(answer).encode()[:-40])
        if what == "page":
            return self.reply(200, None, raw=b"<html>busy</html>", Content_Type="text/html")
        contents = {
            "wrong schema": json.dumps({"edit": edit, "caption": output}),
            "numbers": json.dumps({"edit": 1, "output": 2}),
            "list": "[]",
            "prose": f"{edit}: {output}",
            "nothing": None,
            "deep": "[" * 100_000,
            "blank": json.dumps({"edit": "  ", "output": output}),
            "same": json.dumps({"edit": edit, "output": f" {caption.upper()}! "}),
            "unicode": json.dumps(
                {"edit": "mach es \u2028\u202e zu \U0001f319", "output": "n\u0303acht \u591c\n\tam Meer"}
            ),
            "surrogate": '{"edit": "\\ud800", "output": "x"}',
            "huge": json.dumps({"edit": "x" * MEGABYTE, "output": output}),
        }
        message["content"] = contents.get(what, message["content"])
        if what == "empty choices":
            answer["choices"] = []
        if what == "no message":
            del choice["message"]
        if what == "refusal":
            message.update(content=None, refusal="I cannot do that")
        if what == "filtered":
            choice["finish_reason"] = "content_filter"
        if what == "no usage":
            del answer["usage"]
        if what not in contents and what in ("good", "sleep", "no usage"):
            model.answered[caption] += 1
        return self.reply(200, answer)
