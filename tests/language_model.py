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
    "wrong schema": '{"edit": "x", "caption": "y"}', "numbers": '{"edit": 1, "output": 2}', "no list": "[]",
    "marks": '{"followed": "7", "kept": "9"}',
    "prose": "make it night: at night", "nothing": None, "deep in": '{"a":' * 10_000,
    "blank": '{"edit": "  ", "output": "x"}', "surrogate": '{"edit": "\\ud800", "output": "x"}',
    "huge": json.dumps({"edit": "x" * 2**20, "output": "x"}),
    "unicode": json.dumps({"edit": "mach es \u2028\u202e zu \U0001f319", "output": "n\u0303acht \u591c\n\tam Meer"}),
}  # fmt: skip
WRAPPED = {  # a message that holds the JSON `good`, as local and reasoning models wrap it
    "fence": lambda good: {"content": f"Sure:\n```json\n{good}\n```\nIs it {{short}} enough?"},
    "think": lambda good: {"content": f'<think>{{"edit": "a", "output": "b"}} or {{so}}?</think>\n\n{good}'},
    "half think": lambda good: {"content": f"let me {{see}}\n</think>{good}"},
    "reasoning": lambda good: {"content": None, "reasoning_content": f"so: {good}"},
    "parts": lambda good: {"content": [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": good}]},
    "token": lambda good: {"content": f"{good}<|eot_id|>"},
    "list": lambda good: {"content": f"[{good}]"},
    "nested": lambda good: {"content": f'{{"answer": {good}, "note": "{{"}}'},
    "text in text": lambda good: {"content": json.dumps(good)},
    "line break": lambda good: {"content": good.replace("make it", "make\n it")},
    "call": lambda good: {"content": "", "tool_calls": [{"function": {"name": "edit", "arguments": good}}]},
}
NO_ANSWERS = {  # bodies of status 200 that hold no answer
    "page": b"<html>busy</html>", "nothing at all": b" ", "stream": b'data: {"choices": []}\n\ndata: [DONE]\n\n',
    "torn": b'{"id": "c", "choices": [{"index": 0, "message": {"content": "', "binary": b"\x1f\x8b\x08\xff",
    "empty choices": b'{"choices": []}', "null choices": b'{"choices": null, "error": {"code": 429}}',
    "no message": b'{"choices": [{"index": 0}]}', "null": b"null", "list of nothing": b"[]", "text": b'"hello"',
    "error": b'{"error": "Unexpected endpoint", "choices": [{"message": {"content": "x"}}]}',
    "error of a choice": b'{"choices": [{"error": {"code": 502}, "message": {"content": ""}}]}',
    "deep": b"[" * 100_000,
}  # fmt: skip


class LanguageModel:
    """Answers chats about captions, moderations, uploads and fine-tuning jobs.

    behave(caption, time) -> what to do when a caption is asked about for the first, second, ... time: a name of the
    tables or in `Handler.chat`. refuse(request) -> body and status for one that is refused, or None. `asked` counts
    the requests for every caption, `answered` those answered well.
    """

    def __init__(self, behave=lambda caption, time: "good"):
        self.behave, self.asked, self.answered = behave, Counter(), Counter()
        self.requests, self.keys, self.uploads, self.jobs, self.paths, self.azure = [], set(), [], [], set(), set()
        self.refuse, self.usage = lambda request: None, {"prompt_tokens": 100, "completion_tokens": 20}
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
        self.model.azure.add(self.headers["api-key"])
        self.model.paths.add(self.path)
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
        if isinstance(caption, list):  # images and a text
            caption = next(part["text"] for part in caption if part["type"] == "text")
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
        if what in NO_ANSWERS:
            return self.reply(None, raw=NO_ANSWERS[what], kind="text/html")
        if reason := model.refuse(request):
            return self.reply(*reason)
        if what == "sleep":
            time.sleep(1.5)
        output = f" {caption.upper()}! " if what == "same" else f"{caption} at night"
        content = CONTENTS.get(what, json.dumps({"edit": "make it night", "output": output}))
        message = {"role": "assistant", "content": content, "refusal": None}
        if what == "refusal":
            message.update(content=None, refusal="I cannot do that")
        if what in WRAPPED:
            message.update(WRAPPED[what](content))
        ended = {"filtered": "content_filter", "cut": "length"}.get(what, "stop")
        if what == "cut":
            message["content"] = content[:-9]
        choice = {"index": 0, "finish_reason": ended, "message": message}
        answer = {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        if what != "no usage":
            answer["usage"] = model.usage
        if what in ("good", "sleep", "no usage", *WRAPPED):
            model.answered[caption] += 1
        return self.reply(answer)
