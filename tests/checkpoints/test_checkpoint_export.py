"""Models to folders: transformers loads them with the same logits, we load them bit for bit."""

import json
import math

import keras
import numpy as np
import pytest
import transformers
from helpers.peers import hf_logits, loud_inputs, tiny_config
from helpers.tiny import backbone_of, loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer
from keras import ops
from safetensors.numpy import load_file

from keras_t5gemma.checkpoints.hugging_face.export import ModelTensors, export_to_hugging_face
from keras_t5gemma.checkpoints.hugging_face.reader import CheckpointFolder
from keras_t5gemma.checkpoints.load import load_into
from keras_t5gemma.checkpoints.sources import t5gemma_source
from keras_t5gemma.checkpoints.tensor_source import CheckpointError
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM
from keras_t5gemma.text.chat import format_turns
from keras_t5gemma.text.preprocessor import T5GemmaSeq2SeqLMPreprocessor
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer

TEXT = "Why is the sky blue?  <start_of_turn>user\n12 plums<end_of_turn>\n"
MESSAGES = [
    {"role": "user", "content": " Knock knock. "},
    {"role": "assistant", "content": "Who is there?"},
    {"role": "user", "content": "Gemma."},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return T5GemmaTokenizer(proto=str(train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")))


@pytest.fixture(scope="module")
def one_layer():
    """With a row for every piece of the tokenizer."""
    return loud_backbone(tiny_config(num_layers=1, vocabulary_size=512))


def weights(backbone):
    return {variable.path: ops.convert_to_numpy(variable.value) for variable in backbone.weights}


def assert_transformers_agrees(folder, backbone):
    """Within the window: beyond it, `transformers`' encoder sees one key too many."""
    inputs = loud_inputs(backbone.config, encoder_length=4)
    inputs["encoder_padding_mask"][:, 1:] = 1
    peer = transformers.T5GemmaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    expected = hf_logits(peer, inputs)
    got = T5GemmaSeq2SeqLM(backbone).predict(inputs, verbose=0)
    keep = inputs["decoder_padding_mask"].astype(bool)
    assert np.abs(got - expected)[keep].max() < 1e-4 * np.abs(expected[keep]).max()
    return peer


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_exported_model_has_the_same_logits_in_transformers(tmp_path, tied):
    backbone = loud_backbone(tiny_config(balanced=False, num_layers=2, tie_embeddings=tied))
    export_to_hugging_face(backbone, tmp_path / "out", max_shard_size="50KB")
    assert len(list(tmp_path.glob("out/model-*.safetensors"))) > 2
    peer = assert_transformers_agrees(tmp_path / "out", backbone)
    assert peer.generation_config.eos_token_id == 1
    assert peer.generation_config.decoder_start_token_id == 2


def test_exported_config_holds_the_published_window(tmp_path, one_layer):
    export_to_hugging_face(one_layer, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["encoder"]["sliding_window"] == one_layer.config.encoder.sliding_window == 5


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_exported_model_comes_back_bit_for_bit(tmp_path, dtype):
    config = tiny_config(num_layers=1)
    backbone = loud_backbone(config, dtype=dtype)
    export_to_hugging_face(backbone, tmp_path / "out")
    source = t5gemma_source(tmp_path / "out")
    assert source.config == config
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    again = backbone_of(config, dtype=dtype)
    load_into(again, source.config, source.tensors)
    before, after = weights(backbone), weights(again)
    for path in before:
        assert before[path].dtype == after[path].dtype == source.tensors.dtype("model.encoder.norm.weight")
        np.testing.assert_array_equal(before[path], after[path])


def test_folder_of_transformers_comes_back_byte_for_byte(tmp_path, single_folder, config):
    backbone = backbone_of(config)
    load_into(backbone, config, CheckpointFolder(single_folder))
    export_to_hugging_face(backbone, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (single_folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize(("dtype", "steps"), [("float16", 2**11), ("bfloat16", 2**8)])
def test_exported_dtype_is_the_one_asked_for_rounded_to_nearest(tmp_path, one_layer, dtype, steps):
    export_to_hugging_face(one_layer, tmp_path / "out", dtype=dtype)
    written, kept = CheckpointFolder(tmp_path / "out"), ModelTensors(one_layer)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype
    for name in kept.names():
        assert str(written.dtype(name)) == dtype
        np.testing.assert_allclose(written.read(name).astype("float32"), kept.read(name), rtol=1 / steps, atol=1e-7)


def test_mixed_precision_exports_its_float32_weights():
    backbone = backbone_of(tiny_config(num_layers=1), dtype="mixed_bfloat16")
    source = ModelTensors(backbone)
    assert {str(source.dtype(name)) for name in source.names()} == {"float32"}


def test_weight_too_large_for_float16_is_refused_by_name_and_leaves_nothing(tmp_path):
    backbone = backbone_of(tiny_config(num_layers=1))
    scale = backbone.decoder.final_norm.scale
    scale.assign(ops.full(scale.shape, 1e5))
    message = r"'model\.decoder\.norm\.weight' has values up to 1e\+05, too large for float16"
    with pytest.raises(CheckpointError, match=message):
        export_to_hugging_face(backbone, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_lora_is_merged_and_stays_in_the_model(tmp_path):
    config = tiny_config(balanced=False, num_layers=1)
    backbone = loud_backbone(config)
    inputs, frozen = loud_inputs(config), weights(backbone)
    backbone.enable_lora(2)
    generator = np.random.default_rng(1)
    adapters = [variable for variable in backbone.weights if "lora" in variable.path]
    for variable in adapters:
        variable.assign(0.3 * generator.standard_normal(tuple(variable.shape)))
    with_lora = T5GemmaSeq2SeqLM(backbone).predict(inputs, verbose=0)
    export_to_hugging_face(backbone, tmp_path / "out")
    assert_transformers_agrees(tmp_path / "out", backbone)
    merged = backbone_of(config)
    load_into(merged, config, CheckpointFolder(tmp_path / "out"))
    changed = [path for path, value in weights(merged).items() if (value != frozen[path]).any()]
    assert len(changed) == len(adapters) / 2
    np.testing.assert_allclose(T5GemmaSeq2SeqLM(merged).predict(inputs, verbose=0), with_lora, atol=1e-4)
    assert [variable.path for variable in backbone.weights if "lora" in variable.path]


def test_quantized_layer_is_refused(tmp_path):
    backbone = backbone_of(tiny_config(num_layers=1))
    backbone.decoder.blocks[0].feed_forward.up_dense.quantize("int8")
    message = r"decoder/layer_0/feed_forward/up/kernel is quantized \(int8\).*save_to_preset"
    with pytest.raises(ValueError, match=message):
        export_to_hugging_face(backbone, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_causal_encoder_comes_back_and_is_refused_by_transformers(tmp_path):
    config = tiny_config(num_layers=1, encoder_attention="causal")
    export_to_hugging_face(backbone_of(config), tmp_path / "out")
    assert t5gemma_source(tmp_path / "out").config == config
    with pytest.raises(ValueError, match="keras_t5gemma"):
        transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")


def test_folder_that_exists_is_refused(tmp_path, one_layer):
    with pytest.raises(CheckpointError, match="exists already"):
        export_to_hugging_face(one_layer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_dtype_is_refused(tmp_path, one_layer):
    with pytest.raises(ValueError, match=r"`dtype` must be one of .*Received: 'int8'"):
        export_to_hugging_face(one_layer, tmp_path / "out", dtype="int8")


def test_exported_tokenizer_gives_the_same_ids_in_transformers(tmp_path, one_layer, tokenizer):
    export_to_hugging_face(one_layer, tmp_path / "out", tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = T5GemmaTokenizer.from_preset(tmp_path / "out")
    ids = [int(i) for i in tokenizer(TEXT)]
    assert theirs(TEXT).input_ids == ids == [int(i) for i in ours(TEXT)]
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id) == (0, 1, 2)
    assert theirs.chat_template is None


@pytest.mark.parametrize("chat", [True, False])
def test_language_model_exports_its_tokenizer_and_turns(tmp_path, one_layer, tokenizer, chat):
    model = T5GemmaSeq2SeqLM(one_layer, T5GemmaSeq2SeqLMPreprocessor(tokenizer, chat=chat))
    export_to_hugging_face(model, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert T5GemmaSeq2SeqLMPreprocessor.from_preset(tmp_path / "out").chat == chat
    if chat:
        rendered = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        assert rendered == format_turns(MESSAGES)
        assert generation["eos_token_id"] == [1, 107]
    else:
        assert theirs.chat_template is None
        assert generation["eos_token_id"] == 1


def test_chat_template_refuses_turns_out_of_order(tmp_path, one_layer, tokenizer):
    export_to_hugging_face(one_layer, tmp_path / "out", tokenizer=tokenizer, chat=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with pytest.raises(Exception, match="Turns must go user, assistant"):
        theirs.apply_chat_template(MESSAGES[1:], tokenize=False)


def test_chat_without_tokenizer_is_refused(tmp_path, one_layer):
    with pytest.raises(ValueError, match="`chat=True` needs a `tokenizer`"):
        export_to_hugging_face(one_layer, tmp_path / "out", chat=True)


def test_tokenizer_of_another_model_is_refused_and_leaves_nothing(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"`tokenizer` has 512 pieces.*vocabulary_size=128"):
        export_to_hugging_face(backbone_of(tiny_config(num_layers=1)), tmp_path / "out", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_tokenizer_without_vocabulary_is_refused_and_leaves_nothing(tmp_path, one_layer):
    with pytest.raises(ValueError, match="`tokenizer` must have its SentencePiece model"):
        export_to_hugging_face(one_layer, tmp_path / "out", tokenizer=T5GemmaTokenizer())
    assert not list(tmp_path.iterdir())


def test_model_tensors_are_as_many_parameters_as_the_model_has(one_layer):
    source = ModelTensors(one_layer)
    assert sum(math.prod(source.shape(name)) for name in source.names()) == one_layer.count_params()
    assert source.where("model.encoder.norm.weight") == f"the model {one_layer.name!r} (encoder/final_norm/scale)"
    assert keras.config.backend()  # the weights came through this backend's own arrays
