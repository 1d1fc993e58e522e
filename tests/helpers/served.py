"""A tiny model that answers in varied tokens, and a batcher that is held while a test looks at it."""

import contextlib
import threading

import keras_t5gemma as kt
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer


def varied_lm(folder, encoder_length, length, **options):
    """A greedy model whose likeliest token is not always the last one again; the decoder's window is 5.

    Args:
        folder: for the tokenizer.
        encoder_length: S of the preprocessor.
        length: L of the preprocessor.
        **options: of the preprocessor.
    """
    tokenizer = kt.T5GemmaTokenizer(proto=train_tiny_tokenizer(folder / "a.model"))
    config = tiny_config(balanced=False, num_layers=1, decoder={"num_layers": 2}, vocabulary_size=512)
    backbone = loud_backbone(config, seed=3)
    table = backbone.decoder.token_embedding.embeddings
    table.assign(0.3 * table)
    preprocessor = kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, encoder_length, length, **options)
    lm = kt.T5GemmaSeq2SeqLM(backbone, preprocessor, buckets=kt.Buckets((encoder_length,), (length,), (1,)))
    lm.compile(sampler="greedy")
    return lm


@contextlib.contextmanager
def held(batcher, monkeypatch, after=0):
    """A context in which the batcher decodes nothing. Gives a function that waits until it has come to decode.

    Args:
        batcher: a `Batcher`.
        monkeypatch: pytest's.
        after: how many chunks of steps it may decode first.
    """
    programs, go_on, is_here = batcher._thread._programs, threading.Event(), threading.Event()
    advance, left = programs.advance, [None] * after

    def slow(*arguments, **options):
        if left:
            left.pop()
        else:
            is_here.set()
            assert go_on.wait(60)
        return advance(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(programs, "advance", slow)
        try:
            yield lambda: is_here.wait(60)
        finally:
            go_on.set()
