"""Strings and conversations to the model's four inputs, for `fit` and for `generate`, and ids back to strings."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import keras_hub
import numpy as np

from keras_t5gemma.checks import check_finite, integer
from keras_t5gemma.hub import PREPROCESSOR_OPTIONS, open_preset
from keras_t5gemma.presets import PRESETS
from keras_t5gemma.suggestions import check_choice, did_you_mean
from keras_t5gemma.text.encoding import Packer, pad_rows
from keras_t5gemma.text.tokenizer import T5GemmaTokenizer, loaded_tensorflow

KERAS_CONFIG_FILE = "preprocessor.json"


@keras.saving.register_keras_serializable(package="keras_t5gemma")
class T5GemmaSeq2SeqLMPreprocessor(keras_hub.models.Seq2SeqLMPreprocessor):
    """Tokenizes, adds `<bos>`, `<eos>` and turns, and pads on the right.

    The encoder reads the same ids for the same text in `fit` and in `generate`: only the text's own, with neither
    `<bos>` nor `<eos>`. The decoder starts from `<bos>`, and in `fit` the answer is closed:

                        encoder                  decoder input           label              weight
        fit             a b c . .                <bos> x y .             x y <eos> .        1 1 1 0
        generate        a b c (the longest)      <bos> . . .             (max_length positions)
        fit, chat       <start_of_turn>user\\n   <bos> x y               x y <end_of_turn>  1 1 1 1
                        a b c<end_of_turn>\\n    <end_of_turn>           <eos>
                        <start_of_turn>model\\n

    With `chat=True` an answer is closed by `<end_of_turn><eos>`, as Gemma 2's instruction-tuned models were trained
    (arXiv 2408.00118, table of formatting control tokens), so that further tuning neither unlearns the first token nor
    leaves the second untrained; `generate` stops at either. A prompt may then be a string (one user turn) or a
    conversation, see `keras_t5gemma.text.chat`. Decoder text is not changed, whitespace included.

    All backends and data pipelines use the same Python code, which needs no TensorFlow and returns numpy arrays, so
    their results cannot differ. In a traced `tf.data` pipeline it runs as a `tf.numpy_function`. `fit` pads to the full
    lengths; `generate` pads prompts to the longest of a batch, which the model rounds up to its `buckets`.

    Args:
        tokenizer: a `T5GemmaTokenizer` that adds no tokens of its own.
        encoder_sequence_length: S, the maximum number of tokens of a prompt (turns included), and its padded length in
            `fit`.
        decoder_sequence_length: T, the decoder's padded length in `fit`, `<bos>` included, and the default `max_length`
            of `generate`.
        chat: whether prompts are formatted as Gemma's turns, which instruction-tuned models need.
        truncate: what to do with a text that is too long. `None` raises an error, "right" cuts its end off, "left" its
            start. Only the text inside turns is cut, not the turn tokens, and "left" drops a conversation's oldest
            turns first. An answer cut on the right is not closed, so the model does not learn to stop in mid-sentence.
        **kwargs: as for `keras_hub.models.Seq2SeqLMPreprocessor`.

    Raises:
        ValueError: if an argument is invalid.
    """

    tokenizer_cls = T5GemmaTokenizer
    presets: Any = PRESETS  # a class property in keras-hub
    tokenizer: T5GemmaTokenizer

    def __init__(
        self,
        tokenizer: T5GemmaTokenizer,
        encoder_sequence_length: int = 512,
        decoder_sequence_length: int = 512,
        *,
        chat: bool = False,
        truncate: str | None = None,
        **kwargs: Any,
    ):
        check_tokenizer(tokenizer)
        if not isinstance(chat, bool):
            raise ValueError(f"`chat` must be True or False. Received: {chat!r}.")
        _check_truncate(truncate)
        super().__init__(
            tokenizer,
            integer(encoder_sequence_length, "encoder_sequence_length"),
            integer(decoder_sequence_length, "decoder_sequence_length"),
            **kwargs,
        )
        self.chat = chat
        self.truncate = truncate
        # There is nothing to build, and the tokenizer is not read yet: a saved one gets its vocabulary after this.
        self.built = True

    def call(
        self,
        x,
        y: None = None,
        sample_weight=None,
        *,
        encoder_sequence_length: int | None = None,
        decoder_sequence_length: int | None = None,
        sequence_length: int | None = None,
    ) -> tuple:
        """Converts texts to a training batch.

        Args:
            x: `{"encoder_text": ..., "decoder_text": ...}`, each a string, or a list or an array of strings [B]. With
                `chat=True` prompts may be conversations.
            y: must be `None`: the labels come from `x`.
            sample_weight: weights per row, [B], or per label, [B, T]. Padding has weight 0 in any case. `None` for
                equal weights.
            encoder_sequence_length: S, instead of the layer's.
            decoder_sequence_length: T, instead of the layer's.
            sequence_length: keras-hub's other name of `decoder_sequence_length`.

        Returns:
            `(x, y, sample_weight)`: the inputs `encoder_token_ids`, `encoder_padding_mask` [B, S] and
            `decoder_token_ids`, `decoder_padding_mask` [B, T], the labels [B, T], all int32, and weights [B, T],
            float32, 0 at padding. Without B for single strings.

        Raises:
            ValueError: if a key is missing or unknown, a prompt is empty, a text is too long, the batches differ
                in size, `y` is not None or `sample_weight` has another shape. In a traced `tf.data` pipeline the error
                is TensorFlow's `InvalidArgumentError` with the same message.
        """
        if y is not None:
            raise ValueError(
                '`y` must be None: labels are made from x={"encoder_text": ..., "decoder_text": ...}. Received: y of '
                f"type {type(y).__name__}."
            )
        prompts, answers = _texts(x)
        if answers is None:
            raise ValueError(
                'x must hold "encoder_text" and "decoder_text", what to read and what to say. It has no '
                '"decoder_text". To have prompts answered, call `generate`.'
            )
        encoder_length = self._encoder_length(encoder_sequence_length)
        decoder_length = self._decoder_length(decoder_sequence_length, sequence_length)
        arrays = run_on_texts(
            partial(self._training_arrays, encoder_length=encoder_length, decoder_length=decoder_length),
            (prompts, answers),
            widths=(encoder_length,) * 2 + (decoder_length,) * 4,
            dtypes=("int32",) * 5 + ("float32",),
        )
        return _model_inputs(*arrays[:4]), arrays[4], _weighted(arrays[5], sample_weight)

    def generate_preprocess(
        self,
        x,
        *,
        encoder_sequence_length: int | None = None,
        decoder_sequence_length: int | None = None,
        sequence_length: int | None = None,
        truncate: str | None = None,
    ) -> dict:
        """Converts prompts to the inputs of generation.

        Args:
            x: a string, a list or an array of strings [B], or a dict with these under "encoder_text" and, optionally,
                the start of each answer under "decoder_text". With `chat=True` a prompt may be a conversation.
            encoder_sequence_length: the maximum number of tokens of a prompt, instead of the layer's.
            decoder_sequence_length: T, instead of the layer's.
            sequence_length: another name of `decoder_sequence_length`; `generate` passes its `max_length` here.
            truncate: "left" or "right" to cut texts that are too long, instead of the layer's.

        Returns:
            The inputs `encoder_token_ids`, `encoder_padding_mask` [B, S], with S the length of the longest prompt, and
            `decoder_token_ids`, `decoder_padding_mask` [B, T], int32; without B for a single prompt. The decoder's mask
            is 1 on `<bos>` and on the start of the answer, which `strip_prompt` removes from the output.

        Raises:
            ValueError: as for `call`.
        """
        prompts, starts = _texts(x)
        encoder_length = self._encoder_length(encoder_sequence_length)
        decoder_length = self._decoder_length(decoder_sequence_length, sequence_length)
        lengths = {"encoder_length": encoder_length, "decoder_length": decoder_length}
        arrays = run_on_texts(
            partial(self._generation_arrays, **lengths, packer=self.packer(truncate)),
            (prompts,) if starts is None else (prompts, starts),
            widths=(None, None, decoder_length, decoder_length),
            dtypes=("int32",) * 4,
        )
        return _model_inputs(*arrays)

    def generate_postprocess(self, x: dict) -> str | list[str]:
        """Converts generated ids to strings: the ids that the mask shows, without padding, special and turn tokens.

        Ids beyond the tokenizer's vocabulary (a backbone may have more rows than the tokenizer has pieces) have no
        text and are left out too.

        Args:
            x: a dict with `decoder_token_ids` and `decoder_padding_mask` [B, T] or [T]. The mask may have holes, e.g.
                to leave a prompt out.

        Returns:
            A list of B strings, or one string.
        """
        ids, mask = (_to_numpy(x[key]) for key in ("decoder_token_ids", "decoder_padding_mask"))
        rows = zip(np.atleast_2d(ids), np.atleast_2d(mask.astype(bool) & self.has_text(ids)), strict=True)
        texts = [self.tokenizer.detokenize(row[keep].tolist()) for row, keep in rows]
        return texts if ids.ndim > 1 else texts[0]

    def packer(self, truncate: str | None = None) -> Packer:
        """The `Packer` that encodes texts as this layer does.

        Args:
            truncate: "left" or "right", instead of the layer's.

        Raises:
            ValueError: if `truncate` is invalid.
        """
        _check_truncate(truncate)
        return Packer(self.tokenizer, self.chat, self.truncate if truncate is None else truncate)

    def has_text(self, ids: np.ndarray) -> np.ndarray:
        """Whether ids [...] stand for text: bool [...], False for special and turn tokens and beyond the vocabulary."""
        return (ids < self.tokenizer.vocabulary_size()) & ~np.isin(ids, self.tokenizer.special_token_ids)

    def get_config(self) -> dict:
        """The constructor's arguments, for `from_config`."""
        return {**super().get_config(), **{name: getattr(self, name) for name in PREPROCESSOR_OPTIONS}}

    @classmethod
    def from_preset(
        cls, preset: str | os.PathLike[str], config_file: str = KERAS_CONFIG_FILE, **kwargs: Any
    ) -> "T5GemmaSeq2SeqLMPreprocessor":
        """Loads the preprocessor of a preset.

        Args:
            preset: as for `T5GemmaTokenizer.from_preset`.
            config_file: the preprocessor's config in a folder in Keras format.
            **kwargs: override saved arguments such as `encoder_sequence_length`. A folder in Keras format has saved
                arguments, and so has a folder in Hugging Face format that this package wrote. `chat` defaults to the
                saved value, else to whether the preset is instruction-tuned: a published preset by its name, a Hugging
                Face folder if it has a chat template.

        Returns:
            A `T5GemmaSeq2SeqLMPreprocessor`.

        Raises:
            ValueError, ConnectionError: as for `T5GemmaTokenizer.from_preset`.
        """
        folder = open_preset(preset, weights=False, config_file=config_file)
        tokenizer = kwargs.pop("tokenizer", None) or cls.tokenizer_cls.from_preset(folder)
        options = {"chat": folder.instruction_tuned, **folder.preprocessor_options(config_file)}
        return cls(tokenizer, **{**options, **kwargs})

    def _encoder_length(self, value: int | None) -> int:
        return integer(self.encoder_sequence_length if value is None else value, "encoder_sequence_length")

    def _decoder_length(self, value: int | None, alias: int | None) -> int:
        value = alias if value is None else value
        return integer(self.decoder_sequence_length if value is None else value, "decoder_sequence_length")

    def _training_arrays(self, prompts, answers, *, encoder_length: int, decoder_length: int) -> tuple[np.ndarray, ...]:
        lengths = (encoder_length, decoder_length)
        encoder, decoder, batched = self._rows(self.packer(), prompts, answers, *lengths, closed=True)
        ids, mask = pad_rows(decoder, decoder_length + 1, self.tokenizer.pad_token_id)
        labels, weights = ids[:, 1:], mask[:, 1:].astype("float32")
        encoder_arrays = pad_rows(encoder, encoder_length, self.tokenizer.pad_token_id)
        return _unbatch((*encoder_arrays, ids[:, :-1], mask[:, :-1], labels, weights), batched)

    def _generation_arrays(
        self, prompts, starts=None, *, encoder_length: int, decoder_length: int, packer: Packer
    ) -> tuple[np.ndarray, ...]:
        encoder, decoder, batched = self._rows(packer, prompts, starts, encoder_length, decoder_length, closed=False)
        encoder_arrays = pad_rows(encoder, max(map(len, encoder)), self.tokenizer.pad_token_id)
        return _unbatch((*encoder_arrays, *pad_rows(decoder, decoder_length, self.tokenizer.pad_token_id)), batched)

    def _rows(
        self, packer: Packer, prompts, answers, encoder_length: int, decoder_length: int, *, closed: bool
    ) -> tuple[list[list[int]], list[list[int]], bool]:
        """The encoder's rows of ids, the decoder's, and whether the texts were batches."""
        encoder, batched = packer.prompts(prompts, encoder_length)
        if answers is None:
            answers = [""] * len(encoder) if batched else ""
        decoder, answers_batched = packer.answers(answers, decoder_length, closed=closed)
        if (len(encoder), batched) != (len(decoder), answers_batched):
            sizes = (
                f"{len(rows)}" if many else "a single one"
                for rows, many in ((encoder, batched), (decoder, answers_batched))
            )
            raise ValueError("`encoder_text` and `decoder_text` must match. Received: {} and {}.".format(*sizes))
        return encoder, decoder, batched


def run_on_texts(function: Callable, texts: tuple, widths: Sequence[int | None], dtypes: Sequence[str]) -> Sequence:
    """Calls a function of texts. If a text is a symbolic tensor, the call becomes an operation of TensorFlow's graph.

    Args:
        function: returns a tuple of arrays.
        texts: its arguments.
        widths: the last dimension of each array, None if it varies.
        dtypes: the dtype of each array.

    Returns:
        The arrays, or TensorFlow's tensors.
    """
    tf = loaded_tensorflow()
    symbolic = [] if tf is None else [text for text in texts if tf.is_symbolic_tensor(text)]
    if tf is None or not symbolic:
        return function(*texts)
    arrays = tf.numpy_function(function, texts, [tf.as_dtype(dtype) for dtype in dtypes], stateful=False)
    for array, width in zip(arrays, widths, strict=True):
        array.set_shape(symbolic[0].shape.concatenate([width]))
    return arrays


def _weighted(weights, sample_weight):
    """Weights [B, T] or [T], 0 at padding, times the user's weights per row or per label."""
    if sample_weight is None:
        return weights
    if not keras.ops.is_tensor(sample_weight) and not hasattr(sample_weight, "shape"):
        sample_weight = np.asarray(sample_weight, "float32")
    by_row = len(sample_weight.shape) < len(weights.shape)
    fits = tuple(sample_weight.shape) == tuple(weights.shape[:-1] if by_row else weights.shape)
    if not fits and None not in (*sample_weight.shape, *weights.shape):
        raise ValueError(
            f"`sample_weight` must have one weight per row, {tuple(weights.shape[:-1])}, or per label, "
            f"{tuple(weights.shape)}. Received: shape {tuple(sample_weight.shape)}."
        )
    tf = loaded_tensorflow()
    if tf is not None and tf.is_tensor(sample_weight):
        factors = tf.cast(sample_weight, "float32")
    else:
        factors = _to_numpy(sample_weight).astype("float32")
        check_finite(factors)
    return weights * (factors[..., None] if by_row else factors)


def _texts(x) -> tuple:
    """The prompts and the answers (or `None`) in the argument of `fit` or `generate`."""
    if not isinstance(x, dict):
        return x, None
    keys = ("encoder_text", "decoder_text")
    if "encoder_text" not in x or set(x) - set(keys):
        near = next(filter(None, (did_you_mean(key, keys) for key in x if key not in keys)), "")
        raise ValueError(f'The keys are "encoder_text" and "decoder_text". Received: {sorted(map(str, x))}.{near}')
    return x["encoder_text"], x.get("decoder_text")


def _model_inputs(encoder_ids, encoder_mask, decoder_ids, decoder_mask) -> dict:
    return {
        "encoder_token_ids": encoder_ids,
        "encoder_padding_mask": encoder_mask,
        "decoder_token_ids": decoder_ids,
        "decoder_padding_mask": decoder_mask,
    }


def _unbatch(arrays: tuple[np.ndarray, ...], batched: bool) -> tuple[np.ndarray, ...]:
    return arrays if batched else tuple(array[0] for array in arrays)


def _to_numpy(value) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(value) if keras.ops.is_tensor(value) else value)


def _check_truncate(truncate: object) -> None:
    if truncate is not None:
        check_choice(truncate, "truncate", ("left", "right"), others=", or None")


def check_tokenizer(tokenizer: object) -> None:
    """Refuses a tokenizer that is not a `T5GemmaTokenizer`, or that adds tokens or pads."""
    if not isinstance(tokenizer, T5GemmaTokenizer):
        raise ValueError(f"`tokenizer` must be a T5GemmaTokenizer. Received: {tokenizer!r}.")
    if tokenizer.add_bos or tokenizer.add_eos or tokenizer.sequence_length:
        raise ValueError(
            f"`tokenizer` must neither add tokens nor pad, which the preprocessor does. Received: add_bos="
            f"{tokenizer.add_bos}, add_eos={tokenizer.add_eos}, sequence_length={tokenizer.sequence_length}."
        )
