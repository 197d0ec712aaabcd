"""The language model's writer, by the real client over real HTTP, against a server that misbehaves."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from cli import UserError

import psutil
import pytest
from language_model import CONTENTS, NO_ANSWERS, WRAPPED, LanguageModel

import datagen
from language.captions import read_edits
from language.writer import chat

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("language.endpoint.TIMEOUT", 1)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def write(tmp_path, monkeypatch, capsys):
    """Run datagen.py text on captions against a model: (triplets, {dropped caption: reason}, what was printed)."""

    def run(model, captions, *arguments, out=None):
        monkeypatch.setenv("OPENAI_BASE_URL", model.url)
        (tmp_path / "captions.txt").write_text("\n".join(captions), encoding="utf-8")
        out = out or tmp_path / "edits.jsonl"
        common = ["--captions", str(tmp_path / "captions.txt"), "--out", str(out)]
        datagen.main(["text", *common, *arguments])
        return *results(out), capsys.readouterr().out

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def results(out):
    return lines(out), {line["caption"]: line["reason"] for line in lines(out.with_stem(f"{out.stem}_dropped"))}


def test_a_triplet_and_what_is_asked(write):
    """The paper's sampling, a schema, and hand-written examples that depend on the caption alone."""
    with LanguageModel() as model:
        arguments = ["--model", "small", "--few-shot", "3", "--concurrency", "1"]
        triplets, dropped, printed = write(model, ["a cat", "a dog"], *arguments)
    assert triplets[0] == {"caption": "a cat", "edit": "make it night", "output": "a cat at night", "url": None}
    assert (len(triplets), dropped) == (2, {})
    assert "2 written, 0 dropped, 0 failed, 0 done before, 0 duplicates; tokens: 200 read, 40 written" in printed
    first, second = model.requests
    sampling = {"temperature": 0.7, "top_p": 1, "frequency_penalty": 0.1, "presence_penalty": 0}
    assert {**sampling, "model": "small", "max_completion_tokens": 256}.items() <= first.items()
    schema = first["response_format"]["json_schema"]
    assert (schema["strict"], schema["schema"]["required"]) == (True, ["edit", "output"])
    assert [message["role"] for message in first["messages"]] == ["system"] + 3 * ["user", "assistant"] + ["user"]
    known = {example["caption"]: example for example in read_edits(ROOT / "data" / "edit_examples.jsonl")}
    for shown, answer in zip(first["messages"][1:-1:2], first["messages"][2::2], strict=True):
        assert json.loads(answer["content"]).items() <= known[shown["content"]].items()
    assert first["messages"][1:-1] != second["messages"][1:-1]
    assert model.keys == {f"Bearer {KEY}"}


@pytest.mark.parametrize("fault", ["429", "500", "503", "drop", "sleep", *NO_ANSWERS])
def test_what_passes_is_tried_again(write, fault):
    """By the library, which waits as long as the server says."""
    with LanguageModel(lambda caption, time: fault if time < 3 else "good") as model:
        triplets, dropped, _ = write(model, ["a cat"])
    assert (len(triplets), dropped) == (1, {})
    assert model.asked["a cat"] == 3


@pytest.mark.parametrize("fault", sorted({*CONTENTS} - {"unicode"}))
def test_malformed_answers_are_asked_for_again_and_then_dropped(write, fault):
    with LanguageModel(lambda caption, time: fault if caption == "bad" or time == 1 else "good") as model:
        triplets, dropped, _ = write(model, ["bad", "a cat"])
    assert [triplet["caption"] for triplet in triplets] == ["a cat"]
    assert dropped == {"bad": "no answer was the two short texts that were asked for"}
    assert model.asked == {"bad": 4, "a cat": 2}


def test_what_is_dropped_and_why(write):
    """Each with a reason of its own; an answer that changes nothing is asked for again, as in the released code."""
    reasons = {"refusal": "the model refused", "filtered": "the model refused", "same": "the caption stays as it is"}
    reasons |= {"400 filter": "the endpoint refused the caption", "a gun": "flagged by the moderation"}
    with LanguageModel(lambda caption, time: caption) as model:
        model.flagged = {"gun"}
        triplets, dropped, _ = write(model, [*reasons, "good"], "--moderate")
    assert [triplet["caption"] for triplet in triplets] == ["good"]
    assert dropped == reasons
    assert model.asked == {"refusal": 1, "filtered": 1, "same": 4, "400 filter": 1, "good": 1}


@pytest.mark.parametrize("fault", ["401", "404", "400", "quota"])
def test_what_cannot_pass_ends_the_run_in_one_line(write, tmp_path, monkeypatch, fault):
    """And the key is nowhere, though the server repeats it."""
    monkeypatch.setattr("language.endpoint.RETRIES", 0)
    ended = pytest.raises(SystemExit if fault == "quota" else UserError, match="/v1/chat/completions answered 4")
    with LanguageModel(lambda caption, time: fault) as model, ended as error:
        write(model, [f"caption {number}" for number in range(50)], "--concurrency", "2")
    assert len(model.asked) <= 2
    assert KEY not in str(error.value)
    assert results(tmp_path / "edits.jsonl") == ([], {})


def test_the_key_is_in_no_output_and_no_file(tmp_path):
    (tmp_path / "captions.txt").write_text("a cat\na dog\n")
    with LanguageModel(lambda caption, time: "401") as model:
        command = [sys.executable, ROOT / "datagen.py", "text", "--captions", "captions.txt", "--out", "out.jsonl"]
        environment = os.environ | {"OPENAI_BASE_URL": model.url, "OPENAI_LOG": "debug"}
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "/v1/chat/completions answered 401: " in done.stderr
    assert KEY not in done.stdout + done.stderr
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_a_server_that_is_gone_and_a_key_that_is_not_set(write, monkeypatch):
    monkeypatch.setattr("language.endpoint.RETRIES", 0)
    with LanguageModel() as model:
        pass
    with pytest.raises(SystemExit, match=f"datagen.py: {model.url}/chat/completions: Connection error. .All conn"):
        write(model, [f"caption {number}" for number in range(30)], "--concurrency", "4")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="set OPENAI_API_KEY"):
        write(model, ["a cat"])


def test_a_few_failures_are_left_for_the_next_run(write, tmp_path, monkeypatch):
    monkeypatch.setattr("language.endpoint.RETRIES", 1)
    captions = [f"caption {number}" for number in range(12)]
    with LanguageModel(lambda caption, time: "500" if caption.endswith("7") else "good") as model:
        with pytest.raises(SystemExit, match="/v1/chat/completions answered 500: "):
            write(model, captions)
        assert len(lines(tmp_path / "edits.jsonl")) == 11
        model.behave = lambda caption, time: "good"
        triplets, dropped, printed = write(model, captions)
    assert sorted(triplet["caption"] for triplet in triplets) == sorted(captions)
    assert "1 written, 0 dropped, 0 failed, 11 done before" in printed
    assert model.answered.total() == 12


@pytest.mark.parametrize("limit", [1, 2000, 6000])
def test_the_tokens_that_may_be_used(write, limit):
    """Never passed; the next run resumes."""
    captions = [f"caption {number}" for number in range(60)]
    with LanguageModel() as model:
        first, _, printed = write(model, captions, "--max-tokens-total", str(limit), "--few-shot", "0")
        assert 120 * len(first) <= limit
        assert (len(first) > 0) == (limit > 1)
        assert "the same command resumes" in printed
        everything, _, printed = write(model, captions, "--few-shot", "0")
    assert len(everything) == model.answered.total() == 60
    assert f"{len(first)} done before" in printed


def test_no_captions(write):
    with pytest.raises(UserError, match="captions.txt holds no captions"):
        write(SimpleNamespace(url="http://x"), ["", " "])


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_captions_with_faults(write, count):
    """Every caption is accounted for exactly once, and memory does not grow with their number."""
    faults = ["429", "500", "drop", "torn", "wrong schema", "empty choices", "refusal", "huge", "unicode", "no usage"]
    rng, memory = random.Random(0), []
    fated = {f"caption {number}": rng.choice(faults) for number in range(count) if rng.random() < 0.05}

    def behave(caption, time):
        if caption in (f"caption {count // 4}", f"caption {count * 19 // 20}"):
            memory.append(psutil.Process().memory_info().rss)
        return fated.get(caption, "good") if time == 1 else "good"

    captions = [f"caption {number}" for number in range(count)] + ["Caption 5!", "caption 77"]
    with LanguageModel(behave) as model:
        triplets, dropped, printed = write(model, captions, "--concurrency", "32", "--few-shot", "1")
    found = [triplet["caption"] for triplet in triplets] + list(dropped)
    assert sorted(found) == sorted(captions[:count])
    assert set(dropped) == {caption for caption, fault in fated.items() if fault == "refusal"}
    assert "0 failed, 0 done before, 2 duplicates" in printed
    assert memory[1] - memory[0] < 60 * 2**20


def test_processes_share_the_captions(write, tmp_path, monkeypatch):
    captions = [f"caption {number}" for number in range(20)] + ["caption 3"]
    with LanguageModel() as model:
        for rank in range(3):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "3")
            with pytest.raises(FileNotFoundError):  # there is no file without a number
                write(model, captions)
    found = [line["caption"] for rank in range(3) for line in lines(tmp_path / f"edits_{rank}of3.jsonl")]
    assert sorted(found) == sorted(captions[:20])
    assert model.answered.total() == 20


@pytest.mark.parametrize(
    ("refused", "body", "last"),
    [
        ("temperature", "Unsupported value: 'temperature' does not support 0.7", {"top_p": 1}),
        ("top_p", "no `top_p` here", {"temperature": 0.7}),
        ("presence_penalty", "presence_penalty: not permitted", {"frequency_penalty": 0.1}),
        ("json_schema", "This response_format type is unavailable now", {"response_format": {"type": "json_object"}}),
        ("response_format", "response_format is not supported", {"max_completion_tokens": 256}),
        ("max_completion_tokens", "max_completion_tokens: extra_forbidden", {"max_tokens": 256, "temperature": 0.7}),
        ("_tokens", "max_completion_tokens or max_tokens is too large", {"temperature": 0.7}),
        ("temperature", "", {"max_tokens": 256}),  # no reason: nothing that can be left out is asked for
    ],
)
@pytest.mark.parametrize("status", [400, 422])
def test_parameters_that_are_refused_are_left_out_for_the_run(write, refused, body, last, status):
    with LanguageModel() as model:
        model.refuse = lambda request: ({"detail": body}, status) if refused in json.dumps(request) else None
        triplets, _, printed = write(model, ["a cat", "a dog", "a cow"], "--concurrency", "1")
    assert len(triplets) == 3
    assert printed.count("asking without") == len(model.requests) - 3 <= 2
    assert last.items() <= model.requests[-1].items()
    assert refused not in json.dumps(model.requests[-1])
    assert f"answered {status}: " in printed


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_json_is_found_where_it_is(write, wrapped):
    with LanguageModel(lambda caption, time: wrapped) as model:
        triplets, _, _ = write(model, ["a cat"])
    assert triplets == [{"caption": "a cat", "edit": "make it night", "output": "a cat at night", "url": None}]
    assert model.asked.total() == 1


@pytest.mark.parametrize("fault", NO_ANSWERS)
def test_an_endpoint_that_never_answers_ends_the_run_and_uses_up_no_caption(write, fault):
    captions = [f"caption {number}" for number in range(50)]
    with LanguageModel(lambda caption, time: fault) as model:
        with pytest.raises(SystemExit, match="/v1/chat/completions gave no answer .is OPENAI_BASE_URL right") as error:
            write(model, captions, "--concurrency", "2")
        assert 10 <= model.asked.total() <= 12
        body = NO_ANSWERS[fault].decode("utf-8", "replace").strip()[:20]
        assert body.isprintable() == (body in str(error.value))
        model.behave = lambda caption, time: "good"
        triplets, dropped, printed = write(model, captions)
    assert (len(triplets), dropped) == (50, {})
    assert "50 written, 0 dropped, 0 failed, 0 done before" in printed


def test_an_answer_that_was_cut_off_may_be_longer(write):
    with LanguageModel(lambda caption, time: "cut" if caption == "long" or time < 3 else "good") as model:
        triplets, dropped, printed = write(model, ["a cat", "long"], "--concurrency", "1")
    assert [triplet["caption"] for triplet in triplets] == ["a cat"]
    assert dropped == {"long": "the answer was cut off at 4096 tokens (finish_reason: length)"}
    assert [request["max_completion_tokens"] for request in model.requests] == [256, 1024] + 5 * [4096]
    assert "cut off at 256 tokens (finish_reason: length); now 1024 are allowed" in printed


def test_a_model_that_never_does_what_it_is_asked_ends_the_run(write):
    with LanguageModel(lambda caption, time: "prose") as model, pytest.raises(UserError, match="of no use; .*at night"):
        write(model, [f"caption {number}" for number in range(100)], "--concurrency", "1")
    assert model.asked.total() == 40


@pytest.mark.parametrize("usage", [None, [], {"prompt_tokens": None, "completion_tokens": ""}, {"prompt_tokens": 0}])
def test_tokens_that_are_not_told_are_estimated(write, usage):
    captions = [f"caption {number}" for number in range(60)]
    with LanguageModel() as model:
        model.usage = usage
        triplets, _, printed = write(model, captions, "--max-tokens-total", "3000", "--few-shot", "0")
    expected = re.search(r"60 captions to ask about: about ([\d,]+) tokens to read and ([\d,]+) to write", printed)
    told = re.search(r"tokens: (\d+) read, (\d+) written", printed)
    for ours, ended in zip(expected.groups(), told.groups(), strict=True):
        assert int(ended) / len(triplets) == pytest.approx(int(ours.replace(",", "")) / 60, rel=0.6)
    assert 0 < sum(map(int, told.groups())) <= 3000
    assert re.search("the next request may take [0-9]+ tokens, and --max-tokens-total is 3000", printed)


def test_a_total_alone_is_believed(write):
    with LanguageModel() as model:
        model.usage = {"total_tokens": 1234}
        _, _, printed = write(model, ["a cat"])
    assert sum(map(int, re.search(r"tokens: (\d+) read, (\d+) written", printed).groups())) == 1234


@pytest.mark.parametrize(
    ("address", "path"),
    [("{}/openai/deployments/m?api-version=1&x=a%20b", "/openai/deployments/m/chat/completions?api-version=1&x=a+b"),
     ("{}/v1/chat/completions", "/v1/chat/completions"), (" {}/v1/ \n", "/v1/chat/completions")],
)  # fmt: skip
def test_addresses_as_people_have_them(write, address, path):
    with LanguageModel() as model:
        model.url = address.format(model.url.removesuffix("/v1"))
        assert len(write(model, ["a cat"])[0]) == 1
    assert model.paths == {path}
    assert model.azure == ({KEY} if "api-version" in path else {None})


@pytest.mark.parametrize("address", ["localhost:8000/v1", "http://", "http://[1", "http://x:99999999/", "ftp://x"])
def test_what_is_no_address(write, address):
    with pytest.raises(UserError, match="cannot connect to OPENAI_BASE_URL="):
        write(SimpleNamespace(url=address), ["a cat"])


def test_what_was_made_otherwise_is_never_replaced(write, tmp_path):
    """A file of the user's, and one that another command line began."""
    mine, out = tmp_path / "mine.jsonl", tmp_path / "new/folder/edits.jsonl"
    mine.write_text("mine\n")
    with LanguageModel() as model:
        with pytest.raises(UserError, match="mine.jsonl is there already, made otherwise; use another --out"):
            write(model, ["a cat"], out=mine)
        before, _, _ = write(model, ["a cat"], out=out)
        with pytest.raises(UserError, match="was begun with model gpt-4o-mini, not small; use the same settings"):
            write(model, ["a cat"], "--model", "small", out=out)
    assert mine.read_text() == "mine\n"
    assert lines(out) == before


def test_killed_again_and_again(tmp_path):
    """No finished request is repeated but those whose answers were under way, and none is lost."""
    captions, rng = [f"caption {number}" for number in range(150)], random.Random(1)
    (tmp_path / "captions.txt").write_text("\n".join(captions))

    with LanguageModel(lambda caption, number: time.sleep(0.01) or "good") as model:
        command = [sys.executable, ROOT / "datagen.py", "text", "--concurrency", "4"]
        command += ["--captions", tmp_path / "captions.txt", "--out", tmp_path / "out.jsonl"]
        environment = os.environ | {"OPENAI_BASE_URL": model.url}
        for _ in range(2):
            wanted = model.answered.total() + rng.randint(1, 40)
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while model.answered.total() < wanted and process.poll() is None:
                time.sleep(0.001)
            process.kill()
            process.wait()
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    found = [line["caption"] for line in lines(tmp_path / "out.jsonl")]
    assert sorted(found) == sorted(captions)
    assert model.answered.total() <= 150 + 4 * 2


def test_a_job_from_the_training_file_to_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("language.finetune.POLL", 0.01)
    out = tmp_path / "new/chats.jsonl"
    command = ["finetune", "--out", str(out), "--model", "small", "--epochs", "2"]
    with LanguageModel() as model:
        monkeypatch.setenv("OPENAI_BASE_URL", model.url)
        datagen.main([*command, "--dry-run"])
        assert not model.uploads
        model.states = ["validating_files", "running", "running", "succeeded"]
        datagen.main(command)
        printed = capsys.readouterr().out.splitlines()
        model.states = ["failed"]
        with pytest.raises(UserError, match="the job ftjob-1 ended as failed: too few tokens"):
            datagen.main([*command, "--job", "ftjob-1"])
        model.states = ["running"]
        monkeypatch.setattr("time.sleep", lambda seconds: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            datagen.main([*command, "--job", "ftjob-1"])
        assert "the job goes on; to follow it again: python datagen.py finetune --job ftjob" in capsys.readouterr().out
    assert printed[-1] == "ft:small:ours"
    assert [line for line in printed if "running" in line] == ["ftjob-1: running"]
    examples = read_edits(ROOT / "data" / "edit_examples.jsonl")
    assert lines(out) == [{"messages": chat([example])} for example in examples]
    assert [message["role"] for message in lines(out)[0]["messages"]] == ["system", "user", "assistant"]
    assert out.read_bytes() in model.uploads[0]
    (job,) = model.jobs
    hyperparameters = job["method"]["supervised"]["hyperparameters"]
    assert (job["model"], job["training_file"], hyperparameters) == ("small", "file-1", {"n_epochs": 2})


@pytest.mark.parametrize("answer", [b"<html>login</html>", b"{}", b"[]"])
def test_an_endpoint_without_fine_tuning(tmp_path, monkeypatch, answer):
    with LanguageModel() as model:
        monkeypatch.setenv("OPENAI_BASE_URL", model.url)
        monkeypatch.setattr("language_model.Handler.do_POST", lambda handler: handler.reply(None, raw=answer))
        with pytest.raises(UserError, match="the endpoint offers no fine-tuning"):
            datagen.main(["finetune", "--out", str(tmp_path / "chats.jsonl")])
