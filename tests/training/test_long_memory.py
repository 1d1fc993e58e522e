"""Memory for long inputs grows with their length, not with its square, whichever way they come in, first or later."""

import ctypes
from pathlib import Path

import keras
import numpy as np
import pytest
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone

import keras_t5gemma as kt

LENGTH = 4096
# Of one layer, in MB of float32: plain attention has three of these in memory at once.
LOGITS = 4 * LENGTH**2 * tiny_config().encoder.num_query_heads / 2**20


@pytest.fixture(scope="module")
def freed_memory_is_given_back():
    """Else glibc keeps what is freed in pieces below 32 MB, and how much that is depends on what ran before."""
    threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    ctypes.CDLL(None).mallopt(threshold, 2**16)
    yield
    ctypes.CDLL(None).mallopt(threshold, 2**25)


@pytest.fixture(scope="module")
def lm(freed_memory_is_given_back):
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(tiny_config(num_layers=2, sliding_window=512)))
    lm.compile(optimizer=keras.optimizers.SGD(0.01))
    return lm


def batch(length, rows=1):
    ids = np.random.default_rng(length).integers(3, 128, (rows, length), dtype="int32")
    answers = ids[:, :8]
    return {
        "encoder_token_ids": ids,
        "encoder_padding_mask": np.ones_like(ids),
        "decoder_token_ids": answers,
        "decoder_padding_mask": np.ones_like(answers),
    }


def prompts(x):
    return {name: array for name, array in x.items() if name.startswith("encoder")}


WAYS_IN = {
    "predict": lambda lm, x: lm.predict(x, verbose=0),
    "evaluate": lambda lm, x: lm.evaluate(x, x["decoder_token_ids"], verbose=0),
    "fit": lambda lm, x: lm.fit(x, x["decoder_token_ids"], verbose=0),
    "embed": lambda lm, x: lm.embed(prompts(x)),
    "score": lambda lm, x: lm.score(prompts(x), x["decoder_token_ids"]),
}


def memory(field):
    """Of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of a process's memory"
)
# Other backends know the lengths, whichever way in: two of them stand for all.
@pytest.mark.parametrize("way_in", WAYS_IN if keras.config.backend() == "tensorflow" else ["predict", "fit"])
def test_long_input_after_short_ones_takes_less_memory_than_the_logits_of_a_layer(lm, way_in):
    call = WAYS_IN[way_in]
    call(lm, batch(16))  # for shapes other than the first TensorFlow traces without their lengths
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    call(lm, batch(LENGTH))
    assert memory("VmHWM") - before < LOGITS
