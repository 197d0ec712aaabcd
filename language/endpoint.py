"""The endpoint of a language model: its address, what is an answer of it, and its failures in one line.

Any that speaks OpenAI's protocol will do: OPENAI_BASE_URL says where, OPENAI_API_KEY opens it. Timeouts and retries,
after ever longer waits, are the client's.
"""

import json
import os
import re
import sys
from contextlib import contextmanager
from urllib.parse import parse_qsl, urlsplit

from cli import UserError, reported_as

from openai import APIConnectionError, APIError, InternalServerError, RateLimitError

TIMEOUT, RETRIES = 60, 8  # seconds for an answer; of one request
FAILURES = APIConnectionError, InternalServerError, RateLimitError  # which may pass
NO_ANSWER = 599  # the status that stands for a success whose body is no answer


def connect(kind, **settings):
    """A client of OpenAI's, of this class, for the endpoint that the environment names. Raises UserError."""
    key, address = (os.environ.get(name, "").strip() for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"))
    if not key or not key.isascii():
        raise UserError("set OPENAI_API_KEY (for an endpoint of your own, and OPENAI_BASE_URL, any text will do)")
    with reported_as(f"cannot connect to OPENAI_BASE_URL={address}"):
        parts = urlsplit(address or "https://api.openai.com/v1")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("it should begin with http:// or https:// and the name of a host")
        query = dict(parse_qsl(parts.query))
        return kind(
            api_key=key, max_retries=RETRIES, timeout=TIMEOUT,
            base_url=parts._replace(path=parts.path.removesuffix("/chat/completions"), query="").geturl(),
            default_query=query, default_headers={"api-key": key} if "api-version" in query else {},  # Azure's
            **settings,
        )  # fmt: skip


def is_answer(response):
    """Does a response hold an answer? Not so an error, a web page or an event stream, whatever the status says."""
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        return False
    match body:
        case {"error": error} | {"choices": [{"error": error}, *_]} if error:
            return False
        case {"choices": [{"message": dict()}, *_]} | {"results": [{"flagged": _}, *_]}:
            return True
    return False


def find(value, names):
    """The last dict with texts of these names in a JSON value, however nested, or in JSON that its texts hold; or None.

    Models wrap it in fences, lists and parts, put their thoughts before it and their marks behind it.
    """
    if isinstance(value, dict) and all(isinstance(value.get(name), str) for name in names):
        return value
    inner = []
    if isinstance(value, str):
        starts = [match.start() for match in re.finditer(r'^\s*"|\{', value)][-100:]
        inner = (decoded(value, start) for start in reversed(starts))
    elif isinstance(value, (dict, list)):
        inner = reversed(list(value.values() if isinstance(value, dict) else value))
    return next(filter(None, (find(part, names) for part in inner)), None)


def decoded(text, start):
    """The JSON value that begins at this place of a text, whatever follows it; None if there is none."""
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, start)[0]
    except (ValueError, RecursionError):
        return None


def describe(request, response, failure=""):
    """What came of a request, in one line without the key; the response, or where there was none the failure."""
    where = request.url.copy_with(query=None, userinfo=b"")
    if response is None:
        text = f"{where}: {failure}"
    else:
        advice = "(is OPENAI_BASE_URL right? It usually ends in /v1)"
        known = {404: f"answered 404 {advice}", 405: f"answered 405 {advice}", NO_ANSWER: f"gave no answer {advice}"}
        said = known.get(response.status_code, f"answered {response.status_code}")
        text = f"{where} {said}: {response.text or 'nothing'}"
    key = os.environ["OPENAI_API_KEY"].strip()
    if len(key) > 7:  # shorter ones are for endpoints that want none
        text = text.replace(key, "...")
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:400]


@contextmanager
def reported(program="datagen.py"):
    """Report errors in one line, those of tasks as well: a user's mistake, or, with exit code 1, what may pass."""
    try:
        yield
    except* APIError as errors:
        error = errors.exceptions[0]
        text = describe(error.request, getattr(error, "response", None), f"{error} ({error.__cause__})")
        if isinstance(error, FAILURES):
            sys.exit(f"{program}: {text}")
        raise UserError(text) from None
    except* (OSError, UserError) as errors:
        raise errors.exceptions[0] from None
