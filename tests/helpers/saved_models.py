"""Tiny models in each form that there is to save, and each way to save them; as a program, one backend's files."""

import sys
from pathlib import Path

import keras
import numpy as np
from keras import ops

import keras_t5gemma as kt
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer
from keras_t5gemma.layers.lora import lora_layers

CONFIG = tiny_config(balanced=False, num_layers=1, vocabulary_size=512)
INPUTS = loud_inputs(CONFIG, batch=2)
QUANTIZATIONS = {
    "int8": keras.quantizers.Int8QuantizationConfig(),
    "int4": keras.quantizers.Int4QuantizationConfig(block_size=None),
    "int4_blocks": keras.quantizers.Int4QuantizationConfig(block_size=8),
}
DTYPES = ("float32", "bfloat16", *QUANTIZATIONS)
LORA = ("plain", "lora", "trained lora")
# Two patterns with a rank each.
RANKS = {"decoder/*/cross_attention/*": 2, "*/gate": 3}


def load_dtype(dtype):
    """What `from_preset` is told; a quantized preset knows by itself."""
    return {} if dtype in QUANTIZATIONS else {"dtype": dtype}


def write_base(folder):
    """A float32 preset with a preprocessor, which all models here start from."""
    tokenizer = kt.T5GemmaTokenizer(str(train_tiny_tokenizer(Path(folder) / "tokenizer.model")))
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG), kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, 16, 13))
    lm.save_to_preset(str(Path(folder) / "base"))
    return Path(folder) / "base"


def new_model(base, dtype, lora):
    """The model of the base, quantized as a user does it, and with LoRA that computes nothing yet."""
    lm = kt.T5GemmaSeq2SeqLM.from_preset(str(base), dtype="float32" if dtype in QUANTIZATIONS else dtype)
    if dtype == "int8":
        lm.quantize("int8")
    elif dtype in QUANTIZATIONS:
        lm.quantize(config=QUANTIZATIONS[dtype])
    if lora != "plain":
        lm.backbone.enable_lora(RANKS, lora_alpha=5)
        for path, layer in lora_layers(lm.backbone).items():
            draw = np.random.default_rng(len(path)).normal
            layer.lora_kernel_a.assign(draw(size=tuple(layer.lora_kernel_a.shape)))
            if lora == "trained lora":
                layer.lora_kernel_b.assign(draw(size=tuple(layer.lora_kernel_b.shape)))
    return lm


def logits(lm):
    """Float32 [B, T, V]."""
    return ops.convert_to_numpy(ops.cast(lm(INPUTS), "float32"))


def weights(lm):
    """`{path: float32 or int8 array}`."""
    arrays = {}
    for variable in lm.backbone.weights:
        value = ops.cast(variable, "float32") if variable.dtype == "bfloat16" else variable.value
        arrays[variable.path] = ops.convert_to_numpy(value)
    return arrays


def trainable(lm):
    """The paths of what a training step changes."""
    return [variable.path for variable in lm.trainable_variables]


WRITE = {
    "save_to_preset": lambda lm, path: lm.save_to_preset(str(path)),
    "keras": lambda lm, path: lm.save(path.with_suffix(".keras")),
    "save_weights": lambda lm, path: lm.save_weights(path.with_suffix(".weights.h5")),
    "export_to_hugging_face": kt.export_to_hugging_face,
    "save_lora": kt.save_lora,
}


def read(way, path, base, dtype, lora):
    """What a user does to have the saved model again."""
    if way in ("save_to_preset", "export_to_hugging_face"):
        return kt.T5GemmaSeq2SeqLM.from_preset(str(path), **load_dtype(dtype))
    if way == "keras":
        return keras.models.load_model(path.with_suffix(".keras"))
    lm = new_model(base, dtype, "plain" if way == "save_lora" or lora == "plain" else "lora")
    if way == "save_weights":
        lm.load_weights(path.with_suffix(".weights.h5"))
    else:
        kt.load_lora(lm, path)
    return lm


def main(folder):
    """Writes all models in all ways that serve them, with their logits and weights, for another backend to read."""
    base = write_base(folder)
    for dtype in DTYPES:
        for lora in ("plain", "trained lora"):
            lm, cell = new_model(base, dtype, lora), Path(folder) / f"{dtype} {lora}"
            cell.mkdir()
            np.savez(cell / "weights.npz", **weights(lm))
            # In other dtypes backends round otherwise, and their weights say it all.
            found = logits(lm) if dtype == "float32" else []
            np.savez(cell / "logits.npz", logits=found, trainable=trainable(lm))
            for way, write in WRITE.items():
                with_lora_only = way == "save_lora" and lora == "plain"
                if not (with_lora_only or (way == "export_to_hugging_face" and dtype in QUANTIZATIONS)):
                    write(lm, cell / way)


if __name__ == "__main__":
    import gc

    gc.collect()
    gc.freeze()  # Keras collects garbage once for each layer it quantizes
    main(sys.argv[1])
