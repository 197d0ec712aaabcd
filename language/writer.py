"""A language model writes edits: captions to {"caption", "edit", "output", "url"}, a line each (Sec. 3.1.1).

Any endpoint that speaks OpenAI's protocol will do: OPENAI_BASE_URL says where it is, OPENAI_API_KEY opens it. Timeouts,
retries, their backoff and rate limits are the client's. What was answered is written before the next caption is taken,
so a run may be stopped at any moment; the same command resumes.
"""

import asyncio
import json
import os
import random
from dataclasses import dataclass, field

from cli import UserError

from openai import APIConnectionError, AsyncOpenAI, BadRequestError, InternalServerError, OpenAIError, RateLimitError
from tqdm import tqdm

from language.captions import Records, Unique, begin_file, fingerprint, normal, read_captions, read_edits

SYSTEM = """\
You write training data for a program that edits images by instruction. You are given the caption of an image. Think
of a change to this image that a person might ask for, and that can be seen in it. Answer with a JSON object of two
texts: "edit", the instruction, as short as people write; and "output", the caption of the image after the edit, which
repeats of the given caption whatever the edit leaves alone."""
SCHEMA = {
    "type": "object",
    "properties": {"edit": {"type": "string"}, "output": {"type": "string"}},
    "required": ["edit", "output"],
    "additionalProperties": False,
}
MAX_LETTERS = 400  # of an edit or a caption
ANSWER_TOKENS = 256  # the paper's limit, and the sampling below is the paper's as well
SAMPLING = {"temperature": 0.7, "top_p": 1.0, "frequency_penalty": 0.1, "presence_penalty": 0.0}
ATTEMPTS = 3  # requests for one caption, at most, while the answers are malformed
TIMEOUT, RETRIES = 60, 8  # seconds for an answer; of one request by the client, which waits ever longer
FAILURES = 10  # in a row, after the client's own retries, end the run


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
    longest: int = 0  # of one request so far

    def reserve(self, letters):
        """Set tokens aside for a request of so many letters; None if that could pass the limit."""
        tokens = max(self.longest, letters // 2) + ANSWER_TOKENS
        if self.limit and self.read + self.written + self.reserved + tokens > self.limit:
            return None
        self.reserved += tokens
        return tokens

    def book(self, tokens, usage):
        """Count what a request took instead of what was set aside."""
        self.reserved -= tokens
        if usage:
            self.read += usage.prompt_tokens
            self.written += usage.completion_tokens
            self.longest = max(self.longest, usage.prompt_tokens)


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
        for left in reversed(range(ATTEMPTS)):
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
        tokens = self.usage.reserve(sum(len(message["content"]) for message in messages))
        if tokens is None:
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
            self.usage.book(tokens, usage)


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
    if not all(0 < len(text) <= MAX_LETTERS for text in texts):
        raise MalformedError(f"a text of the answer is empty, or longer than {MAX_LETTERS} letters")
    return texts


# ---- all captions ----


async def write_all(writer, captions, out, concurrency, progress):
    """Ask for all captions, (caption, url) each, that neither of two files holds; returns how many went where.

    out: a path; triplets go there, what was dropped and why to the same name with `_dropped`. Captions whose requests
    failed are in neither, so the next run asks for them again. Raises UserError when going on makes no sense.
    """
    counts = {"written": 0, "dropped": 0, "failed": 0, "done before": 0}
    triplets, dropped = Records(out), Records(dropped_path(out))
    done, source = triplets.keys | dropped.keys, iter(captions)
    stopped, failed_in_row, last = False, 0, ""

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
                failed_in_row = 0
            except DroppedError as error:
                dropped.append({"caption": caption, "url": url, "reason": str(error)})
                counts["dropped"] += 1
                failed_in_row = 0
            except BudgetError:
                stopped = True
            except (APIConnectionError, InternalServerError, RateLimitError) as error:
                counts["failed"] += 1
                failed_in_row, last = failed_in_row + 1, explain(error)
                if failed_in_row >= FAILURES or error.code == "insufficient_quota":
                    raise UserError(f"{failed_in_row} requests in a row failed, the last one: {last}") from error
            except OpenAIError as error:
                raise UserError(explain(error)) from error
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
    examples = read_edits(path)
    for number, example in enumerate(examples, 1):
        if normal(example["caption"]) == normal(example["output"]):
            raise UserError(f"{path}, line {number}: the caption stays as it is")
    return examples


def write_edits(options):
    """The program `datagen.py text`."""
    part, parts = options.shard
    out = options.out if parts == 1 else options.out.with_stem(f"{options.out.stem}_{part}of{parts}")
    usage = Usage(options.max_tokens_total)
    examples = read_examples(options.examples) if options.few_shot else []
    need_key()
    client = AsyncOpenAI(timeout=TIMEOUT, max_retries=RETRIES)
    writer = Writer(client, options.model, examples, options.few_shot, options.moderate, usage)
    next(read_captions(options.captions), None)  # a mistake in the file's name ends here, before anything is written
    names = ("captions", "model", "few_shot", "examples", "moderate")
    begin_file(out, {"program": "datagen.py text", **{name: getattr(options, name) for name in names}})
    unique = Unique(read_captions(options.captions))
    captions = (pair for number, pair in enumerate(unique) if number % parts == part)

    with tqdm(desc="captions", unit="caption", mininterval=5) as bar:

        def progress(counts):
            bar.update(sum(counts.values()) - bar.n)
            bar.set_postfix(tokens=usage.read + usage.written, **counts, refresh=False)

        counts = asyncio.run(write_all(writer, captions, out, options.concurrency, progress))
    numbers = ", ".join(f"{counts[name]} {name}" for name in ("written", "dropped", "failed", "done before"))
    print(f"{out}: {numbers}, {unique.skipped} duplicates; tokens: {usage.read} read, {usage.written} written")
    if counts["stopped"]:
        print(f"stopped before --max-tokens-total {options.max_tokens_total} was passed; the same command resumes")
    if counts["failed"]:
        failed = f"{counts['failed']} captions failed, and the same command tries them again"
        raise UserError(f"{failed} (the last one: {counts['last failure']})")
