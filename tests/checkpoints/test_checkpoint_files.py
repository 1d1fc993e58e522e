"""Reading folders: every tensor bit for bit, and every fault as one error that names file and tensor."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from keras_t5gemma.checkpoints.hugging_face.reader import INDEX_FILE, CheckpointFolder, SafetensorsFile, read_json
from keras_t5gemma.checkpoints.tensor_source import CheckpointError

NAME = "model.decoder.layers.1.cross_attn.k_proj.weight"


@pytest.fixture(params=["single_folder", "sharded_folder"])
def folder(request):
    return request.getfixturevalue(request.param)


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_folder_has_each_tensor_of_the_model_bit_for_bit(folder, peer):
    source = CheckpointFolder(folder)
    expected = {name: parameter.detach().numpy() for name, parameter in peer.named_parameters()}
    assert set(source.names()) == set(expected)
    for name, array in expected.items():
        assert source.shape(name) == array.shape
        assert source.dtype(name) == array.dtype
        np.testing.assert_array_equal(source.read(name), array)


@pytest.mark.parametrize(
    ("torch_dtype", "numpy_dtype"),
    [(torch.float32, "float32"), (torch.float16, "float16"), (torch.bfloat16, ml_dtypes.bfloat16)],
)
def test_file_of_a_dtype_reads_as_that_dtype(tmp_path, torch_dtype, numpy_dtype):
    tensor = torch.randn(3, 5).to(torch_dtype)
    save_file({"a": tensor, "empty": torch.zeros(0, 4, dtype=torch_dtype)}, tmp_path / "model.safetensors")
    source = CheckpointFolder(tmp_path)
    assert source.dtype("a") == np.dtype(numpy_dtype)
    np.testing.assert_array_equal(source.read("a").astype("float32"), tensor.float().numpy())
    assert source.read("empty").shape == (0, 4)


def test_file_is_opened_without_reading_data(tmp_path):
    # A sparse terabyte: only the header can have been read.
    size = 2**40
    write_raw(tmp_path / "model.safetensors", {"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}})
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) + size)
    assert CheckpointFolder(tmp_path).shape("a") == (size // 4,)


def test_tensor_of_another_kind_of_number_is_refused_by_name(tmp_path):
    save_file({"ids": torch.arange(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'ids' has dtype I64.*BF16"):
        CheckpointFolder(tmp_path).read("ids")


def test_folder_without_the_tensor_asked_for_names_it(folder):
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.nothing'"):
        CheckpointFolder(folder).read("model.nothing")


def test_folder_without_weights_says_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        CheckpointFolder(tmp_path)


def test_folder_with_pickled_weights_only_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin would have to be unpickled"):
        CheckpointFolder(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_file_cut_short_is_refused_by_name(damaged, single_folder, keep):
    path = damaged(single_folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        CheckpointFolder(path.parent)


def test_file_with_bytes_to_spare_is_refused(damaged, single_folder):
    path = damaged(single_folder) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has \d+ bytes, but its header describes \d+"):
        CheckpointFolder(path.parent)


def test_file_cut_short_after_it_was_opened_names_the_tensor(damaged, single_folder):
    source = CheckpointFolder(damaged(single_folder))
    path = source.folder / "model.safetensors"
    last = max(source.names(), key=lambda name: SafetensorsFile(path).tensors[name].end)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor '{last}' .*truncated"):
        source.read(last)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "Expected an object"),
        (b'{"a": {}, "a": {}}', "'a' comes twice"),
        ({"a": 1}, "entry for tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "entry for tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "entry for tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "entry for tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}, "entry for tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, "entry for tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, "entry for tensor 'a'"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "do not make F32 of shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "leaves a hole"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
            },
            "tensor 'b' overlaps",
        ),
    ],
)
def test_file_with_a_wrong_header_is_refused(tmp_path, header, message):
    write_raw(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointFolder(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_index_naming_a_missing_shard_is_refused_by_file(damaged, sharded_folder):
    folder = damaged(sharded_folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name} cannot be read"):
        CheckpointFolder(folder)


@pytest.mark.parametrize(
    "file", ["../a.safetensors", "/a.safetensors", "b/a.safetensors", "b\\a.safetensors", "..", "", 3]
)
def test_index_pointing_elsewhere_is_refused(damaged, sharded_folder, file):
    folder = damaged(sharded_folder)
    edit_json(folder / INDEX_FILE, lambda index: index["weight_map"].update({NAME: file}))
    with pytest.raises(CheckpointError, match=rf"{NAME}.*Expected the plain name"):
        CheckpointFolder(folder)


def test_index_naming_a_tensor_its_shard_does_not_hold_is_refused(damaged, sharded_folder):
    folder = damaged(sharded_folder)
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))

    def move(index):
        other = next(shard for shard in shards if shard != index["weight_map"][NAME])
        index["weight_map"][NAME] = other

    edit_json(folder / INDEX_FILE, move)
    with pytest.raises(CheckpointError, match=rf"holds no tensor '{NAME}'"):
        CheckpointFolder(folder)


def test_index_that_leaves_a_tensor_out_is_refused(damaged, sharded_folder):
    folder = damaged(sharded_folder)
    edit_json(folder / INDEX_FILE, lambda index: index["weight_map"].pop(NAME))
    with pytest.raises(CheckpointError, match=rf"1 tensor\(s\) that .*index.json does not put there.*{NAME}"):
        CheckpointFolder(folder)


@pytest.mark.parametrize("weight_map", [None, {}, []])
def test_index_without_weight_map_is_refused(damaged, sharded_folder, weight_map):
    folder = damaged(sharded_folder)
    edit_json(folder / INDEX_FILE, lambda index: index.update(weight_map=weight_map))
    with pytest.raises(CheckpointError, match="no `weight_map`"):
        CheckpointFolder(folder)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read"), ("{", "not JSON"), ("3", "Expected an object")]
)
def test_config_that_is_no_json_object_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{message}"):
        read_json(tmp_path / "config.json")
