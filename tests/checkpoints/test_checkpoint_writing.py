"""Writing folders: readable by safetensors itself, one tensor at a time, whole or not at all."""

import json

import ml_dtypes
import numpy as np
import pytest
from helpers.tiny import NamedArrays
from safetensors import safe_open

from keras_t5gemma.checkpoints.atomic_folder import new_folder
from keras_t5gemma.checkpoints.hugging_face.reader import INDEX_FILE, CheckpointFolder
from keras_t5gemma.checkpoints.hugging_face.writer import write_tensors
from keras_t5gemma.checkpoints.tensor_source import CheckpointError

BF16 = np.dtype(ml_dtypes.bfloat16)


class Arrays(NamedArrays):
    """A source that counts what it hands out."""

    def __init__(self, arrays):
        super().__init__(arrays)
        self.reads = []

    def read(self, name):
        self.reads.append(name)
        return super().read(name)


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return {
        "a": generator.standard_normal((7, 5), dtype="float32"),
        "b.transposed": generator.standard_normal((11, 3), dtype="float32").T,
        "c.half": generator.standard_normal(9).astype("float16"),
        "d.brain": generator.standard_normal((4, 6)).astype(BF16).T,
        "e.empty": np.zeros((0, 3), "float32"),
    }


@pytest.mark.parametrize("size", ["5GB", 150, 1])
def test_written_tensors_are_read_back_bit_for_bit(tmp_path, arrays, size):
    write_tensors(tmp_path, Arrays(arrays), size)
    source = CheckpointFolder(tmp_path)
    assert source.names() == list(arrays)
    for name, array in arrays.items():
        assert source.dtype(name) == array.dtype
        np.testing.assert_array_equal(source.read(name), array)


def test_written_file_is_what_safetensors_reads(tmp_path, arrays):
    write_tensors(tmp_path, Arrays(arrays))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name).float().numpy(), array.astype("float32"))


@pytest.mark.parametrize(
    ("size", "shards"),
    [(10**6, 1), ("1MB", 1), (290, 2), ("0.29 kB", 2), (1, 5)],
)
def test_shards_hold_at_most_the_size_asked_for(tmp_path, arrays, size, shards):
    # Bytes: 140, 132, 18, 48, 0.
    write_tensors(tmp_path, Arrays(arrays), size)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if shards == 1:
        assert files == ["model.safetensors"]
        assert not (tmp_path / INDEX_FILE).exists()
        return
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 338
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) == shards
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"


@pytest.mark.parametrize("size", ["", "5 apples", "-1GB", 0, -3, 2.5, None, True])
def test_shard_size_that_is_none_is_refused(tmp_path, arrays, size):
    with pytest.raises(ValueError, match="max_shard_size"):
        write_tensors(tmp_path, Arrays(arrays), size)


def test_each_tensor_is_read_once_and_in_order(tmp_path, arrays):
    source = Arrays(arrays)
    write_tensors(tmp_path, source, 150)
    assert source.reads == list(arrays)


@pytest.mark.parametrize("wrong", [np.zeros((7, 4), "float32"), np.zeros((7, 5), "float16")], ids=["shape", "dtype"])
def test_tensor_that_is_not_what_was_announced_is_refused(tmp_path, arrays, wrong):
    source = Arrays(arrays)
    source.read = lambda name: wrong if name == "a" else arrays[name]
    with pytest.raises(CheckpointError, match=r"tensor 'a' was announced as float32"):
        write_tensors(tmp_path, source)


def test_tensor_of_another_kind_of_number_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="tensor 'ids' has dtype int64"):
        write_tensors(tmp_path, Arrays({"ids": np.arange(3)}))


def test_folder_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "new" / "folder"
    with new_folder(target) as partial:
        (partial / "file").write_text("content")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["folder"]
    assert (target / "file").read_text() == "content"


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_folder_that_fails_half_way_leaves_nothing(tmp_path, error):
    def fill():
        with new_folder(tmp_path / "folder") as partial:
            (partial / "file").write_text("content")
            raise error

    with pytest.raises(type(error)):
        fill()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_folder_that_exists_is_refused_and_untouched(tmp_path, kind):
    target = tmp_path / "there"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("kept")
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="exists already"), new_folder(target):
        raise AssertionError("the block must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_folder_that_somebody_else_made_meanwhile_is_kept(tmp_path):
    target = tmp_path / "folder"

    def fill():
        with new_folder(target) as partial:
            (partial / "file").write_text("ours")
            target.mkdir()
            (target / "file").write_text("theirs")

    with pytest.raises(CheckpointError, match="in the meantime"):
        fill()
    assert (target / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
