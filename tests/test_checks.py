"""Every public integer argument accepts and refuses the same values: one table of arguments."""

import json

import numpy as np
import pytest
from helpers.peers import loud_inputs, tiny_config
from helpers.tiny import loud_backbone

import keras_t5gemma as kt
from keras_t5gemma.data.objectives.mixture import Mixture

CONFIG = tiny_config(num_layers=1)
PROMPTS = {name: x for name, x in loud_inputs(CONFIG, batch=1).items() if name.startswith("encoder")}
STACK = dict.fromkeys(("num_layers", "hidden_dim", "intermediate_dim", "num_query_heads", "num_key_value_heads"), 1)
STACK |= {"head_dim": 2}


@pytest.fixture(scope="module")
def lm():
    lm = kt.T5GemmaSeq2SeqLM(loud_backbone(CONFIG))
    lm.compile(sampler=kt.TopKTopPSampler(seed=0))
    return lm


def generate(lm, **options):
    length = {} if "max_new_tokens" in options else {"max_length": 2}
    return lm.generate(PROMPTS, **{**length, "stop_token_ids": None, **options})


def stream(lm, **options):
    return list(lm.stream(PROMPTS, **{"max_length": 2, "stop_token_ids": None, **options}))


def pretraining(**options):
    return kt.pretraining_dataset([range(300)], None, kt.PrefixLM(4, 4), **{"batch_size": 2, **options})


# The arguments' names, and what takes them. Each works with 2.
ARGUMENTS = {
    "BeamSampler num_beams": lambda _, x: kt.BeamSampler(num_beams=x),
    "TopKTopPSampler k": lambda _, x: kt.TopKTopPSampler(k=x),
    "TopKTopPSampler seed": lambda _, x: kt.TopKTopPSampler(seed=x),
    "NoRepeatNgrams n": lambda _, x: kt.NoRepeatNgrams(x),
    "MinimumLength tokens": lambda _, x: kt.MinimumLength(x),
    "ForbiddenTokens ids": lambda _, x: kt.ForbiddenTokens([x]),
    "ForcedTokens tokens": lambda _, x: kt.ForcedTokens({0: x}),
    "CrossAttentionWarmup steps": lambda _, x: kt.CrossAttentionWarmup(steps=x),
    "optimizer steps": lambda _, x: kt.optimizer(learning_rate=0.1, steps=x, warmup_steps=1),
    "optimizer warmup_steps": lambda _, x: kt.optimizer(learning_rate=0.1, steps=9, warmup_steps=x),
    "TrainingCheckpoint save_every": lambda _, x: kt.TrainingCheckpoint("folder", save_every=x),
    "TrainingCheckpoint keep": lambda _, x: kt.TrainingCheckpoint("folder", keep=x),
    "StackConfig num_layers": lambda _, x: kt.StackConfig(**{**STACK, "num_layers": x}),
    "StackConfig sliding_window": lambda _, x: kt.StackConfig(**STACK, sliding_window=x),
    "T5GemmaConfig vocabulary_size": lambda _, x: kt.T5GemmaConfig(STACK, STACK, vocabulary_size=x),
    "Buckets encoder": lambda _, x: kt.Buckets(encoder=(x, 9)),
    "Mixture objectives": lambda _, x: Mixture([(kt.PrefixLM(4, 4), x)]).parts,
    "PrefixLM encoder_length": lambda _, x: kt.PrefixLM(x, 4),
    "PrefixLM mode_token": lambda _, x: kt.PrefixLM(4, 4, mode_token=x),
    "SpanCorruption encoder_length": lambda _, x: kt.SpanCorruption(kt.Denoiser(2, 0.5), x, 4),
    "pretraining_dataset batch_size": lambda _, x: pretraining(batch_size=x),
    "pretraining_dataset num_epochs": lambda _, x: pretraining(num_epochs=x),
    "pretraining_dataset seed": lambda _, x: pretraining(seed=x),
    "pretraining_dataset pack_buffer": lambda _, x: pretraining(pack=True, pack_buffer=x),
    "text_source shard_count": lambda _, x: kt.text_source(__file__, format="text", shard_count=x),
    "generate num_samples": lambda lm, x: generate(lm, num_samples=x),
    "generate max_length": lambda lm, x: generate(lm, max_length=x),
    "generate max_new_tokens": lambda lm, x: generate(lm, max_new_tokens=x),
    "generate seed": lambda lm, x: generate(lm, seed=x),
    "generate stop_token_ids": lambda lm, x: generate(lm, stop_token_ids=[x]),
    "stream chunk_size": lambda lm, x: stream(lm, chunk_size=x),
    "embed batch_size": lambda lm, x: lm.embed(PROMPTS, batch_size=x),
    "compile accumulation_steps": lambda lm, x: lm.compile(accumulation_steps=x),  # last: it forgets the programs
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_integer_argument_takes_numpys_integers_and_no_booleans(lm, argument):
    call = ARGUMENTS[argument]
    for value in (2, np.int64(2), np.uint8(2)):
        call(lm, value)
    for value in (True, np.True_, 2.0, np.float32(2), "2"):
        with pytest.raises(ValueError, match=f"`{argument.split()[1]}`") as error:
            call(lm, value)
        assert repr(value) in str(error.value)


def test_config_of_numpys_numbers_is_json():
    config = kt.StackConfig(**{name: np.int64(value) for name, value in STACK.items()}, query_scalar=np.float32(2))
    assert kt.StackConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
