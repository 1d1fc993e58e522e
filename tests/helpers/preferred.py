"""A toy preference: what is up is high, what is down is low."""

import numpy as np

import keras_t5gemma as kt
from helpers.peers import tiny_config
from helpers.tiny import loud_backbone
from helpers.tiny_tokenizer import train_tiny_tokenizer

_ANSWERS = {"up": ("blue", "dog"), "down": ("dog", "blue")}


def rows(numbers):
    """A row per number."""
    for number in numbers:
        word = ("up", "down")[number % 2]
        chosen, rejected = _ANSWERS[word]
        yield {"prompt": f"{word} {number}", "chosen": f"{chosen} {number}", "rejected": f"{rejected} {number}"}


def write_preset(folder):
    """Writes a tiny model with its tokenizer in Keras's format, and returns the folder."""
    tokenizer = kt.T5GemmaTokenizer(proto=train_tiny_tokenizer(folder.parent / "tokenizer.model"))
    backbone = loud_backbone(tiny_config(balanced=False, num_layers=1, vocabulary_size=512))
    preprocessor = kt.T5GemmaSeq2SeqLMPreprocessor(tokenizer, 12, 12)
    kt.T5GemmaSeq2SeqLM(backbone, preprocessor).save_to_preset(str(folder))
    return str(folder)


def answer_inputs(vocabulary_size, prompts=3, answers=2, length=7, seed=0):
    """`(x, labels)` of random answers of unequal lengths, as numpy arrays."""
    generator = np.random.default_rng(seed)
    mask = np.arange(length) < generator.integers(2, length + 1, (prompts, answers, 1))
    x = {
        "encoder_token_ids": generator.integers(3, vocabulary_size, (prompts, 9)),
        "encoder_padding_mask": np.arange(9) < generator.integers(3, 10, (prompts, 1)),
        "decoder_padding_mask": mask,
    }
    labels = np.where(mask, generator.integers(3, vocabulary_size, mask.shape), -100)
    x["decoder_token_ids"] = np.concatenate([np.full_like(labels[..., :1], 2), np.maximum(labels[..., :-1], 0)], -1)
    return {name: array.astype("int32") for name, array in x.items()}, labels.astype("int32")
