"""Damaged folders: the same weights, or one error that names the file. No other error, no hang, no wrong weights.

A thousand folders damaged at random, a tenth of them Keras presets; a failure names the seed that repeats it.
"""

import io
import json
import os
import signal
import tracemalloc

import h5py
import numpy as np
import pytest
from helpers import damage
from helpers.gemma2_folder import write_gemma2
from helpers.peers import tiny_config, tiny_gemma_stack
from helpers.tiny import NamedArrays, loud_backbone

from keras_t5gemma.checkpoints.hugging_face.export import write_checkpoint
from keras_t5gemma.checkpoints.sources import gemma2_source, t5gemma_source
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.checkpoints.tensor_table import tensor_specs

# Some 20 KB, so that a folder is written and read in milliseconds.
CONFIG = tiny_config(
    balanced=False,
    num_layers=1,
    hidden_dim=8,
    intermediate_dim=12,
    vocabulary_size=24,
    encoder={"hidden_dim": 10},
)
SECONDS = 10  # a folder
MEGABYTES = 16  # beyond what was in use; Python's parser needs most of it, for JSON of 100,000 nested lists
ANYWHERE = (
    damage.flip_header,
    damage.change_header_length,
    damage.replace_header,
    damage.truncate,
    damage.empty,
    damage.extend,
    damage.remove_file,
    damage.change_shape,
    damage.change_dtype,
    damage.change_offsets,
    damage.change_entry,
    damage.duplicate_entry,
    damage.change_metadata,
    damage.replace_json,
    damage.change_config,
)
IN_SHARDS = (damage.swap_shards, damage.copy_shard, damage.change_index, damage.duplicate_in_index)
IN_DATA = (damage.flip_data, damage.blank_data, damage.swap_data)


@pytest.fixture(scope="module")
def arrays():
    generator = np.random.default_rng(0)
    return {
        tensor.name: generator.standard_normal(tensor.stored_shape, dtype="float32") for tensor in tensor_specs(CONFIG)
    }


@pytest.fixture(scope="module")
def folders(arrays, tmp_path_factory):
    """The files of a whole folder, by kind."""
    root = tmp_path_factory.mktemp("whole")
    write_checkpoint(root / "single", CONFIG, NamedArrays(arrays))
    write_checkpoint(root / "sharded", CONFIG, NamedArrays(arrays), max_shard_size=2500)
    return {kind: files_of(root / kind) for kind in ("single", "sharded")}


@pytest.fixture(scope="module")
def keras_folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    backbone = loud_backbone(CONFIG)
    for kind in ("single", "sharded"):
        backbone.save_to_preset(str(root / kind))
    (root / "sharded" / "model.weights.h5").unlink()
    backbone.save_weights(root / "sharded" / "model.weights.json", max_shard_size=1e-5)
    return {kind: files_of(root / kind) for kind in ("single", "sharded")}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_folder(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    # What an index may be made to name.
    os.mkfifo(folder / "pipe.safetensors")
    for kind, target in (("loop", "loop.safetensors"), ("text", __file__), ("device", "/dev/zero"), ("folder", "/")):
        (folder / f"{kind}.safetensors").symlink_to(target)


def read_twice(source):
    """Every tensor, read whole and by pieces, which must agree."""
    found = {}
    for name in source.names():
        found[name] = source.read(name)
        pieces = [piece.copy() for piece in source.chunks(name)]
        assert b"".join(piece.tobytes() for piece in pieces) == found[name].tobytes()
    return found


def outcome(folder, find=t5gemma_source):
    """What a folder ends in, in bounded time: its weights or its one error. Any other exception fails the test."""

    def give_up(*_):
        raise TimeoutError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return read_twice(find(folder).tensors)
    except CheckpointError as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def same(found, arrays):
    """Whether the weights are these bit for bit. Redundant tensors, such as a tied output, may be there besides."""
    return found.keys() >= arrays.keys() and all(
        found[name].dtype == array.dtype
        and found[name].shape == array.shape
        and found[name].tobytes() == array.tobytes()
        for name, array in arrays.items()
    )


def each_damaged(hurt, files, tmp_path, seeds, find=t5gemma_source):
    """(seed, tensor inside which the damage is, outcome) for each seed, whose errors and memory have been checked."""
    tracemalloc.start()
    try:
        for seed in seeds:
            copy, folder = dict(files), tmp_path / f"seed_{seed}"
            clues, tensor = hurt(copy, np.random.default_rng(seed))
            write_folder(folder, copy)
            tracemalloc.reset_peak()
            start, _ = tracemalloc.get_traced_memory()
            found = outcome(folder, find)
            peak = tracemalloc.get_traced_memory()[1] - start
            assert peak < MEGABYTES * 2**20, f"seed {seed} took {peak} bytes"
            if isinstance(found, CheckpointError):
                message = str(found)
                assert str(folder) in message, f"seed {seed}: {message}"
                assert any(clue in message for clue in clues), f"seed {seed}: {message} names none of {clues}"
                assert tensor is None or tensor in message, f"seed {seed}: {message} does not name {tensor}"
                assert len(message) < 2000, f"seed {seed}"
            yield seed, tensor, found
    finally:
        tracemalloc.stop()


def assert_same_or_refused(hurt, files, arrays, tmp_path, seeds):
    for seed, _, found in each_damaged(hurt, files, tmp_path, seeds):
        assert isinstance(found, CheckpointError) or same(found, arrays), f"seed {seed}: other weights in silence"


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_undamaged_folder_has_its_weights(kind, folders, arrays, tmp_path):
    write_folder(tmp_path / "whole", folders[kind])
    assert same(outcome(tmp_path / "whole"), arrays)


@pytest.mark.parametrize("hurt", ANYWHERE, ids=lambda hurt: hurt.__name__)
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_damaged_folder_has_the_same_weights_or_names_the_file(hurt, kind, folders, arrays, tmp_path):
    assert_same_or_refused(hurt, folders[kind], arrays, tmp_path, range(20))


@pytest.mark.parametrize("hurt", IN_SHARDS, ids=lambda hurt: hurt.__name__)
def test_damaged_shards_have_the_same_weights_or_name_the_file(hurt, folders, arrays, tmp_path):
    assert_same_or_refused(hurt, folders["sharded"], arrays, tmp_path, range(100, 125))


@pytest.mark.parametrize("hurt", IN_DATA, ids=lambda hurt: hurt.__name__)
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_damaged_data_names_the_file_and_the_tensor(hurt, kind, folders, arrays, tmp_path):
    for seed, tensor, found in each_damaged(hurt, folders[kind], tmp_path, range(200, 225)):
        assert isinstance(found, CheckpointError) or same(found, arrays), f"seed {seed}: other weights in silence"
        assert tensor is None or "checksum" in str(found), f"seed {seed}"


def without_checksums(files):
    """As other programs write a folder."""
    changed = dict(files)
    for file in damage.weight_files(files):
        header, data = damage.split(files[file])
        del header["__metadata__"]["xxh3_64"]
        changed[file] = damage.join(header, data)
    return changed


@pytest.mark.parametrize("hurt", ANYWHERE + IN_SHARDS, ids=lambda hurt: hurt.__name__)
def test_damaged_folder_without_checksums_has_the_same_weights_or_names_the_file(hurt, folders, arrays, tmp_path):
    assert_same_or_refused(hurt, without_checksums(folders["sharded"]), arrays, tmp_path, range(300, 308))


def test_flipped_bit_without_checksums_passes_in_silence_in_its_tensor_alone(folders, arrays, tmp_path):
    for seed, tensor, found in each_damaged(
        damage.flip_data, without_checksums(folders["single"]), tmp_path, range(400, 420)
    ):
        others = {name: array for name, array in arrays.items() if name != tensor}
        assert same(found, others), f"seed {seed}"
        assert not same(found, arrays), f"seed {seed}"


@pytest.mark.parametrize("hurt", [damage.change_config, damage.replace_json], ids=lambda hurt: hurt.__name__)
def test_damaged_gemma2_has_the_same_weights_or_names_the_file(hurt, tmp_path):
    arrays = write_gemma2(tmp_path / "whole", tiny_gemma_stack(num_layers=1, hidden_dim=8))
    files = files_of(tmp_path / "whole")
    for seed, _, found in each_damaged(hurt, files, tmp_path, range(500, 550), gemma2_source):
        assert isinstance(found, CheckpointError) or same(found, arrays), f"seed {seed}: other weights in silence"


def flip_structure(files, generator):
    """Bits of an h5 file that hold no tensor's numbers."""
    file = damage.pick(generator, damage.weight_files(files))
    changed, data = bytearray(files[file]), [*data_ranges(files[file])]
    for _ in range(3):
        at = int(generator.integers(len(changed)))
        if not any(begin <= at < end for begin, end in data):
            changed[at] ^= 1 << int(generator.integers(8))
    files[file] = bytes(changed)
    return [file, "missing", "fewer than"], None


def data_ranges(content):
    """Where an h5 file's numbers lie."""
    found = []

    def visit(_, item):
        if isinstance(item, h5py.Dataset):
            found.append((item.id.get_offset(), item.id.get_offset() + item.nbytes))

    with h5py.File(io.BytesIO(content), "r") as file:
        file.visititems(visit)
    return found


@pytest.mark.parametrize(
    "hurt",
    [
        flip_structure,
        damage.truncate,
        damage.remove_file,
        damage.replace_json,
        damage.change_config,
        damage.swap_shards,
    ],
    ids=lambda hurt: hurt.__name__,
)
def test_damaged_keras_preset_names_the_file_or_has_weights_of_its_config(hurt, keras_folders, tmp_path):
    # HDF5 has no checksums: an address that was changed may lead to other numbers, which nothing can tell.
    write_folder(tmp_path / "whole", keras_folders["single"])
    whole = outcome(tmp_path / "whole")
    for seed, _, found in each_damaged(hurt, keras_folders["sharded"], tmp_path, range(600, 618)):
        if isinstance(found, CheckpointError):
            continue
        if hurt is flip_structure:
            assert {name: array.shape for name, array in found.items()} == {
                name: array.shape for name, array in whole.items()
            }, f"seed {seed}"
        else:
            assert same(found, whole), f"seed {seed}: other weights in silence"


@pytest.mark.parametrize("storage", ["external", "virtual"])
def test_keras_preset_whose_numbers_lie_in_another_file_is_refused(storage, keras_folders, tmp_path):
    write_folder(tmp_path / "preset", keras_folders["single"])
    name = "layers/encoder/final_norm/vars/0"
    (tmp_path / "secret").write_bytes(bytes(40))
    with h5py.File(tmp_path / "preset" / "model.weights.h5", "r+") as file:
        del file[name]
        if storage == "external":
            file.create_dataset(name, (10,), "float32", external=[(str(tmp_path / "secret"), 0, 40)])
        else:
            layout = h5py.VirtualLayout((10,), "float32")
            layout[:] = h5py.VirtualSource(tmp_path / "secret", "a", (10,))
            file.create_virtual_dataset(name, layout)
    with pytest.raises(CheckpointError, match=rf"model\.weights\.h5: the data of '{name}' lie in another file"):
        t5gemma_source(tmp_path / "preset")


def test_sharded_keras_preset_whose_index_leaves_the_folder_is_refused(keras_folders, tmp_path):
    write_folder(tmp_path / "preset", keras_folders["sharded"])
    index = tmp_path / "preset" / "model.weights.json"
    for file in ("../model_00000.weights.h5", "/model_00000.weights.h5", "\ud800.h5", 3, "model.bin"):
        index.write_text(json.dumps({"weight_map": {"/layers": file}}))
        with pytest.raises(
            CheckpointError, match=r"model\.weights\.json names .*Expected the plain name of an \.h5 file"
        ):
            t5gemma_source(tmp_path / "preset")
