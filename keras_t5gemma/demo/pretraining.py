"""Trains a small Gemma 2 from scratch, in place of a downloaded checkpoint."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import grain
import keras
import keras_hub
import numpy as np
import sentencepiece

from keras_t5gemma.config import StackConfig
from keras_t5gemma.data.pipelines.streams import READ_OPTIONS
from keras_t5gemma.demo.corpus import Corpus
from keras_t5gemma.demo.fitting import optimizer
from keras_t5gemma.demo.settings import DemoSettings, Training
from keras_t5gemma.training.evaluation import mean_loss

# Of Gemma 2, arXiv 2408.00118 table 1. A stack's config does not hold it.
FINAL_LOGIT_SOFT_CAP = 30.0


def build_gemma2(stack: StackConfig, vocabulary_size: int, dtype: str | None = None) -> keras_hub.models.GemmaBackbone:
    """Builds a keras-hub Gemma with Gemma 2's settings and random weights.

    Args:
        stack: a `StackConfig`.
        vocabulary_size: V.
        dtype: dtype policy, as in Keras; Keras's default if None.

    Returns:
        A `keras_hub.models.GemmaBackbone`.
    """
    return keras_hub.models.GemmaBackbone(
        vocabulary_size=vocabulary_size,
        num_layers=stack.num_layers,
        num_query_heads=stack.num_query_heads,
        num_key_value_heads=stack.num_key_value_heads,
        hidden_dim=stack.hidden_dim,
        # In keras-hub the number includes the gate and the up projection.
        intermediate_dim=2 * stack.intermediate_dim,
        head_dim=stack.head_dim,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=stack.attention_soft_cap,
        final_logit_soft_cap=FINAL_LOGIT_SOFT_CAP,
        use_sliding_window_attention=True,
        sliding_window_size=stack.sliding_window,
        dtype=dtype,
    )


def causal_chunks(texts: Iterable[str], proto: bytes, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Joins documents to one stream of ids, `<bos>` text `<eos>` each, and cuts it into examples.

    Args:
        texts: documents.
        proto: the SentencePiece tokenizer's bytes.
        length: T, tokens per example.

    Returns:
        (token_ids, labels), int32, each [examples, T]; `labels` is one position ahead. The last, incomplete chunk is
        dropped.

    Raises:
        ValueError: if the texts do not fill one chunk.
    """
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=proto)
    documents = tokenizer.encode(list(texts), add_bos=True, add_eos=True)
    stream = np.fromiter((token for document in documents for token in document), "int32")
    chunks = (len(stream) - 1) // length
    if chunks < 1:
        raise ValueError(f"The texts have {len(stream)} tokens, fewer than one chunk of length={length} and one more.")
    stream = stream[: chunks * length + 1]
    return stream[:-1].reshape(chunks, length), stream[1:].reshape(chunks, length)


def causal_dataset(
    texts: Iterable[str], proto: bytes, length: int, batch_size: int, seed: int | None = None
) -> grain.MapDataset:
    """Makes batches for a keras-hub causal model.

    Args:
        texts: documents.
        proto: the SentencePiece tokenizer's bytes.
        length: T.
        batch_size: B.
        seed: seed of endless data in a random order, which differs between epochs; `None` for one epoch in the order of
            the documents.

    Returns:
        A `grain.MapDataset` of (inputs, labels), each array [B, T].
    """
    token_ids, labels = causal_chunks(texts, proto, length)
    order = grain.MapDataset.range(len(token_ids))
    if seed is not None:
        order = order.shuffle(seed=seed).repeat()

    def row(index: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        return {"token_ids": token_ids[index], "padding_mask": np.ones(length, "int32")}, labels[index]

    return order.map(row).batch(batch_size, drop_remainder=seed is not None)


def pretrain_gemma2(
    stack: StackConfig,
    corpus: Corpus,
    proto: bytes,
    settings: DemoSettings,
    training: Training,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> tuple[keras_hub.models.GemmaBackbone, float]:
    """Trains a Gemma 2 from random weights to predict the next token.

    Args:
        stack: the model's `StackConfig`.
        corpus: a `Corpus`.
        proto: the tokenizer's bytes.
        settings: the `DemoSettings`.
        training: the `Training`.
        callbacks: Keras callbacks.

    Returns:
        (backbone, held_out_loss): a `keras_hub.models.GemmaBackbone` and its loss per token, in nats.
    """
    length = settings.pretraining_length
    backbone = build_gemma2(stack, settings.vocabulary_size)
    model = keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)
    # A mean over tokens, as everywhere in the demo, and no metrics.
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    model.compile(optimizer=optimizer(training), loss=loss, weighted_metrics=[])
    batches = causal_dataset(corpus.train, proto, length, training.batch_size, settings.seed)
    model.fit(
        batches.to_iter_dataset(READ_OPTIONS),
        steps_per_epoch=training.steps,
        verbose=0,
        shuffle=False,  # it is for arrays, and Keras warns if it is on with a dataset
        callbacks=list(callbacks),
    )
    held_out = causal_dataset(corpus.held_out, proto, length, training.batch_size)
    return backbone, mean_loss(model, held_out[: settings.evaluation_batches])


def save_gemma2(backbone: keras_hub.models.GemmaBackbone, proto: bytes, folder: Path) -> None:
    """Saves a Gemma 2 and its tokenizer as a keras-hub preset, the format of a user's own Gemma 2.

    Args:
        backbone: a `keras_hub.models.GemmaBackbone`.
        proto: the tokenizer's bytes.
        folder: the folder to write.
    """
    tokenizer = keras_hub.models.GemmaTokenizer(proto=None)
    tokenizer.proto = proto  # with the constructor, TensorFlow would read it too, and write a line to the terminal
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(tokenizer)
    keras_hub.models.GemmaCausalLM(backbone, preprocessor).save_to_preset(str(folder))
