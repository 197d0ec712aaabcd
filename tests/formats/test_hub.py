"""Short names, the hub's cache and the hub, which a small server of our own stands in for."""

import json
import re
import shutil
import socket
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cli import UserError

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from formats import hub
from formats.checkpoint import load, load_clip, load_vae

MAIN = "0123456789012345678901234567890123456789"


class FakeHub(BaseHTTPRequestHandler):
    """A hub with the folders below ROOT as repositories."""

    log_message = lambda *_: None  # noqa: E731

    def __init__(self, root, *rest):
        self.root = root
        super().__init__(*rest)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/"):
            folder = self.root / "/".join(path.split("/")[3:5])
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            found = [(str(file.relative_to(folder)), file.stat().st_size) for file in files]
            siblings = [{"rfilename": name, "size": size} for name, size in found]
            info = {"id": "x", "sha": MAIN, "siblings": siblings, "cardData": {"license": "mit"}}
            tree = [{"type": "file", "path": name, "size": size, "oid": MAIN} for name, size in found]
            self.answer(json.dumps(tree if "/tree/" in path else info).encode() if files else None)
        else:
            owner, name, _, _, *file = path[1:].split("/")
            path = self.root.joinpath(owner, name, *file)
            self.answer(path.read_bytes() if path.is_file() else None)

    do_HEAD = do_GET  # noqa: N815

    def answer(self, body):
        self.send_response(404 if body is None else 200)
        headers = {"X-Repo-Commit": MAIN, "ETag": f'"{hash(body)}"', "Content-Length": len(body or b"")}
        for name, value in (headers | ({"X-Error-Code": "RepoNotFound"} if body is None else {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")


@pytest.fixture
def endpoint(tmp_path, monkeypatch):
    """Set where the hub is; its cache is empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def endpoint(url):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    return endpoint


@pytest.fixture
def repositories(tmp_path, endpoint):
    """The folder of a running hub's repositories."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(FakeHub, tmp_path / "hub"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint(f"http://127.0.0.1:{server.server_port}")
    yield tmp_path / "hub"
    server.shutdown()
    server.server_close()


def weights(folder):
    return sorted(path for path in folder.rglob("*.safetensors"))


def to_bin(path):
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def to_half(path):
    path.rename(path.with_suffix(".fp16.safetensors"))


def to_shards(path):
    tensors = load_file(path)
    names, where = sorted(tensors), {}
    for number in (1, 2, 3):
        shard = path.with_name(f"{path.stem}-{number:05d}-of-00003.safetensors")
        save_file({name: tensors[name] for name in names[number - 1 :: 3]}, shard)
        where |= dict.fromkeys(names[number - 1 :: 3], shard.name)
    path.with_name(path.name + ".index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    path.unlink()


def test_mini_is_the_bundled_model_that_fits():
    assert load("mini").unet.config.in_channels == 8
    assert load("mini", kind="sd").unet.config.in_channels == 4
    assert load_clip("mini")[1].tokens == load_vae("mini").config.latent_channels + 20


@pytest.mark.parametrize("change", [None, to_bin, to_half, to_shards])
def test_a_model_is_downloaded_once_after_one_line(change, repositories, model_folder, capfd, monkeypatch):
    """Whatever format the repository has its weights in; and nothing that is not needed."""
    folder = shutil.copytree(model_folder, repositories / hub.PUBLIC["ip2p"].repository)
    for path in weights(folder):
        (change or Path)(path)
    for name in ("unet/diffusion_pytorch_model.non_ema.safetensors", "x.ckpt", "safety_checker/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes(10**6))
    expected, model = load(model_folder).unet.state_dict(), load("ip2p")
    assert all(torch.equal(value, expected[name]) for name, value in model.unet.state_dict().items())
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "downloading" in line]
    said = r"downloading the authors' InstructPix2Pix \(timbrooks/instruct-pix2pix\), once: 0.000\d+ GB, licence MIT"
    assert re.fullmatch(said, line)
    cached = {path.name for path in (repositories.parent / "cache").rglob("*")}
    assert not cached & {"diffusion_pytorch_model.non_ema.safetensors", "x.ckpt", "safety_checker"}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    load("ip2p")
    load(f"{folder.parent.name}/{folder.name}")


def test_a_download_that_was_cut_off_is_resumed(repositories, model_folder):
    folder = shutil.copytree(model_folder, repositories / "someone" / "editor")
    load("someone/editor")
    snapshot = repositories.parent / "cache" / "models--someone--editor" / "snapshots" / MAIN
    (snapshot / "vae" / weights(folder / "vae")[0].name).unlink()
    load("someone/editor")
    shutil.rmtree(folder / "vae")
    (snapshot / "vae" / "config.json").unlink()
    (snapshot / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="someone/editor lacks what is needed"):
        load("someone/editor")


def test_an_autoencoder_and_clip_from_repositories_of_their_own(repositories, model_folder):
    shutil.copytree(model_folder / "vae", repositories / hub.PUBLIC["vae"].repository)
    shutil.copytree(hub.MINI / "clip", repositories / hub.PUBLIC["clip"].repository)
    assert load_vae("vae").config == load(model_folder).vae.config
    assert load_clip("clip")[0].config == load_clip("mini")[0].config


def test_without_an_answer_one_line_says_how_to_get_the_files(endpoint, monkeypatch):
    """From a machine that refuses, and from one that never answers."""
    monkeypatch.setattr(hub, "WAIT", 0.5)
    silent = socket.create_server(("127.0.0.1", 0))
    refusing = socket.create_server(("127.0.0.1", 0))
    for server in (silent, refusing):
        endpoint(f"http://127.0.0.1:{server.getsockname()[1]}")
        if server is refusing:
            server.close()
        began = time.monotonic()
        with pytest.raises(
            UserError, match=r"cannot be reached.*huggingface.co/timbrooks/instruct-pix2pix.*--weights mini"
        ):
            load("ip2p")
        assert time.monotonic() - began < 3
    silent.close()
    with pytest.raises(TimeoutError, match="no answer within 0.1 s"):  # as of a silent name server
        hub.in_time(0.1, lambda: time.sleep(5))


def test_a_name_that_the_hub_does_not_know(repositories):
    with pytest.raises(UserError, match="someone/absent .* the hub has no such model"):
        load("someone/absent")
    with pytest.raises(UserError, match="no weights at absent; .* a short name: sd15, mini"):
        load("absent", kind="sd")
