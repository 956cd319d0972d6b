import functools
import http.server
import sys
import threading
import time

from halodet.errors import CheckpointError

import pytest
import safetensors.torch
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from helpers import ROOT, assert_same_tensors, run_code

timm = pytest.importorskip("timm", reason="timm is not installed")
hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

NAME = "halonet26t.a1h_in1k"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def state_dict():
    torch.manual_seed(0)
    return timm.create_model("halonet26t").state_dict()


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of the hub and of Detectron2, and no way to the hub."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "detectron2"))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def fill_cache(folder, name, write, file="model.safetensors"):
    repository = folder / "hub" / f"models--timm--{name}"
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    write(repository / "snapshots" / COMMIT / file)


@pytest.mark.parametrize("url", [f"timm://{NAME}", "timm://halonet26t", f"timm://{NAME}?matching_heuristics=True"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_gives_detectron2_a_file_with_timms_tensors(caches, state_dict, url, file):
    write = functools.partial(torch.save if file.endswith("bin") else safetensors.torch.save_file, state_dict)
    fill_cache(caches, NAME, write, file)
    local = PathManager.get_local_path(url)
    assert local == str(caches / "detectron2" / "timm" / f"{NAME}.pth")
    checkpoint = torch.load(local, weights_only=True)
    assert_same_tensors(checkpoint["model"], state_dict)
    assert (checkpoint["__author__"], checkpoint["matching_heuristics"]) == ("timm", True)
    assert checkpoint["metadata"]["architecture"] == "halonet26t"
    assert list(checkpoint["metadata"]["mean"]) == list(timm.get_pretrained_cfg(NAME).mean)


def test_plain_detectron2_fills_a_model_whose_names_end_with_timms(caches, state_dict):
    fill_cache(caches, NAME, functools.partial(safetensors.torch.save_file, state_dict))

    class Detector(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Module()
            self.backbone.bottom_up = timm.create_model("halonet26t", num_classes=0)

    model = Detector()
    DetectionCheckpointer(model).load(f"timm://{NAME}")
    filled = model.backbone.bottom_up.state_dict()
    assert_same_tensors(filled, {name: state_dict[name] for name in filled})


def test_a_second_time_neither_timm_nor_the_hub_is_asked(caches, state_dict, monkeypatch):
    fill_cache(caches, NAME, functools.partial(safetensors.torch.save_file, state_dict))
    first = PathManager.get_local_path(f"timm://{NAME}")
    (caches / "hub").rename(caches / "gone")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert PathManager.get_local_path(f"timm://{NAME}") == first


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs: a repository with one file."""

    content = b""

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        if self.answer():
            self.wfile.write(self.content)

    def answer(self):
        there = not self.path.startswith("/timm/") or self.path == f"/timm/{NAME}/resolve/main/pytorch_model.bin"
        self.send_response(200 if there else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        if there:
            self.send_header("ETag", '"abc"')
            self.send_header("Content-Length", str(len(self.content)))
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
        self.end_headers()
        return there

    def log_message(self, *_):
        pass


def test_fetches_from_the_hub(caches, state_dict, monkeypatch, tmp_path):
    torch.save(state_dict, tmp_path / "weights")
    monkeypatch.setattr(Hub, "content", (tmp_path / "weights").read_bytes())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        local = PathManager.get_local_path(f"timm://{NAME}")
    finally:
        server.shutdown()
        server.server_close()
    assert_same_tensors(torch.load(local, weights_only=True)["model"], state_dict)


def refusal(url):
    with pytest.raises(CheckpointError) as caught:
        PathManager.get_local_path(url)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    return str(caught.value)


def test_offline_says_what_to_fetch_and_at_once(caches, monkeypatch):
    fix = f"download model.safetensors of the hub's repository timm/{NAME}"
    assert fix in refusal(f"timm://{NAME}")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    message = refusal(f"timm://{NAME}")
    assert fix in message and "cannot be reached" in message
    assert time.monotonic() - start < 8


def test_unknown_names_tell_the_nearest(caches):
    assert "halonet50ts.a1h_in1k" in refusal("timm://halonet50t")
    assert "sehalonet33ts.ra2_in1k" in refusal("timm://zzzzzz")
    assert "resnet50" in refusal("timm://resnet-50")
    assert "expected halonet26t.a1h_in1k" in refusal("timm://halonet26t.other_tag")
    assert "timm has none for this network" in refusal("timm://halonet_h1")
    for name in ("", "../../x", "a/b", ".."):
        assert "expected a timm model" in refusal(f"timm://{name}")


def test_a_damaged_file_in_the_hubs_cache_leaves_nothing(caches):
    fill_cache(caches, NAME, lambda path: path.write_bytes(b"<html>404</html>"))
    assert "is a web page" in refusal(f"timm://{NAME}")
    assert not list((caches / "detectron2").rglob("*.pth"))


def test_without_timm(caches, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'halodet[timm]'" in refusal(f"timm://{NAME}")


def test_importing_halodet_is_enough_and_does_not_import_timm(tmp_path):
    code = """
import sys, halodet, halodet.errors
from detectron2.utils.file_io import PathManager
assert not {"timm", "huggingface_hub"} & set(sys.modules)
try:
    PathManager.get_local_path("timm://")
except halodet.errors.CheckpointError as error:
    print(error)
"""
    result = run_code(code, tmp_path, ROOT)
    assert "timm:// is invalid" in result.stdout, result.stderr
