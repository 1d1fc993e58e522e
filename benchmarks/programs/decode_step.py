"""Greedy decoding of one program.

    decode_step.py PROGRAM BATCH INPUTS DTYPE SHORT MIDDLE LONG REPEATS WARM_UP ENCODER_LAYERS

Prints `[ms a step, ms to the first token, s to compile]`.
"""

import dataclasses
import json
import sys

import numpy as np
from first_and_fastest import first_and_fastest

V = 256_000


def transformers_generate(ids, dtype, layers):
    """`tokens -> answer`."""
    import torch
    import transformers

    stack = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8)
    stack |= dict(num_key_value_heads=8, head_dim=64, query_pre_attn_scalar=64, vocab_size=V)
    config = transformers.T5GemmaConfig(
        encoder=transformers.T5GemmaModuleConfig(**{**stack, "num_hidden_layers": layers}),
        decoder=transformers.T5GemmaModuleConfig(**stack),
        vocab_size=V,
        attn_implementation="eager",
    )
    model = transformers.T5GemmaForConditionalGeneration(config).eval().to(getattr(torch, dtype))
    tensor = torch.from_numpy(ids).long()

    def generate(length):
        return model.generate(
            tensor,
            attention_mask=torch.ones_like(tensor),
            max_new_tokens=length - 1,
            min_new_tokens=length - 1,
            do_sample=False,
            decoder_start_token_id=2,
            eos_token_id=1,
        )

    return generate


def keras_generate(program, ids, dtype, layers):
    """`tokens -> answer`."""
    import keras_hub
    import keras_hub_model

    mode, _, policy = dtype.partition("_from_")
    quantized = mode in ("int8", "int4")
    policy = (policy or "float32") if quantized else dtype
    if program == "keras-t5gemma":
        import keras_t5gemma as kt

        encoder = dataclasses.replace(kt.STACKS["s"], num_layers=layers)
        model = kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone(encoder, "s", dtype=policy))
    else:
        backbone = keras_hub_model.backbone(policy, layers)
        model = keras_hub.models.T5GemmaSeq2SeqLM(preprocessor=None, backbone=backbone)
    if quantized:
        model.quantize(mode)
    model.compile(sampler="greedy")

    def generate(length):
        prompt = np.zeros((len(ids), length), "int32")
        prompt[:, 0] = 2
        inputs = dict(
            encoder_token_ids=ids,
            encoder_padding_mask=np.ones_like(ids),
            decoder_token_ids=prompt,
            decoder_padding_mask=(prompt == 2).astype("int32"),
        )
        return model.generate(inputs, stop_token_ids=None)

    return generate


def main():
    program, batch, inputs, dtype = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
    short, middle, long, repeats, warm_up, layers = map(int, sys.argv[5:11])
    ids = np.random.default_rng(0).integers(3, V, (batch, inputs), dtype="int32")
    if program == "transformers":
        generate = transformers_generate(ids, dtype, layers)
    else:
        generate = keras_generate(program, ids, dtype, layers)
    first_call, short_time = first_and_fastest(lambda: generate(short), repeats)
    times = []
    for length in (middle, long):
        for _ in range(warm_up // length):
            generate(length)
        times.append(first_and_fastest(lambda length=length: generate(length), repeats)[1])
    step = (times[1] - times[0]) / (long - middle)
    print(json.dumps([1e3 * step, 1e3 * (short_time - step * (short - 2)), first_call - short_time]))


main()
