"""A vision-language model judges edits, at any endpoint that speaks OpenAI's protocol (see language/endpoint.py)."""

import base64
from concurrent.futures import ThreadPoolExecutor

from cli import UserError

from openai import OpenAI
from tqdm import tqdm

from images import to_jpeg
from language.endpoint import connect, find, reported

AT_ONCE, ATTEMPTS = 8, 3  # requests; for one edit, where the answers hold no two numbers
SYSTEM = """\
You judge the work of a program that edits images by instruction. You see the image before the edit, the image after it,
and the instruction. Answer with a JSON object of two texts: "followed", how well the instruction was followed, and
"kept", how well everything else was kept as it was; each a whole number from "0", not at all, to "10", perfectly."""


def rate(model, triples):
    """How good are edits, each (image before, image after, instruction)? Numbers in [0, 1], in their order.

    The lower one of both marks, since an edit has to do both. model: its name at the endpoint. Raises UserError.
    """
    with reported("evaluate.py"), ThreadPoolExecutor(AT_ONCE) as pool:
        client = connect(OpenAI)
        answers = pool.map(lambda triple: ask(client, model, *triple), triples)
        return list(tqdm(answers, "judging", len(triples), unit="edit", disable=not triples))


def ask(client, model, before, after, instruction):
    """The mark of one edit. Raises UserError where the model gives no numbers."""
    images = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in (before, after)]
    content = [*images, {"type": "text", "text": instruction}]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
    for _ in range(ATTEMPTS):
        message = client.chat.completions.create(model=model, messages=messages).choices[0].message
        found = find(message.content, ("followed", "kept"))
        marks = [found[name].strip() for name in ("followed", "kept")] if found else []
        if marks and all(mark.isdigit() and int(mark) <= 10 for mark in marks):
            return min(map(int, marks)) / 10
    raise UserError(f"{model} gave no two marks from 0 to 10 in {ATTEMPTS} answers; the last: {message.content!r:.200}")


def data_url(image):
    """An image as part of a request."""
    return f"data:image/jpeg;base64,{base64.b64encode(to_jpeg(image, quality=95)).decode()}"
