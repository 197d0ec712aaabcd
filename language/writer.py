"""A language model writes edits: captions to {"caption", "edit", "output", "url"}, a line each (Sec. 3.1.1).

Any endpoint that speaks OpenAI's protocol will do: OPENAI_BASE_URL says where it is, OPENAI_API_KEY opens it. Retries,
their backoff and rate limits are the library's own. What was answered is on disk before the next caption is taken, so a
run may be stopped at any moment; the same command goes on where it was.
"""

import asyncio
import json
import os
import random
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from openai import (
    APIConnectionError,
    APIStatusError,
    AsyncOpenAI,
    BadRequestError,
    InternalServerError,
    OpenAIError,
    RateLimitError,
)
from tqdm import tqdm

from cli import UserError
from language.captions import FIELDS, Records, Unique, fingerprint, normal, read_captions

SYSTEM = """\
You write training data for a program that edits pictures by instruction. You are given the caption of a picture. Think
of a change to this picture that a person might ask for, and that can be seen in it. Answer with a JSON object of two
texts: "edit", the instruction, as short as people write; and "output", the caption of the picture after the edit, which
repeats of the given caption whatever the edit leaves alone."""
SCHEMA = {
    "type": "object",
    "properties": {"edit": {"type": "string"}, "output": {"type": "string"}},
    "required": ["edit", "output"],
    "additionalProperties": False,
}
LONGEST = 400  # letters of an edit or a caption; a language model that goes on and on has not understood
ANSWER_TOKENS = 256  # the paper's limit, and the sampling below is the paper's as well
SAMPLING = {"temperature": 0.7, "top_p": 1.0, "frequency_penalty": 0.1, "presence_penalty": 0.0}
ASKED = 3  # times, at most, while the answers are malformed


class DroppedError(Exception):
    """This caption gives no triplet; the text says why."""


class MalformedError(DroppedError):
    """The answer is not what was asked for; another one may be."""


# ---- one caption ----


@dataclass
class Usage:
    """Tokens that were used, and those that requests under way may use."""

    limit: int | None = None
    read: int = 0
    written: int = 0
    reserved: int = 0
    largest: int = 0  # of one request so far

    def reserve(self, letters):
        """Set tokens aside for a request of so many letters; None if that could pass the limit."""
        share = max(self.largest, letters // 2) + ANSWER_TOKENS
        if self.limit and self.read + self.written + self.reserved + share > self.limit:
            return None
        self.reserved += share
        return share

    def book(self, share, usage):
        """Count what a request took instead of what was set aside."""
        self.reserved -= share
        if usage:
            self.read += usage.prompt_tokens
            self.written += usage.completion_tokens
            self.largest = max(self.largest, usage.prompt_tokens)


@dataclass
class Writer:
    """What asks the language model."""

    client: AsyncOpenAI
    model: str
    examples: list = field(default_factory=list)  # hand-written triplets, to show some of them with every caption
    few_shot: int = 8
    moderate: bool = False
    usage: Usage = field(default_factory=Usage)

    def messages(self, caption):
        """The conversation that ends in this caption; which examples are shown depends on the caption alone."""
        rng = random.Random(caption)
        shown = rng.sample(self.examples, min(self.few_shot, len(self.examples)))
        return chat([*shown, {"caption": caption}])

    async def write(self, caption):
        """(edit, output) for a caption. Raises DroppedError, or BudgetError before what might cost too much."""
        messages = self.messages(caption)
        for left in reversed(range(ASKED)):
            try:
                edit, output = read_answer(await self.ask(messages))
                break
            except MalformedError:
                if not left:
                    raise
        if normal(output) == normal(caption):
            raise DroppedError("the caption stays as it is")
        if self.moderate:
            found = await self.client.moderations.create(input=[caption, edit, output])
            if any(result.flagged for result in found.results):
                raise DroppedError("flagged by the moderation")
        return edit, output

    async def ask(self, messages):
        """One request: the answer as the library gives it."""
        share = self.usage.reserve(sum(len(message["content"]) for message in messages))
        if share is None:
            raise BudgetError
        usage = None
        try:
            answer = await self.client.chat.completions.create(
                model=self.model,
                messages=messages,
                max_completion_tokens=ANSWER_TOKENS,
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "edit", "strict": True, "schema": SCHEMA},
                },
                **SAMPLING,
            )
            usage = getattr(answer, "usage", None)
            return answer
        except json.JSONDecodeError as error:
            raise MalformedError("the endpoint's answer is no JSON") from error
        except BadRequestError as error:
            if error.code in ("content_filter", "content_policy_violation"):
                raise DroppedError("the endpoint refused the caption") from error
            raise
        finally:
            self.usage.book(share, usage)


class BudgetError(Exception):
    """Another request might use more tokens than allowed."""


def chat(triplets):
    """Triplets as a conversation: the captions asked about, and the answers as JSON where there are any."""
    messages = [{"role": "system", "content": SYSTEM}]
    for triplet in triplets:
        messages.append({"role": "user", "content": triplet["caption"]})
        if "edit" in triplet:
            answer = {name: triplet[name] for name in SCHEMA["required"]}
            messages.append({"role": "assistant", "content": json.dumps(answer, ensure_ascii=False)})
    return messages


def read_answer(answer):
    """(edit, output) from a chat completion. Raises MalformedError, or DroppedError where asking again is no use."""
    choices = getattr(answer, "choices", None)
    if not choices or not getattr(choices[0], "message", None):
        raise MalformedError("the answer is empty")
    message, reason = choices[0].message, choices[0].finish_reason
    if getattr(message, "refusal", None) or reason == "content_filter":
        raise DroppedError("the model refused")
    try:
        values = json.loads(message.content)
        texts = [" ".join(values[name].split()) for name in SCHEMA["required"]]
        for text in texts:
            text.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MalformedError("the answer is not the JSON object that was asked for") from error
    if not all(0 < len(text) <= LONGEST for text in texts):
        raise MalformedError(f"a text of the answer is empty, or longer than {LONGEST} letters")
    return texts


# ---- all captions ----


async def write_all(writer, captions, out, concurrency, progress=None):
    """Ask for all captions, (caption, url) each, that neither of two files holds; returns how many went where.

    out: a path; triplets go there, what was dropped and why to the same name with `_dropped`. Captions whose requests
    failed for good are in neither, so the next run takes them up. Raises UserError when going on makes no sense.
    """
    out, counts = Path(out), {"written": 0, "dropped": 0, "failed": 0, "done before": 0}
    stopped, failed_in_row, last = False, 0, ""
    with closing(Records(out)) as triplets, closing(Records(dropped_path(out))) as dropped:
        done = triplets.keys | dropped.keys
        source = iter(captions)

        async def work():
            nonlocal stopped, failed_in_row, last
            for caption, url in source:
                if fingerprint(normal(caption)) in done:
                    counts["done before"] += 1
                    continue
                try:
                    edit, output = await writer.write(caption)
                    triplets.append({"caption": caption, "edit": edit, "output": output, "url": url})
                    counts["written"] += 1
                except DroppedError as error:
                    dropped.append({"caption": caption, "url": url, "reason": str(error)})
                    counts["dropped"] += 1
                    failed_in_row = 0
                except BudgetError:
                    stopped = True
                except OpenAIError as error:
                    last = explain(error)
                    if not passes(error):
                        raise UserError(last) from error
                    counts["failed"] += 1
                    failed_in_row += 1
                    if failed_in_row >= max(10, 2 * concurrency):
                        raise UserError(f"{failed_in_row} requests in a row failed, the last one: {last}") from error
                else:
                    failed_in_row = 0
                if progress:
                    progress(counts)
                if stopped:
                    return

        try:
            async with writer.client, asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())
        except* UserError as errors:
            raise errors.exceptions[0] from None
    return counts | {"stopped": stopped, "last failure": last}


def dropped_path(out):
    """Where what gave no triplet is noted."""
    return out.with_name(f"{out.stem}_dropped{out.suffix}")


def passes(error):
    """May the same request succeed later?"""
    if isinstance(error, RateLimitError):
        return error.code != "insufficient_quota"
    return isinstance(error, (APIConnectionError, InternalServerError)) or (
        isinstance(error, APIStatusError) and error.status_code in (408, 409)
    )


def explain(error):
    """A failure in one line, without the key, whatever the endpoint wrote into its message."""
    text = " ".join(str(error).split())[:300]
    key = os.environ.get("OPENAI_API_KEY", "")
    return f"the endpoint answered: {text.replace(key, '...') if key else text}"


def need_key():
    """Raise UserError where the environment holds no key."""
    if not os.environ.get("OPENAI_API_KEY"):
        raise UserError("set OPENAI_API_KEY (for an endpoint of your own, and OPENAI_BASE_URL, any text will do)")


def read_examples(path):
    """Hand-written triplets from a .jsonl file: {"caption", "edit", "output"} each. Raises UserError."""
    examples = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                example = json.loads(line)
                texts = [example[name].strip() for name in FIELDS]
                if not all(texts) or normal(texts[0]) == normal(texts[2]):
                    raise ValueError(f"line {number}: a text is empty, or the caption stays as it is")
                examples.append(dict(zip(FIELDS, texts, strict=True)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no triplets of caption, edit and output: {error}") from error
    return examples


def write_edits(options):
    """datagen.py text --writer openai."""
    part, parts = options.shard
    out = options.out if parts == 1 else options.out.with_stem(f"{options.out.stem}_{part}of{parts}")
    usage = Usage(options.max_tokens_total)
    examples = read_examples(options.examples) if options.few_shot else []
    need_key()
    client = AsyncOpenAI(timeout=options.timeout, max_retries=options.retries)
    writer = Writer(client, options.model, examples, options.few_shot, options.moderate, usage)
    next(read_captions(options.captions), None)  # a mistake in the file's name ends here, before anything is written
    unique = Unique(read_captions(options.captions))
    captions = (pair for number, pair in enumerate(unique) if number % parts == part)

    with tqdm(desc="captions", unit="caption", mininterval=5) as bar:

        def progress(counts):
            bar.update(sum(counts.values()) - bar.n)
            bar.set_postfix(
                dropped=counts["dropped"], failed=counts["failed"], tokens=usage.read + usage.written, refresh=False
            )

        counts = asyncio.run(write_all(writer, captions, out, options.concurrency, progress))
    numbers = ", ".join(f"{counts[name]} {name}" for name in ("written", "dropped", "failed", "done before"))
    print(f"{out}: {numbers}, {unique.skipped} duplicates; tokens: {usage.read} read, {usage.written} written")
    if counts["stopped"]:
        print(f"stopped before --max-tokens-total {options.max_tokens_total} was passed; the same command goes on")
    if counts["failed"]:
        failed = f"{counts['failed']} captions failed, and the same command tries them again"
        raise UserError(f"{failed} (the last one: {counts['last failure']})")
