"""A tiny student, its teacher, and batches with the teacher's view."""

import functools

import grain
import keras
import keras_hub
import numpy as np
from keras import ops

from helpers.peers import tiny_config, tiny_gemma_stack, tiny_keras_gemma
from helpers.tiny import loud_backbone
from keras_t5gemma.data.objectives.prefix_lm import PrefixLM
from keras_t5gemma.data.pipelines.dataset import pretraining_dataset
from keras_t5gemma.data.pipelines.teacher_view import distillation_dataset
from keras_t5gemma.models.seq2seq_lm import T5GemmaSeq2SeqLM


def batches(count=2):
    """Batches of a text with padding: 16 labels and those of a short row."""
    generator = np.random.default_rng(3)
    texts = [generator.integers(3, 128, length).tolist() for length in (17, 9) * count]
    objective = PrefixLM(9, 8)
    data = pretraining_dataset(texts, None, objective, batch_size=2, shuffle=False, num_epochs=1, documents="whole")
    return grain.MapDataset.source(list(distillation_dataset(data, objective)))


@functools.cache
def gemma():
    """Of other sizes than the student; its final cap bites."""
    stack = tiny_gemma_stack(num_layers=2, hidden_dim=24, sliding_window=6)
    return keras_hub.models.GemmaCausalLM(tiny_keras_gemma(stack, seed=7))


def student(loss, **kwargs):
    lm = T5GemmaSeq2SeqLM(loud_backbone(tiny_config(balanced=False, num_layers=1)))
    lm.compile(optimizer=keras.optimizers.SGD(0.05), loss=loss, **kwargs)
    return lm


def values(model):
    return [np.array(ops.convert_to_numpy(variable.value)) for variable in model.variables]
