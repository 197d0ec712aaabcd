"""A language model writes edits: captions to {"caption", "edit", "output", "url"}, a line each (Sec. 3.1.1).

An answer is written before the next caption is taken, so that a stopped run can resume. Which parameters a request
may have differs from one endpoint to the next: what is refused is left out for the rest of the run (`WAYS`).
"""

import asyncio
import itertools
import json
import math
import random
from collections import Counter

from cli import UserError, append_whole

from openai import AsyncOpenAI, BadRequestError, DefaultAsyncHttpxClient, UnprocessableEntityError
from tqdm import tqdm

from language.captions import begin_file, normal, read_captions, read_done, read_edits, unique
from language.endpoint import FAILURES, NO_ANSWER, connect, describe, find, is_answer, reported

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
FORMAT = {"type": "json_schema", "json_schema": {"name": "edit", "strict": True, "schema": SCHEMA}}
SAMPLING = {"temperature": 0.7, "top_p": 1.0, "frequency_penalty": 0.1, "presence_penalty": 0.0}  # as in the paper
WAYS = (  # what a request asks for: each time the first that the endpoint accepts; (its name, the parameters)
    [("json_schema", {"response_format": FORMAT}), ("json_object", {"response_format": {"type": "json_object"}})],
    [(name, {name: None}) for name in ("max_completion_tokens", "max_tokens")],  # the number is `Writer.limit`
    *([(name, {name: value})] for name, value in SAMPLING.items()),
)
LIMITS = (256, 1024, 4096)  # tokens of an answer: as in the paper, and for models that think before they answer
MAX_LETTERS = 400  # of an edit or a caption
ATTEMPTS = 4  # requests for one caption, at most, as in the released code
IN_ROW = 10  # captions that failed, or responses without an answer, one after another, end the run
REFUSED = "the model refused", "the endpoint refused the caption"  # reasons not to ask again
FILTERS = "content_filter", "content_policy_violation", "data_inspection_failed"


class BudgetError(Exception):
    """Another request might use more tokens than allowed."""


class Writer:
    """Asks the language model, and counts the tokens: read, written, and what requests under way may use."""

    def __init__(self, options):
        http = DefaultAsyncHttpxClient(event_hooks={"response": [self.check]})
        self.options, self.client = options, connect(AsyncOpenAI, http_client=http)
        self.examples = read_edits(options.examples) if options.few_shot else []
        self.ways, self.limit = [list(way) for way in WAYS], LIMITS[0]
        self.read = self.written = self.reserved = 0
        self.failed_in_row = self.empty_in_row = self.useless_in_row = 0
        self.told = False

    async def check(self, response):
        """Turn what is no answer into a failure, which the client asks again; tell the first one."""
        await response.aread()
        if response.is_success:
            self.empty_in_row = 0 if is_answer(response) else self.empty_in_row + 1
            if self.empty_in_row:
                response.status_code = NO_ANSWER
            if self.empty_in_row >= IN_ROW:
                response.headers["x-should-retry"] = "false"  # which the client obeys
        if not self.told and (response.status_code >= 500 or response.status_code == 429):
            self.told = True
            tqdm.write(f"{describe(response.request, response)}; asking again, ever more slowly")

    def messages(self, caption):
        """The conversation that asks about a caption; the examples shown depend on the caption alone."""
        count = min(self.options.few_shot, len(self.examples))
        return chat([*random.Random(caption).sample(self.examples, count), {"caption": caption}])

    async def write(self, caption):
        """{"edit", "output"} for a caption, or the {"reason"} why it gives none. Raises BudgetError."""
        if await self.flagged([caption]):
            return {"reason": "flagged by the moderation"}
        for _ in range(ATTEMPTS):
            found = await self.ask(self.messages(caption))
            if "reason" not in found and normal(found["output"]) == normal(caption):
                found = {"reason": "the caption stays as it is"}
            if "reason" not in found and await self.flagged(list(found.values())):
                found = {"reason": "flagged by the moderation"}
            if found.get("reason") in (None, *REFUSED):
                break
        return found

    async def flagged(self, texts):
        """Does the moderation flag one of these texts? No, where it is not asked."""
        if not self.options.moderate:
            return False
        return any(result.flagged for result in (await self.client.moderations.create(input=texts)).results)

    async def ask(self, messages):
        """One answer: {"edit", "output"}, or the {"reason"} why it holds none. Raises BudgetError."""
        limit = self.limit
        most = len(json.dumps([messages, FORMAT, SAMPLING])) + limit  # a token is a byte, or more
        if self.read + self.written + self.reserved + most > (self.options.max_tokens_total or math.inf):
            raise BudgetError(f"the next request may take {most} tokens")
        self.reserved += most
        try:
            answer = await self.send(messages)
            self.count(messages, answer)
        except BadRequestError as error:
            if error.code in FILTERS:
                return {"reason": REFUSED[1]}
            raise
        finally:
            self.reserved -= most
        choice = answer["choices"][0]
        message, ended = choice["message"], choice.get("finish_reason")
        if message.get("refusal") or ended == "content_filter":
            return {"reason": REFUSED[0]}
        found = find(message.get("content"), TEXTS) or find(message, TEXTS)  # there, or in what it thought, or called
        texts = {name: short(found[name]) for name in TEXTS} if found else {}
        self.useless_in_row = 0 if texts and all(texts.values()) else self.useless_in_row + 1
        if not self.useless_in_row:
            return texts
        if self.useless_in_row == IN_ROW * ATTEMPTS:
            raise UserError(f"{IN_ROW * ATTEMPTS} answers in a row were of no use; the last one: {message!r:.300}")
        if ended != "length":
            return {"reason": "no answer was the two short texts that were asked for"}
        if limit == self.limit < LIMITS[-1]:
            self.limit = LIMITS[LIMITS.index(limit) + 1]
            tqdm.write(f"an answer was cut off at {limit} tokens (finish_reason: length); now {self.limit} are allowed")
        return {"reason": f"the answer was cut off at {limit} tokens (finish_reason: length)"}

    async def send(self, messages):
        """The endpoint's answer, a dict with "choices", to a request without the parameters that it refuses."""
        client = self.client.with_options(max_retries=0) if self.failed_in_row else self.client
        while True:
            request = {"model": self.options.model, "messages": messages}
            for name, value in (pair for way in self.ways if way for pair in way[0][1].items()):
                request[name] = self.limit if name.endswith("_tokens") else value
            ways = [len(way) for way in self.ways]
            try:
                answer = await client.chat.completions.with_raw_response.create(**request)
                return json.loads(answer.content)
            except (BadRequestError, UnprocessableEntityError) as error:
                unchanged = ways == [len(way) for way in self.ways]  # by another task meanwhile
                if error.code in FILTERS or (unchanged and not self.leave_out(error)):
                    raise

    def leave_out(self, error):
        """Ask no more for what a refusal names, or for anything if it names nothing; False if nothing is left."""
        asked = [way for way in self.ways if way]
        named = [way for way in asked if any(name in error.response.text for name in (way[0][0], *way[0][1]))]
        refused = named or ([] if self.read else asked)  # an endpoint that has answered refuses the caption
        if refused:
            left = [way.pop(0)[0] + (f" ({way[0][0]} instead)" if way else "") for way in refused]
            tqdm.write(f"{describe(error.request, error.response)}; asking without {', '.join(left)}")
        return bool(refused)

    def count(self, messages, answer):
        """Add the tokens of an answer, estimated where the endpoint does not tell them."""
        usage = answer["usage"] if isinstance(answer.get("usage"), dict) else {}
        numbers = (usage.get(f"{name}_tokens") for name in ("prompt", "completion", "total"))
        read, written, total = (number if isinstance(number, int) and number > 0 else 0 for number in numbers)
        written = written or tokens(answer["choices"][0]["message"])
        self.written += written
        self.read += read or max(total - written, 0) or tokens(messages)


def tokens(value):
    """About how many tokens these JSON values are: four bytes each, as in English."""
    return len(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")) // 4 + 1


def short(text):
    """A text of a model in one line; "" if it is too long, or no text, as half a character in JSON is none."""
    text = " ".join(text.split())
    return text if len(text) <= MAX_LETTERS and text == text.encode("utf-8", "ignore").decode() else ""


def chat(triplets):
    """Triplets as a conversation: the captions asked about, and the answers as JSON where there are any."""
    messages = [{"role": "system", "content": SYSTEM}]
    for triplet in triplets:
        messages.append({"role": "user", "content": triplet["caption"]})
        if "edit" in triplet:
            answer = json.dumps({name: triplet[name] for name in TEXTS}, ensure_ascii=False)
            messages.append({"role": "assistant", "content": answer})
    return messages


async def write_all(writer, captions, files, counts, bar):
    """Triplets of (caption, url) go to the file "written" of `files`, what was dropped and why to "dropped".

    What failed is in neither, so the next run asks again. `counts` says how many went where; returns why the run is
    not complete, or None: the last failure, or the BudgetError.
    """
    reason = None

    async def work():
        nonlocal reason
        for caption, url in captions:  # an iterator, whose captions the tasks share
            try:
                record = await writer.write(caption)
            except BudgetError as error:
                reason = reason or error
                return
            except FAILURES as error:
                counts["failed"] += 1
                writer.failed_in_row, reason = writer.failed_in_row + 1, error
                if max(writer.failed_in_row, writer.empty_in_row) >= IN_ROW or error.code == "insufficient_quota":
                    raise
            else:
                writer.failed_in_row = 0
                kind = "dropped" if "reason" in record else "written"
                line = json.dumps({"caption": caption, **record, "url": url}, ensure_ascii=False) + "\n"
                append_whole(files[kind], line.encode("utf-8", "backslashreplace"))
                counts[kind] += 1
            bar.update()
            bar.set_postfix(tokens=writer.read + writer.written, **counts, refresh=False)

    async with writer.client, asyncio.TaskGroup() as group:
        for _ in range(writer.options.concurrency):
            group.create_task(work())
    return reason


def remaining(options, done, counts):
    """Yield the (caption, url) of this process that are still to be asked about; `counts` counts the others."""
    part, parts = options.shard
    for caption, url in itertools.islice(unique(read_captions(options.captions), counts), part, None, parts):
        if hash(normal(caption)) in done:
            counts["done before"] += 1
        else:
            yield caption, url


def estimate(writer, captions):
    """(how many captions there are, tokens to be read, tokens to be written); the tokens from the first hundred."""
    read = written = total = 0
    for total, (caption, _) in enumerate(captions, 1):
        if total <= 100:
            read += tokens(writer.messages(caption))
            written += tokens(caption) + 20
    return total, *(count * total // min(total or 1, 100) for count in (read, written))


def write_edits(options):
    """The program `datagen.py text`."""
    part, parts = options.shard
    out = options.out if parts == 1 else options.out.with_stem(f"{options.out.stem}_{part}of{parts}")
    names = ("captions", "model", "few_shot", "examples", "moderate")
    with reported():
        writer, counts = Writer(options), Counter()
        if not next(read_captions(options.captions), None):  # a mistake ends here, before anything is written
            raise UserError(f"{options.captions} holds no captions")
        begin_file(out, {"program": "datagen.py text", **{name: getattr(options, name) for name in names}})
        files = {"written": out, "dropped": out.with_stem(f"{out.stem}_dropped")}
        done = read_done(files["written"]) | read_done(files["dropped"])
        total, read, written = estimate(writer, remaining(options, done, counts))
        print(f"{total} captions to ask about: about {read:,} tokens to read and {written:,} to write", flush=True)
        captions = remaining(options, done, Counter())  # read once more
        try:
            with tqdm(total=total, desc="captions", unit="caption", mininterval=5) as bar:
                reason = asyncio.run(write_all(writer, captions, files, counts, bar))
        finally:
            kinds = "written", "dropped", "failed", "done before", "duplicates"
            numbers = ", ".join(f"{counts[name]} {name}" for name in kinds)
            print(f"{out}: {numbers}; tokens: {writer.read} read, {writer.written} written")
        if isinstance(reason, BudgetError):
            print(f"stopped: {reason}, and --max-tokens-total is {options.max_tokens_total}; the same command resumes")
        elif reason:
            print("the same command tries again what failed")
            raise reason
