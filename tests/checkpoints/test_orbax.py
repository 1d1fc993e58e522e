"""T5Gemma's Flax checkpoints, written here by Orbax itself, have the tensors of the Hugging Face model bit for bit."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorstore
from helpers.flax import flat_tree, flax_tree, write
from helpers.orbax_trees import assert_same, metadata_of, replaced, weights_of, without
from helpers.peers import tiny_config

from keras_t5gemma import presets
from keras_t5gemma.checkpoints.checks import check_source
from keras_t5gemma.checkpoints.orbax.files import is_orbax
from keras_t5gemma.checkpoints.orbax.parameters import COLUMNS, read_orbax_t5gemma
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.checkpoints.tensor_table import TABLE

# As many query as key/value heads, for which self-attention has one stacked parameter.
MULTI_HEAD = {"num_query_heads": 4, "num_key_value_heads": 4}


CONFIG = tiny_config(balanced=False)


@pytest.fixture(scope="module")
def weights():
    return weights_of(CONFIG)


@pytest.fixture(scope="module")
def tree(weights):
    return flax_tree(CONFIG, weights)


@pytest.fixture(scope="module")
def folder(tree, tmp_path_factory):
    return write(tmp_path_factory.mktemp("orbax") / "checkpoint", tree)


def test_columns_are_those_of_the_table_but_the_untied_output():
    assert set(COLUMNS) == {row.path for row in TABLE if not row.untied_only}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("heads", [{}, MULTI_HEAD], ids=["grouped", "multi_head"])
def test_checkpoint_has_each_tensor_of_the_model_bit_for_bit(tmp_path, dtype, balanced, heads):
    config = tiny_config(balanced, **heads)
    weights = weights_of(config, dtype)
    found, source = read_orbax_t5gemma(write(tmp_path / "checkpoint", flax_tree(config, weights)), config)
    assert found == config
    assert_same(source, weights)
    assert check_source(config, source) == []


@pytest.mark.parametrize("transposed", [("encoder",), ("decoder",), ("encoder", "decoder")])
def test_gating_einsum_transposed_as_in_9b_is_told_by_its_shape(tmp_path, weights, transposed):
    _, source = read_orbax_t5gemma(write(tmp_path / "checkpoint", flax_tree(CONFIG, weights, transposed)), CONFIG)
    assert_same(source, weights)


def test_gating_einsum_that_is_square_is_refused(tmp_path):
    config = tiny_config(intermediate_dim=32)
    folder = write(tmp_path / "checkpoint", flax_tree(config, weights_of(config)))
    with pytest.raises(CheckpointError, match=r"layer_0/mlp/gating_einsum' has shape \(2, 32, 32\).*2 D F or 2 F D"):
        read_orbax_t5gemma(folder, config)


@pytest.mark.parametrize(
    "options", [{"use_ocdbt": False}, {"use_zarr3": True}, {"use_ocdbt": False, "use_zarr3": True}], ids=str
)
def test_checkpoint_in_each_of_orbax_storages_is_read(tmp_path, tree, weights, options):
    assert_same(read_orbax_t5gemma(write(tmp_path / "checkpoint", tree, **options), CONFIG)[1], weights)


@pytest.mark.parametrize("ocdbt", [True, False])
def test_checkpoint_with_the_flat_tree_is_read(tmp_path, tree, weights, ocdbt):
    folder = write(tmp_path / "checkpoint", flat_tree(tree), use_ocdbt=ocdbt)
    assert_same(read_orbax_t5gemma(folder, CONFIG)[1], weights)


@pytest.mark.parametrize("ocdbt", [True, False])
def test_checkpoint_of_an_older_orbax_that_does_not_tell_its_storage_is_read(tmp_path, tree, weights, ocdbt):
    folder = write(tmp_path / "checkpoint", tree, use_ocdbt=ocdbt)
    metadata = {"tree_metadata": metadata_of(folder)["tree_metadata"]}
    (folder / "_METADATA").write_text(json.dumps(metadata))
    assert_same(read_orbax_t5gemma(folder, CONFIG)[1], weights)


def test_checkpoint_without_the_files_that_orbax_writes_about_itself_is_read(damaged, folder, weights):
    folder = damaged(folder)
    for name in ("_CHECKPOINT_METADATA", "_sharding", "commit_success.txt"):
        (folder / name).unlink(missing_ok=True)
    assert_same(read_orbax_t5gemma(folder, CONFIG)[1], weights)


def test_checkpoint_is_opened_without_reading_numbers(monkeypatch, folder):
    monkeypatch.setattr(tensorstore.TensorStore, "read", None)
    _, source = read_orbax_t5gemma(folder, CONFIG)
    assert source.shape("model.encoder.norm.weight") == (40,)


def test_one_tensor_of_a_stack_is_read_alone_and_contiguous(folder):
    array = read_orbax_t5gemma(folder, CONFIG)[1].read("model.decoder.layers.0.mlp.up_proj.weight")
    assert array.flags.c_contiguous
    assert (array.base if array.base is not None else array).nbytes == array.nbytes


def test_checkpoint_is_read_without_starting_jax(folder):
    code = (
        "import sys; from keras_t5gemma.checkpoints.orbax.parameters import read_orbax_t5gemma; import tensorstore;"
        "from keras_t5gemma.config import T5GemmaConfig; import json;"
        "config = T5GemmaConfig.from_dict(json.loads(sys.argv[2]));"
        "source = read_orbax_t5gemma(sys.argv[1], config)[1]; source.read('model.encoder.norm.weight');"
        "print([name for name in ('jax', 'keras', 'orbax') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(folder), json.dumps(CONFIG.to_dict())]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def narrow_config(**changes):
    """As narrow as can be, for embeddings with many rows."""
    sizes = {"num_layers": 1, "hidden_dim": 2, "num_query_heads": 2, "num_key_value_heads": 1}
    return tiny_config(**sizes, final_logit_soft_cap=30.0, **changes)


@pytest.mark.parametrize("rows", ["decoder", "both"])
def test_embedding_with_ul2s_extra_rows_is_cut_with_one_notice(tmp_path, rows):
    config = narrow_config(vocabulary_size=256_000)
    weights = weights_of(config, "bfloat16")
    tree = flax_tree(config, weights)
    for stack in ("encoder", "decoder") if rows == "both" else (rows,):
        embedding = weights[f"model.{stack}.embed_tokens.weight"]
        longer = np.concatenate([embedding, np.full((128, 2), 7, embedding.dtype)])
        tree = replaced(tree, f"{stack}/embedder/input_embedding", longer)
    with pytest.warns(UserWarning) as notices:
        _, source = read_orbax_t5gemma(write(tmp_path / "checkpoint", tree), config)
        assert_same(source, weights)
    assert {notice.filename for notice in notices} == {__file__}
    assert [str(notice.message) for notice in notices] == [
        f"{tmp_path}/checkpoint: of 256128 rows of the embeddings, the last 128, UL2's extra ids, are dropped, as in "
        f"every other format of T5Gemma."
    ]


@pytest.mark.parametrize("vocabulary_size", [128, 256, 256_128])
def test_embedding_with_as_many_rows_as_its_config_is_kept(tmp_path, recwarn, vocabulary_size):
    config = narrow_config(vocabulary_size=vocabulary_size)
    weights = weights_of(config)
    assert_same(read_orbax_t5gemma(write(tmp_path / "checkpoint", flax_tree(config, weights)), config)[1], weights)
    assert not [notice for notice in recwarn if "UL2" in str(notice.message)]


def test_embedding_with_other_rows_than_its_config_is_refused(folder):
    config = dataclasses.replace(CONFIG, vocabulary_size=100)
    with pytest.raises(
        CheckpointError, match=r"'encoder/embedder/input_embedding' has shape \(128, 40\). Expected \(100, 40\)"
    ):
        read_orbax_t5gemma(folder, config)


@pytest.mark.parametrize("balanced", [True, False])
def test_sizes_of_published_stacks_are_recognized_by_shapes(tmp_path, monkeypatch, balanced):
    config = tiny_config(balanced, final_logit_soft_cap=30.0)
    monkeypatch.setitem(presets.STACKS, "wide", config.encoder)
    monkeypatch.setitem(presets.STACKS, "narrow", config.decoder)
    weights = weights_of(config)
    found, source = read_orbax_t5gemma(write(tmp_path / "checkpoint", flax_tree(config, weights)))
    assert found == config
    assert_same(source, weights)


def test_sizes_of_multi_head_stacks_are_recognized_by_shapes(tmp_path, monkeypatch):
    config = tiny_config(**MULTI_HEAD, final_logit_soft_cap=30.0)
    monkeypatch.setitem(presets.STACKS, "grouped", dataclasses.replace(config.encoder, num_key_value_heads=2))
    monkeypatch.setitem(presets.STACKS, "multi_head", config.encoder)
    assert read_orbax_t5gemma(write(tmp_path / "checkpoint", flax_tree(config, weights_of(config))))[0] == config


def test_vocabulary_of_256128_rows_is_recognized_as_the_published_one(tmp_path, monkeypatch):
    config = narrow_config(vocabulary_size=256_128)
    monkeypatch.setitem(presets.STACKS, "tiny", config.encoder)
    folder = write(tmp_path / "checkpoint", flax_tree(config, weights_of(config)))
    with pytest.warns(UserWarning, match="UL2"):
        found, source = read_orbax_t5gemma(folder)
    assert found.vocabulary_size == 256_000
    assert source.shape("model.decoder.embed_tokens.weight") == (256_000, 2)


def test_sizes_that_no_published_stack_has_are_named(folder):
    expected = (
        r"the encoder has num_layers=4, hidden_dim=40, intermediate_dim=56, num_query_heads=8, head_dim=6, "
        r"num_key_value_heads=4\. No published stack has these sizes \(s, b, l, ml, xl, 2b, 9b\).*`config`"
    )
    with pytest.raises(CheckpointError, match=expected):
        read_orbax_t5gemma(folder)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("encoder/embedder/input_embedding", "'encoder/embedder/input_embedding' is missing"),
        ("decoder/layer_1/pre_cross_attention_norm/scale", "'decoder/layer_1/pre_cross_attention_norm/scale' is miss"),
        ("encoder/layer_2", r"'encoder/layer_2/pre_attention_norm/scale' is missing.*layers\.2\.pre_self_attn"),
        ("encoder/layer_0/attn/q_einsum", "'encoder/layer_0/attn/q_einsum/w' or 'encoder/layer_0/attn/qkv_einsum/w' i"),
        ("decoder", "'decoder/embedder/input_embedding' is missing"),
    ],
)
@pytest.mark.parametrize("recognized", [True, False])
def test_missing_parameter_is_named(tmp_path, monkeypatch, tree, path, message, recognized):
    monkeypatch.setitem(presets.STACKS, "wide", CONFIG.encoder)
    monkeypatch.setitem(presets.STACKS, "narrow", CONFIG.decoder)
    folder = write(tmp_path / "checkpoint", without(tree, path))
    if recognized and path == "decoder":
        message = "the decoder has num_layers=0. No published stack"
    with pytest.raises(CheckpointError, match=message) as error:
        read_orbax_t5gemma(folder, None if recognized else CONFIG)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("encoder/layer_0/cross_attn/q_einsum/w", "'encoder/layer_0/cross_attn/q_einsum/w'"),
        ("decoder/layer_3/final_norm/scale", "'decoder/layer_3/final_norm/scale'"),
        ("decoder/layer_3/mlp/linear", "'decoder/layer_3/mlp/linear'"),
        (f"decoder/layer_{'9' * 5000}/mlp/linear", "'decoder/layer_99"),
        ("opt_state/mu", "'opt_state/mu'"),
        ("decoder/../secret", r"'decoder/\.\./secret'"),
        ("decoder/layer_0/attn/qkv_einsum/w", "'decoder/layer_0/attn/q_einsum/w' and .*qkv_einsum/w' both hold"),
    ],
)
def test_superfluous_parameter_is_named(tmp_path, tree, path, message):
    folder = write(tmp_path / "checkpoint", replaced(tree, path, np.zeros(3, "float32")))
    with pytest.raises(CheckpointError, match=message) as error:
        read_orbax_t5gemma(folder, CONFIG)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("encoder/embedder/input_embedding", (128, 41), r"\(128, 40\)"),
        ("encoder/layer_1/attn/q_einsum/w", (4, 40, 12), r"\(8, 40, 6\)"),
        ("decoder/layer_1/cross_attn/kv_einsum/w", (2, 2, 32, 12), r"\(2, 2, 40, 12\)"),
        ("decoder/layer_1/mlp/gating_einsum", (32, 2, 48), r"\(2, 32, 48\) or \(2, 48, 32\)"),
        ("decoder/final_norm/scale", (1, 32), r"\(32,\)"),
    ],
)
def test_parameter_of_another_shape_is_named_with_the_expected(tmp_path, tree, path, shape, expected):
    folder = write(tmp_path / "checkpoint", replaced(tree, path, np.zeros(shape, "float32")))
    found = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(CheckpointError, match=f"parameter '{path}' has shape {found}. Expected {expected}"):
        read_orbax_t5gemma(folder, CONFIG)


def test_parameter_of_another_kind_of_number_is_named(tmp_path, tree):
    path = "encoder/layer_0/mlp/linear"
    folder = write(tmp_path / "checkpoint", replaced(tree, path, np.zeros((56, 40), "int8")))
    with pytest.raises(CheckpointError, match=f"parameter '{path}' has dtype int8. Expected one of.*bfloat16"):
        read_orbax_t5gemma(folder, CONFIG)


def test_untied_config_is_refused(folder):
    with pytest.raises(CheckpointError, match="`tie_embeddings` is False"):
        read_orbax_t5gemma(folder, dataclasses.replace(CONFIG, tie_embeddings=False))


def test_tensor_of_an_unknown_name_is_refused_by_name(folder):
    source = read_orbax_t5gemma(folder, CONFIG)[1]
    for question in (source.shape, source.dtype, source.read, source.where):
        with pytest.raises(CheckpointError, match=r"holds no tensor 'model\.nothing'"):
            question("model.nothing")


def test_where_names_the_folder_and_the_parameter(folder):
    source = read_orbax_t5gemma(folder, CONFIG)[1]
    assert source.where() == str(folder)
    assert source.where("model.decoder.layers.1.mlp.up_proj.weight") == f"{folder} (decoder/layer_1/mlp/gating_einsum)"


def test_folder_that_holds_a_checkpoint_is_taken_for_it(tmp_path, folder, weights):
    shutil.copytree(folder, tmp_path / "t5gemma-s-s")
    (tmp_path / "tokenizer.model").touch()
    assert is_orbax(tmp_path)
    assert_same(read_orbax_t5gemma(tmp_path, CONFIG)[1], weights)


def test_folder_that_holds_two_checkpoints_is_refused_with_their_names(tmp_path, folder):
    for name in ("one", "two"):
        shutil.copytree(folder, tmp_path / name)
    assert is_orbax(tmp_path)
    with pytest.raises(CheckpointError, match=r"2 checkpoints in Orbax's format: one, two\. Name one"):
        read_orbax_t5gemma(tmp_path, CONFIG)


def test_folder_in_another_format_is_not_orbax(tmp_path, single_folder):
    assert is_orbax(single_folder) is False
    assert is_orbax(tmp_path / "nothing") is False
    with pytest.raises(CheckpointError, match="holds 0 checkpoints in Orbax's format, no _METADATA"):
        read_orbax_t5gemma(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "is not JSON"),
        ('{"tree_metadata": {', "is not JSON"),
        ("[]", "Expected an object"),
        ("{}", "no `tree_metadata`"),
        ('{"tree_metadata": []}', "no `tree_metadata`"),
        ('{"tree_metadata": {"a": {}}}', "the entry 'a' has no keys"),
        ('{"tree_metadata": {"a": {"key_metadata": [1]}}}', "the entry 'a' has no keys"),
        ('{"tree_metadata": {"a": {"key_metadata": [{"key": "a"}]}, "b": {"key_metadata": [{"key": "a"}]}}}', "twice"),
    ],
)
def test_damaged_metadata_is_refused_by_its_path(damaged, folder, text, message):
    folder = damaged(folder)
    (folder / "_METADATA").unlink()
    if text is not None:
        (folder / "_METADATA").write_text(text)
    assert is_orbax(folder) is True
    with pytest.raises(CheckpointError, match=message) as error:
        read_orbax_t5gemma(folder, CONFIG)
    assert str(folder / "_METADATA") in str(error.value)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [cut, garble, remove])
@pytest.mark.parametrize("pattern", ["manifest.ocdbt", "d/*", "ocdbt.process_0/d/*"])
def test_damaged_database_is_refused_with_folder_and_tensor(damaged, folder, damage, pattern):
    folder = damaged(folder)
    for path in folder.glob(pattern):
        damage(path)
    with pytest.raises(CheckpointError, match=r"(parameter|tensor) '.*' cannot be read: ") as error:
        source = read_orbax_t5gemma(folder, CONFIG)[1]
        for name in source.names():
            source.read(name)
    assert str(folder) in str(error.value)
    assert "source locations" not in str(error.value)


@pytest.mark.parametrize("damage", [cut, garble, remove])
@pytest.mark.parametrize(("file", "zarr3"), [(".zarray", False), ("0.0", False), ("zarr.json", True), ("c/0/0", True)])
def test_damaged_array_is_refused_with_folder_and_tensor(tmp_path, tree, damage, file, zarr3):
    folder = write(tmp_path / "checkpoint", tree, use_ocdbt=False, use_zarr3=zarr3)
    damage(folder / "encoder.embedder.input_embedding" / file)
    message = (
        r"parameter 'encoder/embedder/input_embedding' cannot|tensor 'model\.encoder\.embed_tokens\.weight' cannot"
    )
    with pytest.raises(CheckpointError, match=message) as error:
        read_orbax_t5gemma(folder, CONFIG)[1].read("model.encoder.embed_tokens.weight")
    assert str(folder) in str(error.value)


def test_array_whose_chunks_are_larger_than_itself_is_refused_before_they_take_memory(tmp_path, tree):
    folder = write(tmp_path / "checkpoint", tree, use_ocdbt=False)
    path = folder / "encoder.embedder.input_embedding" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chunks": [10**9, 10**9]}))
    with pytest.raises(CheckpointError, match=r"'encoder/embedder/input_embedding' of shape \(128, 40\) has chunks of"):
        read_orbax_t5gemma(folder, CONFIG)


def test_missing_tensorstore_says_what_to_install(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-t5gemma\[orbax\]'"):
        read_orbax_t5gemma(folder, CONFIG)
