"""A language model writes edits: captions to {"caption", "edit", "output", "url"}, a line each (Sec. 3.1.1).

Any endpoint that speaks OpenAI's protocol will do: OPENAI_BASE_URL says where, OPENAI_API_KEY opens it. Timeouts and
retries are the client's. An answer is written before the next caption is taken, so that a stopped run can resume.
"""

import asyncio
import itertools
import json
import math
import os
import random
from collections import Counter
from contextlib import contextmanager

from cli import UserError, append_whole

from openai import APIConnectionError, AsyncOpenAI, BadRequestError, InternalServerError, OpenAIError, RateLimitError
from tqdm import tqdm

from language.captions import begin_file, normal, read_captions, read_done, read_edits, unique

SYSTEM = """\
You write training data for a program that edits images by instruction. You are given the caption of an image. Think
of a change to this image that a person might ask for, and that can be seen in it. Answer with a JSON object of two
texts: "edit", the instruction, as short as people write; and "output", the caption of the image after the edit, which
repeats of the given caption whatever the edit leaves alone."""
TEXTS = ("edit", "output")
SCHEMA = {
    "type": "object", "properties": {name: {"type": "string"} for name in TEXTS},
    "required": TEXTS, "additionalProperties": False,
}  # fmt: skip
REQUEST = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "edit", "strict": True, "schema": SCHEMA}},
    "max_completion_tokens": 256,  # as in the paper, and what follows
    "temperature": 0.7, "top_p": 1.0, "frequency_penalty": 0.1, "presence_penalty": 0.0,
}  # fmt: skip
MAX_LETTERS = 400  # of an edit or a caption
ATTEMPTS = 3  # requests for one caption, at most, while the answers are malformed
TIMEOUT, RETRIES = 60, 8  # seconds for an answer; of one request by the client, which waits ever longer
FAILURES = 10  # in a row, after the client's own retries, end the run


class BudgetError(Exception):
    """Another request might use more tokens than allowed."""


class Writer:
    """Asks the language model, and counts the tokens: read, written, and what requests under way may use."""

    def __init__(self, options):
        self.options, self.client = options, AsyncOpenAI(timeout=TIMEOUT, max_retries=RETRIES)
        self.examples = read_edits(options.examples) if options.few_shot else []
        self.read = self.written = self.reserved = 0

    async def write(self, caption):
        """{"edit", "output"} for a caption, or the {"reason"} why it gives none. Raises BudgetError."""
        count = min(self.options.few_shot, len(self.examples))
        shown = random.Random(caption).sample(self.examples, count)  # they depend on the caption alone
        messages = chat([*shown, {"caption": caption}])
        for _ in range(ATTEMPTS):
            if found := await self.ask(messages):
                break
        else:
            return {"reason": "no answer was the two short texts that were asked for"}
        if "reason" not in found and normal(found["output"]) == normal(caption):
            return {"reason": "the caption stays as it is"}
        if "reason" not in found and self.options.moderate:
            moderation = await self.client.moderations.create(input=[caption, *found.values()])
            if any(result.flagged for result in moderation.results):
                return {"reason": "flagged by the moderation"}
        return found

    async def ask(self, messages):
        """One request: what `write` gives, or None if the answer is malformed. Raises BudgetError."""
        most = len(json.dumps([messages, REQUEST])) + REQUEST["max_completion_tokens"]  # a token is a byte, or more
        if self.read + self.written + self.reserved + most > (self.options.max_tokens_total or math.inf):
            raise BudgetError
        self.reserved += most
        try:
            answer = await self.client.chat.completions.create(model=self.options.model, messages=messages, **REQUEST)
            if answer.usage:
                self.read += answer.usage.prompt_tokens
                self.written += answer.usage.completion_tokens
            choice = answer.choices[0]
            if choice.message.refusal or choice.finish_reason == "content_filter":
                return {"reason": "the model refused"}
            values = json.loads(choice.message.content)
            texts = {name: " ".join(values[name].split()) for name in TEXTS}
            return texts if all(text.encode() and len(text) <= MAX_LETTERS for text in texts.values()) else None
        except BadRequestError as error:
            if error.code in ("content_filter", "content_policy_violation"):
                return {"reason": "the endpoint refused the caption"}
            raise
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
            return None  # the endpoint's JSON, or the model's, has not the form that was asked for
        finally:
            self.reserved -= most


def chat(triplets):
    """Triplets as a conversation: the captions asked about, and the answers as JSON where there are any."""
    messages = [{"role": "system", "content": SYSTEM}]
    for triplet in triplets:
        messages.append({"role": "user", "content": triplet["caption"]})
        if "edit" in triplet:
            answer = json.dumps({name: triplet[name] for name in TEXTS}, ensure_ascii=False)
            messages.append({"role": "assistant", "content": answer})
    return messages


async def write_all(writer, captions, out, counts, bar):
    """Triplets of (caption, url) go to the file `out`, what was dropped and why to the same name with `_dropped`.

    What failed is in neither, so the next run asks again. `counts` says how many went where; returns the last failure.
    """
    files = {"written": out, "dropped": out.with_stem(f"{out.stem}_dropped")}
    done = read_done(files["written"]) | read_done(files["dropped"])
    failed_in_row, failure = 0, None

    async def work():
        nonlocal failed_in_row, failure
        for caption, url in captions:  # an iterator, whose captions the tasks share
            bar.update()
            bar.set_postfix(tokens=writer.read + writer.written, **counts, refresh=False)
            if hash(normal(caption)) in done:
                counts["done before"] += 1
                continue
            try:
                record = await writer.write(caption)
            except BudgetError:
                counts["over budget"] += 1
                return
            except (APIConnectionError, InternalServerError, RateLimitError) as error:
                counts["failed"] += 1
                failed_in_row, failure = failed_in_row + 1, error
                if failed_in_row == FAILURES or error.code == "insufficient_quota":
                    raise
                continue
            failed_in_row = 0
            kind = "dropped" if "reason" in record else "written"
            line = json.dumps({"caption": caption, **record, "url": url}, ensure_ascii=False) + "\n"
            append_whole(files[kind], line.encode("utf-8", "backslashreplace"))
            counts[kind] += 1

    async with writer.client, asyncio.TaskGroup() as group:
        for _ in range(writer.options.concurrency):
            group.create_task(work())
    return failure


@contextmanager
def endpoint():
    """Report errors in one line, those of tasks as well, without the key, which an endpoint may repeat."""
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        raise UserError("set OPENAI_API_KEY (for an endpoint of your own, and OPENAI_BASE_URL, any text will do)")
    try:
        yield
    except* OpenAIError as errors:
        raise UserError(f"the endpoint answered: {errors.exceptions[0]}".replace(key, "...")[:400]) from None
    except* (OSError, UserError) as errors:
        raise errors.exceptions[0] from None


def write_edits(options):
    """The program `datagen.py text`."""
    part, parts = options.shard
    out = options.out if parts == 1 else options.out.with_stem(f"{options.out.stem}_{part}of{parts}")
    names = ("captions", "model", "few_shot", "examples", "moderate")
    with endpoint():
        writer = Writer(options)
        next(read_captions(options.captions), None)  # a mistake in the file ends here, before anything is written
        begin_file(out, {"program": "datagen.py text", **{name: getattr(options, name) for name in names}})
        counts = Counter()
        captions = itertools.islice(unique(read_captions(options.captions), counts), part, None, parts)
        with tqdm(desc="captions", unit="caption", mininterval=5) as bar:
            failure = asyncio.run(write_all(writer, captions, out, counts, bar))
        kinds = "written", "dropped", "failed", "done before", "duplicates"
        numbers = ", ".join(f"{counts[name]} {name}" for name in kinds)
        print(f"{out}: {numbers}; tokens: {writer.read} read, {writer.written} written")
        if counts["over budget"]:
            print(f"stopped before --max-tokens-total {options.max_tokens_total} was passed; the same command resumes")
        if failure:
            print("the same command tries again what failed")
            raise failure
