"""Requests of random shape, one after the other: `random_requests.py PROGRAM COUNT SECONDS`.

Prints `[requests done, programs compiled, seconds]`.
"""

import json
import sys
import time

import keras
import keras_hub
import numpy as np

V, LONGEST = 8000, 200
SIZES = dict(num_layers=2, hidden_dim=128, intermediate_dim=256, head_dim=32)


def build(program):
    """A model of two layers a stack."""
    if program == "keras-t5gemma":
        import keras_t5gemma as kt

        stack = dict(**SIZES, num_query_heads=4, num_key_value_heads=2)
        return kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone(stack, stack, vocabulary_size=V))
    kinds = ["sliding_attention", "full_attention"]
    layers = dict(**SIZES, num_attention_heads=4, num_key_value_heads=2, layer_types=kinds)
    both = {f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in layers.items()}
    backbone = keras_hub.models.T5GemmaBackbone(
        vocabulary_size=V,
        query_pre_attn_scalar=32,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        cross_attention_hidden_size=128,
        **both,
    )
    return keras_hub.models.T5GemmaSeq2SeqLM(preprocessor=None, backbone=backbone)


def compiled(program, model, shapes):
    """How many programs there are."""
    backend = keras.config.backend()
    if backend == "torch":
        return 0
    if program == "keras-hub":
        return len(shapes)
    counter = {"jax": "_cache_size", "tensorflow": "experimental_get_tracing_count"}[backend]
    return sum(getattr(one._compiled, counter)() for one in model.programs.values("generate"))


def main():
    program, count, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    model = build(program)
    model.compile(sampler="greedy")
    generator, shapes = np.random.default_rng(0), set()
    start, done = time.perf_counter(), 0
    while done < count and time.perf_counter() - start < seconds:
        rows, length, longest = (int(generator.integers(*span)) for span in ((1, 6), (1, LONGEST + 1), (2, 61)))
        width = length if program == "keras-t5gemma" else LONGEST
        ids, mask = np.zeros((rows, width), "int32"), np.zeros((rows, width), "int32")
        ids[:, :length], mask[:, :length] = generator.integers(3, V, (rows, length)), 1
        prompt = np.zeros((rows, longest), "int32")
        prompt[:, 0] = 2
        inputs = dict(
            encoder_token_ids=ids,
            encoder_padding_mask=mask,
            decoder_token_ids=prompt,
            decoder_padding_mask=(prompt == 2).astype("int32"),
        )
        model.generate(inputs, stop_token_ids=None)
        shapes.add((rows, width, longest))
        done += 1
    spent = time.perf_counter() - start
    print(json.dumps([done, compiled(program, model, shapes), spent]))


main()
