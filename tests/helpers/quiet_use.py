"""Ordinary use, as a program of its own: what it prints is what `test_quiet` looks at.

python tests/quiet_use.py FOLDER NAME=FOLDER ...     an empty folder, and what `write_stand_ins` returned
"""

import gc
import sys
from pathlib import Path

import keras_t5gemma as kt
from helpers.stand_ins import serve

PAIRS = {"encoder_text": ["2 + 2 =", "3 + 4 =", "1 + 1 ="], "decoder_text": ["4", "7", "2"]}
TEXTS = ["Air scatters blue light more than red light. " * 20]


def main(folder):
    """What most users do, in the order in which they do it."""
    import keras

    gc.freeze()  # Keras collects garbage once for each layer that it quantizes: not all that was imported
    tokenizer = kt.T5GemmaTokenizer.from_preset("gemma2_2b_en")
    tokenizer.detokenize(tokenizer(["Why is the sky blue?"])[0])

    lm = kt.T5GemmaSeq2SeqLM.from_preset("t5gemma_2b_2b_prefixlm_it")
    lm.generate("Why?", max_length=8)
    "".join(lm.stream("Why?", max_length=8))
    lm.save(folder / "new.keras")
    keras.models.load_model(folder / "new.keras")

    lm.backbone.enable_lora(2)
    lm.fit(PAIRS, batch_size=2, verbose=0)
    lm.evaluate(PAIRS, batch_size=2, verbose=0)
    lm.save(folder / "lora.keras")
    keras.models.load_model(folder / "lora.keras")
    kt.save_lora(lm, folder / "adapter")
    lm.save_to_preset(str(folder / "preset"))
    kt.T5GemmaSeq2SeqLM.from_preset(str(folder / "preset"))
    lm.save_weights(folder / "lora.weights.h5")
    lm.load_weights(folder / "lora.weights.h5")

    lm.backbone.merge_lora()
    kt.export_to_hugging_face(lm, folder / "hugging_face")
    lm = kt.T5GemmaSeq2SeqLM.from_preset(str(folder / "hugging_face"), dtype="bfloat16")
    lm.quantize("int8")
    lm.generate("Why?", max_length=8)
    lm.save(folder / "int8.keras")
    keras.models.load_model(folder / "int8.keras")
    kt.T5GemmaSeq2SeqLM.from_preset(str(folder / "hugging_face"), dtype="int4_from_bfloat16")

    adapted = kt.T5GemmaSeq2SeqLM(kt.adapt_gemma2("gemma2_9b_en", "gemma2_2b_en", dtype="bfloat16"))
    data = kt.pretraining_dataset(TEXTS, tokenizer, kt.UL2(16, 16), batch_size=2, seed=0)
    checkpoint = kt.TrainingCheckpoint(folder / "run", save_every=1)
    adapted.fit(checkpoint.data(data), steps_per_epoch=2, verbose=0, callbacks=[checkpoint])


if __name__ == "__main__":
    serve(dict(argument.split("=") for argument in sys.argv[2:]))
    print("begins", file=sys.stderr, flush=True)
    main(Path(sys.argv[1]))
    print("ends", file=sys.stderr, flush=True)
