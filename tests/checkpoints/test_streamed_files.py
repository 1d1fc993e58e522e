"""Files to files in pieces: no tensor is held whole."""

import math
import tracemalloc

import numpy as np
import pytest
from helpers.checkpoint_files import BF16
from helpers.peers import (
    tiny_config,
    tiny_gemma_stack,
)
from helpers.tensors import CONFIG
from helpers.tiny import loud_backbone

from keras_t5gemma.checkpoints.adapt import AdaptedTensors
from keras_t5gemma.checkpoints.convert import adapt_gemma2_files, average_checkpoints, convert_checkpoint
from keras_t5gemma.checkpoints.hugging_face.config import Gemma2Config
from keras_t5gemma.checkpoints.hugging_face.reader import CheckpointFolder
from keras_t5gemma.checkpoints.hugging_face.writer import write_tensors
from keras_t5gemma.checkpoints.sources import Source, t5gemma_source
from keras_t5gemma.checkpoints.tensor_source import CHUNK_BYTES, TensorSource
from keras_t5gemma.checkpoints.tensor_table import tensor_specs
from keras_t5gemma.checkpoints.transforms import MeanTensors, cast_tensors


class Stream(TensorSource):
    """Tensors that can be had in pieces only, each of which is made when it is asked for."""

    def __init__(self, shapes, dtype="float32"):
        self._shapes, self._dtype = shapes, np.dtype(dtype)

    def names(self):
        return list(self._shapes)

    def shape(self, name):
        return self._shapes[name]

    def dtype(self, name):
        return self._dtype

    def read(self, name):
        raise AssertionError(f"{name} was read whole")

    def where(self, name=None):
        return "a stream"

    def chunks(self, name):
        left = math.prod(self._shapes[name])
        while left:
            size = min(left, CHUNK_BYTES // self._dtype.itemsize)
            yield np.ones(size, self._dtype)
            left -= size


# Two embeddings of 32 MB in float32, so that a whole one would stand out.
WIDE = {"num_layers": 1, "hidden_dim": 32}
ROWS = 2**18


def adapted_stream(dtype):
    config = Gemma2Config(tiny_gemma_stack(**WIDE), ROWS, 6.0)
    source = Source(config, Stream({tensor.gemma2: tensor.stored_shape for tensor in config.tensors()}, dtype))
    return AdaptedTensors(source, source)


def t5gemma_stream(dtype):
    config = tiny_config(vocabulary_size=ROWS, **WIDE)
    return Stream({tensor.name: tensor.stored_shape for tensor in tensor_specs(config)}, dtype)


@pytest.mark.parametrize(
    "source",
    [
        lambda: adapted_stream("float32"),
        lambda: cast_tensors(adapted_stream("float32"), "bfloat16"),
        lambda: MeanTensors([t5gemma_stream("float32"), t5gemma_stream(BF16)]),
        lambda: cast_tensors(t5gemma_stream(BF16), "float32"),
    ],
    ids=["adapt", "adapt to bfloat16", "average", "convert"],
)
def test_weights_are_streamed_in_pieces_of_a_few_megabytes(tmp_path, source):
    tracemalloc.start()
    try:
        write_tensors(tmp_path, source())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 * CHUNK_BYTES < ROWS * WIDE["hidden_dim"] * 4


@pytest.mark.parametrize("form", ["hf", "hf_sharded"])
def test_untransformed_tensors_of_a_folder_are_never_read_whole(gemma2, tmp_path, monkeypatch, form):
    def refuse(self, name):
        raise AssertionError(f"{name} was read whole")

    monkeypatch.setattr(CheckpointFolder, "read", refuse)
    adapt_gemma2_files(gemma2[f"{form}_large"], gemma2[f"{form}_small"], tmp_path / "adapted", dtype="bfloat16")
    convert_checkpoint(tmp_path / "adapted", tmp_path / "converted", dtype="float32")
    average_checkpoints([tmp_path / "adapted", tmp_path / "converted"], tmp_path / "mean")


def test_pieces_of_a_keras_presets_embedding_are_rows(tmp_path, monkeypatch):
    backbone = loud_backbone(CONFIG)
    backbone.save_to_preset(str(tmp_path / "preset"))
    monkeypatch.setattr("keras_t5gemma.checkpoints.keras_formats.presets.CHUNK_BYTES", 1000)
    source = t5gemma_source(tmp_path / "preset").tensors
    name = "model.encoder.embed_tokens.weight"
    pieces = list(source.chunks(name))
    assert max(piece.nbytes for piece in pieces) <= 1000
    np.testing.assert_array_equal(np.concatenate(pieces), source.read(name).reshape(-1))
