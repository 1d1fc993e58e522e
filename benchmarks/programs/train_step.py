"""Training steps of one program: `train_step.py PROGRAM BATCH LENGTH DTYPE STEPS WARM_UP`.

Prints `[seconds of each measured step, peak GB above the import, loss, seconds of the first step]`.
"""

import json
import sys
import time

import numpy as np
from process_memory import forget_peak, in_bytes

V = 256_000


def transformers_step(ids):
    """`(bytes held before the model, () -> loss)`."""
    import torch
    import transformers

    forget_peak()
    before = in_bytes("VmRSS")
    stack = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8)
    stack |= dict(num_key_value_heads=8, head_dim=64, query_pre_attn_scalar=64, vocab_size=V, attention_dropout=0.0)
    config = transformers.T5GemmaConfig(
        encoder=transformers.T5GemmaModuleConfig(**stack),
        decoder=transformers.T5GemmaModuleConfig(**stack),
        vocab_size=V,
        dropout_rate=0.0,
        attn_implementation="eager",
    )
    model = transformers.T5GemmaForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tensors = {side: torch.from_numpy(value).long() for side, value in ids.items()}

    def step():
        out = model(input_ids=tensors["encoder"], decoder_input_ids=tensors["decoder"], labels=tensors["label"])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        return float(out.loss)

    return before, step


def keras_step(program, ids, dtype):
    """`(bytes held before the model, () -> loss)`."""
    import keras
    import keras_hub
    import keras_hub_model

    if program == "keras-t5gemma":
        import keras_t5gemma as kt

        kt.T5GemmaSeq2SeqLM  # noqa: B018 imported now, not while it is measured
    forget_peak()
    before = in_bytes("VmRSS")
    # keras-hub's "auto" brings another optimizer: AdamW for both, each with its default loss and accuracy.
    if program == "keras-t5gemma":
        model = kt.T5GemmaSeq2SeqLM(kt.T5GemmaBackbone("s", "s", dtype=dtype))
        from keras_t5gemma.training.optimizers.adamw import AdamW
    else:
        model = keras_hub.models.T5GemmaSeq2SeqLM(backbone=keras_hub_model.backbone(dtype), preprocessor=None)
        AdamW = keras.optimizers.AdamW
    model.compile(optimizer=AdamW(1e-4))
    ones = np.ones(ids["encoder"].shape, "int32")
    x = dict(
        encoder_token_ids=ids["encoder"],
        encoder_padding_mask=ones,
        decoder_token_ids=ids["decoder"],
        decoder_padding_mask=ones,
    )

    def step():
        logs = model.train_on_batch(x, ids["label"], ones.astype("float32"), return_dict=True)
        return float(logs["loss"])

    return before, step


def main():
    program, dtype = sys.argv[1], sys.argv[4]
    batch, length, steps, warm_up = (int(sys.argv[i]) for i in (2, 3, 5, 6))
    rng = np.random.default_rng(0)
    ids = {side: rng.integers(3, V, (batch, length), dtype="int32") for side in ("encoder", "decoder", "label")}
    before, step = transformers_step(ids) if program == "transformers" else keras_step(program, ids, dtype)
    times = []
    for _ in range(steps + warm_up):
        start = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - start)
    print(json.dumps([times[warm_up:], (in_bytes("VmHWM") - before) / 1e9, loss, times[0]]))


main()
