"""Folders that `transformers` wrote, once a run: tests copy what they damage."""

import shutil

import pytest
import transformers
from helpers.checkpoint_files import STACKS
from helpers.peers import hf_gemma2, hf_t5gemma, tiny_config, tiny_gemma_stack, tiny_keras_gemma

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def config():
    """Unbalanced: every number of the two stacks differs."""
    return tiny_config(balanced=False)


@pytest.fixture(scope="session")
def peer(config):
    """The model in the folders, with the encoder's window as a checkpoint has it."""
    return hf_t5gemma(config, published_window=True)


@pytest.fixture(scope="session")
def single_folder(peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "single"
    peer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sharded_folder(peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "sharded"
    peer.save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture(scope="session")
def gemma2_peer():
    return hf_gemma2(tiny_gemma_stack())


@pytest.fixture(scope="session")
def gemma2_folder(gemma2_peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "gemma2"
    gemma2_peer.save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture(scope="session")
def gemma2(tmp_path_factory):
    """Folders with a Gemma 2 each, of two sizes in four formats."""
    root, folders = tmp_path_factory.mktemp("gemma2"), {}
    for seed, (size, stack) in enumerate(STACKS.items()):
        peer, backbone = hf_gemma2(stack, seed=seed), tiny_keras_gemma(stack, seed=seed + 10)
        for form in ("hf", "hf_sharded", "keras", "keras_sharded"):
            folders[f"{form}_{size}"] = root / f"{form}_{size}"
        peer.save_pretrained(folders[f"hf_{size}"])
        peer.save_pretrained(folders[f"hf_sharded_{size}"], max_shard_size="40KB")
        backbone.save_to_preset(str(folders[f"keras_{size}"]))
        folder = folders[f"keras_sharded_{size}"]
        shutil.copytree(folders[f"keras_{size}"], folder)
        (folder / "model.weights.h5").unlink()
        backbone.save_weights(folder / "model.weights.json", max_shard_size=5e-5)
        assert len(list(folder.glob("*.h5"))) > 1
        assert len(list(folders[f"hf_sharded_{size}"].glob("*.safetensors"))) > 1
    return folders


@pytest.fixture(scope="session")
def keras_gemma():
    return tiny_keras_gemma(tiny_gemma_stack())


@pytest.fixture
def damaged(tmp_path):
    """Copies a folder; the copy may be damaged."""

    def copy(folder):
        shutil.copytree(folder, tmp_path / "damaged")
        return tmp_path / "damaged"

    return copy
