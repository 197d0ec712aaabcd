"""python -m pages.serve: its edits are sample.py's, and nothing that is sent to it hangs it or leads outside."""

import base64
import gc
import http.client
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import colourful

import sample
from editing.flags import make_parser
from images import open_image, read_settings
from pages.serve import make_server

pytestmark = pytest.mark.usefixtures("one_thread")


def as_url(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


REQUEST = {"image": as_url(colourful(90, 60)), "instr": "make it night", "cfg_text": 3, "cfg_image": 1.5}
REQUEST |= {"steps": 2, "seed": 7, "num": 1}


@pytest.fixture
def server(model_folder, tmp_path):
    """A server with a tiny model, in this process."""
    options = make_parser().parse_args([f"--weights={model_folder}", "--device=cpu", "--dtype=float32"])
    server = make_server(sample.load_model(options), options, tmp_path / "served", 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server, path, body=None, **headers):
    """(status, content) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if answer.headers["Content-Type"] == "application/json" else content


def finished(server, job, seconds=60):
    """A job, once it has ended."""
    end = time.monotonic() + seconds
    while job["state"] in ("waiting", "running"):
        assert time.monotonic() < end
        time.sleep(0.02)
        _, job = ask(server, f"/jobs/{job['name']}")
    return job


def edit(server, **changes):
    status, job = ask(server, "/jobs", REQUEST | changes)
    assert status == 200, job
    return finished(server, job)


@pytest.mark.parametrize("num", [1, 2])
def test_an_edit_is_that_of_sample(server, run_main, tmp_path, model_folder, num):
    job = edit(server, num=num)
    colourful(90, 60).save(tmp_path / "x.png")
    given = ["--image", tmp_path / "x.png", "--instr", REQUEST["instr"], "--weights", model_folder, "--num", num]
    given += ["--cfg-text", 3, "--cfg-image", 1.5, "--steps", 2, "--seed", 7, "--dtype=float32", "--device=cpu"]
    run_main(sample, *given, "--out", tmp_path / "y.png")
    names = ["y.png"] if num == 1 else ["y_seed7.png", "y_seed8.png"]
    urls = [url for url in job["files"] if "/edit" in url]
    for name, url in zip(names, urls, strict=True):
        (tmp_path / "served.png").write_bytes(ask(server, url)[1])
        assert open_image(tmp_path / "served.png") == open_image(tmp_path / name)
    again = run_main(sample, "--again", tmp_path / "served.png", "--out", tmp_path / "z.png")  # as it was downloaded
    assert again.code == 0
    assert open_image(tmp_path / "z.png") == open_image(tmp_path / names[-1])
    assert read_settings(tmp_path / "served.png")["seed"] == 6 + num
    assert (job["files"][-1].endswith("explain.html")) == (num == 1)
    assert job["preview"] == ""
    assert job["total"] == 2 * num == job["step"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": "data:;base64,AAAA"}, "the image cannot be read as an image"),
        ({"image": REQUEST["image"][:-400]}, "the image cannot be read as an image"),
        ({"image": "data:;base64,%%%"}, "the request cannot be read"),
        ({"image": None}, "the request cannot be read"),
        ({"image": as_url(colourful(100, 5))}, "at least 8 pixels a side"),
        ({"instr": "  "}, "the instruction is empty"),
        ({"instr": None}, "should be a text"),
        ({"steps": float("inf")}, "the request cannot be read"),
        ({"steps": 0}, "the steps should be a whole number between 1 and 1000"),
        ({"cfg_text": float("nan")}, "the text guidance should be between"),
        ({"seed": -1}, "a seed should be a whole number"),
        ({"num": 10**6}, "variants should be from 1 to 16"),
    ],
)
def test_mistakes(server, changes, words):
    status, content = ask(server, "/jobs", REQUEST | changes)
    assert (status, words in content["message"]) == (400, True), content
    assert not list(server.studio.folder.glob("*"))  # nothing is left of it


def test_an_instruction_is_never_the_name_of_a_file(server, tmp_path):
    (tmp_path / "secret.txt").write_text("make it a secret")
    job = edit(server, instr=str(tmp_path / "secret.txt"))
    assert job["settings"]["instr"] == str(tmp_path / "secret.txt")
    assert b"make it a secret" not in ask(server, job["files"][-1])[1]


def test_other_pages_and_paths_are_refused(server):
    port, job = server.server_address[1], edit(server)
    for headers in ({"Host": f"evil.example:{port}"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        assert ask(server, "/", **headers)[0] == 403
        assert ask(server, "/jobs", REQUEST, **headers)[0] == 403
    assert ask(server, "/", Origin=f"http://127.0.0.1:{port}")[0] == 200
    own = f"/files/{job['name']}"
    outside = "/files/../../x.png", f"{own}/../input", f"{own}/%2e%2e/input", "/files//etc"
    for path in (*outside, f"{own}/x", "/x", "/jobs/x"):
        assert ask(server, path)[0] == 404
    assert ask(server, "/jobs/x/cancel", {})[0] == 404
    assert server.server_address[0] == "127.0.0.1"


def test_broken_uploads(server):
    """Too long, no JSON, and connections that end in the middle or stay silent: none of them hangs the server."""
    header = b"POST /jobs HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Length: 9999\r\n\r\n{" % server.server_address[1]
    assert ask(server, "/jobs", b"", **{"Content-Length": str(10**9)})[0] == 413
    status, content = ask(server, "/jobs", REQUEST | {"image": "data:;base64," + "A" * 26_666_672})
    assert (status, content["message"]) == (400, "the image has more than 20 MB")
    assert ask(server, "/jobs", b"[1")[0] == ask(server, "/jobs", b"[1]")[0] == 400
    for _ in range(5):
        with socket.create_connection(server.server_address) as half:
            half.sendall(header)
    with socket.create_connection(server.server_address):
        assert edit(server)["state"] == "done"


def test_many_at_once_and_the_end_of_some(server):
    """50 edits wait in a queue and see their place; those that are cancelled, waiting or running, make room."""
    long = ask(server, "/jobs", REQUEST | {"steps": 1000, "num": 16})[1]
    with ThreadPoolExecutor(50) as pool:
        requests = [REQUEST | {"seed": seed, "steps": 1} for seed in range(50)]
        jobs = [job for _, job in pool.map(lambda request: ask(server, "/jobs", request), requests)]
    assert sorted(job["place"] for job in jobs) == list(range(1, 51))
    for job in jobs[5:]:
        assert ask(server, f"/jobs/{job['name']}/cancel", {})[1]["state"] == "cancelled"
    ask(server, f"/jobs/{long['name']}/cancel", {})
    assert finished(server, long)["state"] == "cancelled"
    assert [finished(server, job)["state"] for job in jobs] == ["done"] * 5 + ["cancelled"] * 45


def test_a_failed_edit_is_told_and_the_next_one_has_its_turn(server, monkeypatch):
    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(server.studio.model, "decode", fail)
        job = edit(server)
    assert (job["state"], "there is not enough memory" in job["message"]) == ("failed", True)
    assert edit(server)["state"] == "done"


@pytest.mark.slow
def test_memory_stays_flat(server):
    """Over 200 edits: the live objects of Python, and the process's memory in MB."""

    def after(count):
        for seed in range(count):
            edit(server, steps=1, seed=seed)
        gc.collect()
        with open("/proc/self/statm") as file:
            return len(gc.get_objects()), int(file.read().split()[1]) * 4096 / 1e6

    after(20)
    objects, memory = after(20)
    more_objects, more_memory = after(160)
    assert more_objects - objects < 160 * 20
    assert more_memory - memory < 60


def test_in_a_browser(browser, choose, server, tmp_path):
    """Every control of the page."""

    def until(condition):
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end, browser.find_element("tag name", "body").text
            time.sleep(0.05)

    def cards():
        return browser.find_elements("css selector", "#history article")

    def message():
        return browser.find_element("id", "message").text

    browser.get(f"http://127.0.0.1:{server.server_address[1]}/")
    go, upload = browser.find_element("id", "go"), browser.find_element("id", "file")
    go.click()  # the example
    until(lambda: len(cards()) == 1)
    colourful(80, 64, 1).save(tmp_path / "mine.png")
    upload.send_keys(str(tmp_path / "mine.png"))
    settings = {"instr": "paint it", "cfg_text": 5.5, "cfg_image": 1.2, "steps": 3, "seed": 1, "num": 2}
    for name, value in settings.items():
        choose(name, value)
    assert browser.find_element("id", "cfg_text_shown").text == "5.5"
    browser.find_element("id", "instr").send_keys("\ue007")  # the return key
    until(lambda: len(cards()) == 2)
    assert "s_T 5.5, s_I 1.2, 3 steps, seed 1" in cards()[0].text
    assert len(cards()[0].find_elements("css selector", "a[download]")) == 2
    assert [link.text for link in cards()[1].find_elements("tag name", "a")] == ["Download", "See inside"]

    (tmp_path / "none.png").write_text("no image")
    upload.send_keys(str(tmp_path / "none.png"))
    until(lambda: browser.execute_script("return image").endswith(base64.b64encode(b"no image").decode()))
    go.click()
    until(lambda: "the image cannot be read as an image" in message())
    (tmp_path / "large.png").write_bytes(bytes(20_000_001))
    upload.send_keys(str(tmp_path / "large.png"))
    until(lambda: message() == "large.png has more than 20 MB")

    cards()[0].find_element("tag name", "button").click()  # again
    until(lambda: browser.execute_script("return image").startswith("data:application/octet-stream;base64,iVBOR"))
    choose("num", 16)
    choose("steps", 1000)
    before = browser.find_element("id", "seed").get_property("value")
    browser.find_element("id", "dice").click()
    assert browser.find_element("id", "seed").get_property("value") != before
    go.click()
    until(lambda: browser.find_element("id", "preview").is_displayed())
    assert "of 16000" in browser.find_element("id", "status").text
    browser.find_element("id", "cancel").click()
    until(lambda: message() == "cancelled")
    browser.refresh()
    until(lambda: len(cards()) == 2)  # the history is the server's
    browser.get(cards()[1].find_element("link text", "See inside").get_attribute("href"))
    until(lambda: browser.find_elements("xpath", "//article[h2='Words']//button"))
    assert browser.find_element("id", "title").text == "make it night"
