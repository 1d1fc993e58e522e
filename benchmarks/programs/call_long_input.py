"""Calls a model with one long input as its users do: `call_long_input.py WAY_IN LENGTH LAYERS REMATERIALIZE`.

Prints `[seconds, peak MiB above what short calls left]`.
"""

import json
import sys
import time

import keras
import numpy as np
from process_memory import forget_peak, in_bytes

import keras_t5gemma as kt

way_in, length, layers, rematerialize = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
stack = kt.StackConfig(layers, 512, 1024, 8, 8, 64)
backbone = kt.T5GemmaBackbone(stack, stack, vocabulary_size=32000)
backbone.rematerialize = rematerialize
lm = kt.T5GemmaSeq2SeqLM(backbone)
lm.compile(optimizer=keras.optimizers.SGD(0.01))


def call(length):
    ids = np.random.default_rng(0).integers(3, 32000, (1, length), dtype="int32")
    prompts = {"encoder_token_ids": ids, "encoder_padding_mask": np.ones_like(ids)}
    answers = ids[:, :16]
    x = {**prompts, "decoder_token_ids": answers, "decoder_padding_mask": np.ones_like(answers)}
    return {
        "predict": lambda: lm.predict(x, verbose=0),
        "evaluate": lambda: lm.evaluate(x, answers, verbose=0),
        "fit": lambda: lm.fit(x, answers, verbose=0),
        "embed": lambda: lm.embed(prompts),
        "score": lambda: lm.score(prompts, answers),
    }[way_in]()


for short in (64, 96, 128):
    call(short)
forget_peak()
before = in_bytes("VmRSS")
start = time.perf_counter()
call(length)
print(json.dumps([time.perf_counter() - start, (in_bytes("VmHWM") - before) / 2**20]))
