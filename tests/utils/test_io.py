import os
import stat

from halodet.checkpoint import read_checkpoint, write_weights
from halodet.errors import CheckpointError
from halodet.utils.io import remove_leftovers, write_json

import pytest
import torch
from helpers import ROOT, run_code

KINDS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def tensors():
    generator = torch.Generator().manual_seed(0)
    made = {f"{kind}": (torch.rand(3, 2, generator=generator) * 5).to(kind) for kind in KINDS}
    made |= {"scalar": torch.tensor(2**40), "empty": torch.empty(0, 4), "nan": torch.tensor([float("nan"), -0.0])}
    base = torch.rand(4, 6, generator=generator)
    return made | {
        "base": base,
        "transposed": base.T,
        "row": base[1],
        "again": base,
        "parameter": torch.nn.Parameter(base[:, ::2]),
    }


def bits(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip_is_bit_equal(tmp_path, suffix):
    written = tensors()
    write_weights(tmp_path / f"a{suffix}", written, metadata={"variant": "H4"})
    checkpoint = read_checkpoint(tmp_path / f"a{suffix}")
    assert checkpoint["metadata"]["variant"] == "H4"
    assert sorted(checkpoint["model"]) == sorted(written)
    for name, tensor in written.items():
        assert bits(checkpoint["model"][name]) == bits(tensor), name


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_nothing_is_left_behind_by_a_failure(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_weights(path, {"w": torch.ones(2)})
    with pytest.raises(CheckpointError, match="'epoch': 3"):
        write_weights(path, {"w": torch.zeros(2)}, metadata={"epoch": 3})
    with pytest.raises(Exception):  # noqa: B017 - whatever the library says of something that is no tensor
        write_weights(path, {"w": "no tensor"})
    assert os.listdir(tmp_path) == [path.name]
    assert read_checkpoint(path)["model"]["w"].tolist() == [1, 1]


def test_a_view_does_not_bring_along_the_whole(tmp_path):
    write_weights(tmp_path / "a.pth", {"w": torch.zeros(1_000_000)[:2]})
    assert (tmp_path / "a.pth").stat().st_size < 10_000


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_weights(tmp_path / "a.pth", {"w": torch.ones(1)})
    assert stat.S_IMODE((tmp_path / "a.pth").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize(
    ("path", "reason"), [("a.pkl", ".safetensors or .pth"), ("none/a.pth", "No such file or directory")]
)
def test_places_that_cannot_be_written(tmp_path, path, reason):
    with pytest.raises(CheckpointError, match=reason) as caught:
        write_weights(tmp_path / path, {"w": torch.ones(1)})
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


LIMITED = """
import resource
import torch
from halodet.errors import CheckpointWriteError
from halodet.checkpoint import write_weights
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    write_weights({path!r}, {{"w": torch.zeros(2**20)}})
except CheckpointWriteError as error:
    print(error)
"""


def test_a_write_that_the_system_limits_leaves_the_old_file(tmp_path):
    path, folder = tmp_path / "weights/a.pth", tmp_path / "weights"
    folder.mkdir()
    write_weights(path, {"w": torch.ones(2)})
    run = run_code(LIMITED.format(path=str(path)), tmp_path, ROOT)
    assert run.stdout.strip() == f"{path} cannot be written (File too large).", run.stderr
    assert os.listdir(folder) == ["a.pth"] and read_checkpoint(path)["model"]["w"].tolist() == [1, 1]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    write = f"atomic_write({str(folder / 'a.pth')!r}, lambda file: os._exit(9))"
    assert run_code(f"import os; from halodet.utils.io import atomic_write; {write}", tmp_path, ROOT).returncode == 9
    (left,) = os.listdir(folder)
    (folder / ".b.pth.part").touch()
    assert remove_leftovers(folder, "a*.pth") == [left] and os.listdir(folder) == [".b.pth.part"]


def test_data_reach_the_disk_before_the_rename_and_the_name_after_it(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: order.append(os.fstat(handle).st_ino) or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda source, target: order.append("rename") or replace(source, target))
    write_json(tmp_path / "a.json", {})
    assert order == [(tmp_path / "a.json").stat().st_ino, "rename", tmp_path.stat().st_ino]
