import argparse
import collections
import io
import logging
import os
import pickle
import struct
import tarfile
import zipfile

from halodet.checkpoint import read_checkpoint
from halodet.errors import CheckpointError

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import assert_same_tensors

TENSORS = {
    "conv.weight": torch.arange(24, dtype=torch.float32).reshape(2, 3, 2, 2) / 7,
    "half": torch.tensor([1.5, -0.25], dtype=torch.float16),
    "brain": torch.tensor([[1.5], [3e38]], dtype=torch.bfloat16),
    "norm.num_batches_tracked": torch.tensor(2**40),
    "flag": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
}


class RunsCode:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def refusal(path, **options):
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, **options)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and message.endswith(".")
    return message


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_reads_every_kind_of_tensor_whatever_the_file_is_called(tmp_path, form):
    for name in ("weights.pth", "weights.safetensors", "weights.bin", "weights"):
        path = tmp_path / name
        if form == "safetensors":
            safetensors.torch.save_file(TENSORS, path, metadata={"variant": "H0"})
        else:
            torch.save({"model": TENSORS}, path, _use_new_zipfile_serialization=form == "zip")
        checkpoint = read_checkpoint(path)
        assert sorted(checkpoint["model"]) == sorted(TENSORS)
        assert_same_tensors({name: checkpoint["model"][name] for name in TENSORS}, TENSORS)
        assert checkpoint.get("metadata") == ({"variant": "H0"} if form == "safetensors" else None)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "state_dict_ema", "model_ema", "model_state", None])
def test_takes_the_state_dict_out_of_its_wrapper(tmp_path, wrapper):
    torch.save(TENSORS if wrapper is None else {wrapper: TENSORS, "epoch": 3}, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert_same_tensors(checkpoint["model"], TENSORS)
    assert checkpoint.get("epoch") == (None if wrapper is None else 3)


def test_of_timms_two_state_dicts_the_averaged_one(tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(1)}, "state_dict_ema": {"w": torch.ones(1)}}, tmp_path / "a.pth.tar")
    assert read_checkpoint(tmp_path / "a.pth.tar")["model"]["w"] == 1


def test_what_trainers_put_beside_the_weights(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    written = {
        "model": collections.OrderedDict(w=parameter),
        "optimizer": optimizer.state_dict(),
        "iteration": 7,
        "args": argparse.Namespace(model="halonet26t", lr=0.1),
        "scheduler": {"milestones": collections.Counter([3, 5]), "base_lrs": [np.float64(0.02)]},
        "hooks": collections.OrderedDict(best=np.arange(3.0)),
        "metric": np.float32(0.5),
    }
    torch.save(written, tmp_path / "a.pth")
    read = read_checkpoint(tmp_path / "a.pth")
    assert torch.equal(read["model"]["w"], parameter) and not read["model"]["w"].requires_grad
    assert torch.equal(read["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert (read["iteration"], read["args"]) == (7, written["args"])
    assert read["scheduler"] == {"milestones": {3: 1, 5: 1}, "base_lrs": [0.02]}
    assert read["hooks"]["best"].tolist() == [0, 1, 2]
    again = pickle.loads(pickle.dumps(read["hooks"]["best"]))  # a resumed run saves it in its next checkpoint
    assert type(again) is np.ndarray and again.tolist() == [0, 1, 2]
    assert read["metric"] == 0.5 and type(read["metric"]) is np.float32


def test_reading_leaves_pytorchs_own_allow_list_as_it_was(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save({"model": TENSORS}, tmp_path / "a.pth")
    read_checkpoint(tmp_path / "a.pth")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_reads_pickles_of_arrays_as_detectron2_does(tmp_path, protocol):
    arrays = {
        "conv1_w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big_endian": np.arange(3, dtype=">f4"),
        "scalar": np.int64(4),
        "conv1_w_momentum": np.zeros(2, np.float32),
        "weight_order": "NCHW",
    }
    path = tmp_path / "R-50.pkl"
    for written in (arrays, {"blobs": arrays}):
        path.write_bytes(pickle.dumps(written, protocol=protocol))
        checkpoint = read_checkpoint(path)
        assert (checkpoint["__author__"], checkpoint["matching_heuristics"]) == ("Caffe2", True)
        assert list(checkpoint["model"]) == ["conv1_w", "fortran", "big_endian", "scalar"]
        for name, tensor in checkpoint["model"].items():
            assert np.array_equal(tensor.numpy(), arrays[name])
    path.write_bytes(
        pickle.dumps({"model": arrays, "__author__": "torchvision", "matching_heuristics": True}, protocol=protocol)
    )
    assert read_checkpoint(path)["__author__"] == "torchvision"


def test_reads_what_python_2_and_numpy_1_wrote(tmp_path):
    # {'conv1_w': array([1., 2.], dtype=float32)} as Python 2.7 pickled it: byte strings, and numpy.core
    data = np.float32([1, 2]).tobytes()
    dtype = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K\x02\x85"
        + dtype
        + b"\x89U\x08"
        + data
        + b"tb"
    )
    (tmp_path / "R-50.pkl").write_bytes(b"\x80\x02}U\x07conv1_w" + array + b"s.")
    assert read_checkpoint(tmp_path / "R-50.pkl")["model"]["conv1_w"].tolist() == [1, 2]


def test_pycls_files(tmp_path):
    torch.save(
        {"model_state": {"w": torch.ones(1), "bn.num_batches_tracked": torch.tensor(1)}, "epoch": 1},
        tmp_path / "a.pyth",
    )
    checkpoint = read_checkpoint(tmp_path / "a.pyth")
    assert (
        list(checkpoint["model"]) == ["w"] and checkpoint["__author__"] == "pycls" and checkpoint["matching_heuristics"]
    )


def test_entries_that_are_not_tensors_are_skipped_and_logged(tmp_path, caplog):
    torch.save(
        {"model": {"w": torch.ones(1), "_extra_state": None, "meta": torch.ones(2, device="meta")}}, tmp_path / "a.pth"
    )
    with caplog.at_level(logging.WARNING):
        assert list(read_checkpoint(tmp_path / "a.pth")["model"]) == ["w"]
    assert "Skipped 2 entries" in caplog.text and "_extra_state (NoneType)" in caplog.text


@pytest.mark.parametrize("where", ["model", "beside", "name"])
@pytest.mark.parametrize("form", ["pkl", "pkl as pth", "pkl protocol 0", "zip", "legacy"])
def test_code_in_a_file_does_not_run(tmp_path, form, where):
    marker, path = tmp_path / "ran", tmp_path / ("a.pkl" if form in ("pkl", "pkl protocol 0") else "a.pth")
    bad = RunsCode(marker)
    content = {
        "model": {"w": bad if where == "model" else np.ones(1)},
        "__author__": "x",
        "hooks": bad if where == "beside" else 1,
    }
    if where == "name":
        content["model"][bad] = 1
    if form.startswith("pkl"):
        path.write_bytes(pickle.dumps(content, protocol=0 if form.endswith("0") else 2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    message = refusal(path)
    assert not marker.exists()
    assert "calls os.mkdir" in message and "--allow-pickle" in message
    # the file is what it should be: trusted, it does run
    if where == "beside":
        assert read_checkpoint(path, allow_pickle=True)["model"]["w"] == 1
        assert marker.exists()


@pytest.mark.parametrize("form", ["pkl", "zip"])
def test_arrays_of_objects_are_refused(tmp_path, form):
    marker, path = tmp_path / "ran", tmp_path / f"a.{form}"
    for array in (
        np.array([1, "a"], dtype=object),
        np.array([RunsCode(marker)], dtype=object),
        np.zeros(1, [("a", "f4"), ("b", object)]),
    ):
        if form == "pkl":
            path.write_bytes(pickle.dumps({"w": array}))
        else:
            torch.save({"w": array}, path)
        assert "--allow-pickle" in refusal(path)
        assert not marker.exists()


def test_a_forged_numpy_type_cannot_reach_memory(tmp_path):
    # a float type whose state says that it has a field of objects
    forged = b"cnumpy\ndtype\n(U\x02f8K\x00K\x01tR(K\x03U\x01<N(U\x01at}U\x01a("
    forged += b"cnumpy\ndtype\n(U\x02O8K\x00K\x01tRK\x00tsK\x08K\x01K\x00tb"
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02}U\x01w" + forged + b"s.")
    assert "holds a numpy array of" in refusal(tmp_path / "a.pkl")


def test_a_pickle_cannot_change_what_reads_the_next_one(tmp_path):
    # BUILD with a second state sets attributes, here of the class itself
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02cnumpy\nndarray\n(N}U\x0c__setstate__K\x01stb.")
    refusal(tmp_path / "a.pkl")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({"w": np.ones(2)}))
    assert read_checkpoint(tmp_path / "b.pkl")["model"]["w"].tolist() == [1, 1]


def test_a_list_that_contains_itself(tmp_path):
    nested = []
    for _ in range(60):
        nested = [nested, nested]
    nested.append(nested)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {"w": np.ones(1)}, "__author__": "x", "nested": nested}))
    assert read_checkpoint(tmp_path / "a.pkl")["model"]["w"] == 1


def test_whole_modules_and_programs_are_refused(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")
    assert "calls torch.nn.modules.linear.Linear" in refusal(tmp_path / "module.pth")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/data.pkl", b"")
        archive.writestr("script/constants.pkl", b"")
    refusal(tmp_path / "script.pt")


def test_a_tar_archive_disguised_as_a_checkpoint(tmp_path):
    torch.save(TENSORS, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    magic = (tmp_path / "legacy.pth").read_bytes()[:15].decode("latin1")
    with tarfile.open(tmp_path / "a.pth", "w", format=tarfile.USTAR_FORMAT, encoding="latin1") as archive:
        archive.addfile(tarfile.TarInfo(magic), io.BytesIO())
    assert (tmp_path / "a.pth").read_bytes()[:15].decode("latin1") == magic
    assert "truncated or damaged" in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "pkl"])
@pytest.mark.filterwarnings("ignore")
def test_a_changed_byte_raises_nothing_but_a_checkpoint_error(tmp_path, form):
    path = tmp_path / ("a.pkl" if form == "pkl" else "a.pth")
    if form == "safetensors":
        safetensors.torch.save_file(TENSORS, path)
    elif form == "pkl":
        path.write_bytes(pickle.dumps({"w": np.ones(2), "v": np.float32(1), "list": [1, (2, "3")]}, protocol=2))
    else:
        torch.save({"model": TENSORS, "metric": np.float64(1)}, path, _use_new_zipfile_serialization=form == "zip")
    whole, places = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        content = bytearray(whole)
        content[places.integers(min(600, len(whole)))] = places.integers(256)
        path.write_bytes(content)
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).endswith(".")
    assert refused > 30


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "pkl"])
def test_truncated_files(tmp_path, form):
    path = tmp_path / ("a.pkl" if form == "pkl" else "a.pth")
    if form == "safetensors":
        safetensors.torch.save_file(TENSORS, path)
    elif form == "pkl":
        path.write_bytes(pickle.dumps({name: tensor.float().numpy() for name, tensor in TENSORS.items()}, protocol=2))
    else:
        torch.save({"model": TENSORS}, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 40):
        path.write_bytes(whole[:size])
        message = refusal(path)
        assert "truncated or damaged" in message and f"{size}" in message and "Fix:" in message


def test_a_changed_byte_is_noticed_where_there_are_checksums(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": {"w": torch.arange(1000.0)}}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(500.0, 502.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert "is damaged" in refusal(path) and "data/0" in refusal(path)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": {"w": torch.arange(3.0)}}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(path)["model"]["w"].tolist() == [0, 1, 2]


def test_damaged_headers_of_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    for header in (
        b'{"w":',
        b"[]",
        b'{"w": 3}',
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"w":{"data_offsets":["a","b"]}}',
    ):
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
        refusal(path)
    path.write_bytes(struct.pack("<Q", 2**31) + b"{}")
    assert "truncated" in refusal(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (
            b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
            "is a web page that starts with '<!DOCTYPE html>",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
            "is a text file that starts with 'version https://git-lfs",
        ),
        (b"\x89PNG\r\n\x1a\n\0\0", "starts with the bytes 89 50 4e 47"),
    ],
)
def test_files_that_are_not_checkpoints_are_described(tmp_path, content, expected):
    for name in ("a.pth", "a.pkl", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        assert expected in refusal(tmp_path / name)


def test_checkpoints_without_tensors(tmp_path):
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "a.pth")
    assert "has no tensors, only epoch (int), lr (float)" in refusal(tmp_path / "a.pth")
    torch.save(torch.ones(3), tmp_path / "b.pth")
    assert "holds a Tensor" in refusal(tmp_path / "b.pth")
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
        archive.writestr("notes.txt", b"hello")
    assert "notes.txt" in refusal(tmp_path / "c.pth")


def test_missing_files_and_folders(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.pth")
    assert "is a folder" in refusal(tmp_path)
