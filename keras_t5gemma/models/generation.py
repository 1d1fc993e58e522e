"""What a T5Gemma generates from prompts."""

import keras
import numpy as np
from keras import ops

from keras_t5gemma.generation.decode import decode
from keras_t5gemma.models.inputs import prompt_arrays, result_arrays


class Generates:
    """Mixed into a `Seq2SeqLM` that has a T5Gemma `backbone`, a `head` and perhaps a `preprocessor`."""

    def generate_step(self, inputs, stop_token_ids=None):
        """Generates for one batch of arrays; compiled as a whole where the backend compiles.

        Args:
            inputs: `encoder_token_ids` and `encoder_padding_mask` [B, S]; `decoder_token_ids` and
                `decoder_padding_mask` [B, L], prompts padded on the right; optionally `prefill` [P], whose length says
                how many positions to run at once before the loop.
            stop_token_ids: ids that end a row, or None.

        Returns:
            `{"decoder_token_ids", "decoder_padding_mask"}`, both [B, L].
        """
        encoder_mask, token_ids = inputs["encoder_padding_mask"], inputs["decoder_token_ids"]
        encoder, decoder = self.backbone.encoder, self.backbone.decoder
        encoder_output = encoder(inputs["encoder_token_ids"], encoder_mask, training=False)
        token_ids, mask = decode(
            self.decoding_step,
            self.sampler,
            token_ids,
            inputs["decoder_padding_mask"],
            decoder.start_cache(encoder_output, encoder_mask, token_ids.shape[1]),
            prefill=inputs["prefill"].shape[0] if "prefill" in inputs else 0,
            stop_token_ids=stop_token_ids,
            model=self,
        )
        return {"decoder_token_ids": token_ids, "decoder_padding_mask": mask}

    def decoding_step(self, token_ids, cache, index):
        """`(logits [B, T, V], hidden states [B, T, D], cache)` of the tokens [B, T] from position `index` on."""
        hidden, cache = self.backbone.decoder.step(token_ids, ops.ones_like(token_ids), cache, index)
        return self.head(hidden), hidden, cache

    def generate(self, inputs, max_length=None, stop_token_ids="auto", strip_prompt=False):
        """Generates from prompts.

        Args:
            inputs: with a preprocessor a string, a list of strings, a conversation where the preprocessor is for chats,
                or a dict of `encoder_text` and, to start the answer with, `decoder_text`. Without one a dict of
                `encoder_token_ids` [B, S] and optionally `encoder_padding_mask`, `decoder_token_ids` [B, T] (prompts;
                `<bos>` where left out) and `decoder_padding_mask`. Or a `tf.data.Dataset` of batches of either.
            max_length: L, tokens of the result with its decoder prompt; the preprocessor's `decoder_sequence_length`
                where left out, or the width of `decoder_token_ids` without a preprocessor.
            stop_token_ids: ids that end a sequence; "auto" for the tokenizer's `<eos>` and `<end_of_turn>`; None to
                always fill `max_length`.
            strip_prompt: leave the decoder prompt out of the result.

        Returns:
            A string or a list of strings; without a preprocessor a dict of `decoder_token_ids` and
            `decoder_padding_mask`, arrays [B, L]. Without B for a single prompt.

        Raises:
            ValueError: for an empty or over-long prompt, ids outside the vocabulary, a `max_length` too short.
        """
        stop_token_ids = self._stop_token_ids(stop_token_ids)
        batches = inputs.as_numpy_iterator() if hasattr(inputs, "as_numpy_iterator") else [inputs]
        results = [self._generate_batch(batch, max_length, stop_token_ids, strip_prompt) for batch in batches]
        if len(results) == 1:
            return results[0]
        if self.preprocessor is None:
            return {name: np.concatenate([result[name] for result in results]) for name in results[0]}
        return [text for texts in results for text in texts]

    def _generate_batch(self, batch, max_length, stop_token_ids, strip_prompt):
        if self.preprocessor is not None:
            batch = self.preprocessor.generate_preprocess(batch, sequence_length=max_length)
        prompts = prompt_arrays(batch, max_length, self.backbone.config.vocabulary_size)
        generate_function = self.make_generate_function()
        # `prefill` is no batch: its length is all there is to it.
        inputs = {name: x if name == "prefill" else _distribute(x) for name, x in prompts.items()}
        outputs = generate_function(inputs, stop_token_ids=stop_token_ids)
        outputs = {name: ops.convert_to_numpy(x) for name, x in outputs.items()}
        outputs = result_arrays(outputs, prompts, strip_prompt)
        if np.ndim(batch["encoder_token_ids"]) == 1:
            outputs = {name: x[0] for name, x in outputs.items()}
        return outputs if self.preprocessor is None else self.preprocessor.generate_postprocess(outputs)

    def _stop_token_ids(self, stop_token_ids):
        if stop_token_ids is None:
            return None
        if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
            if self.preprocessor is None:
                raise ValueError(
                    'stop_token_ids="auto" reads the ids off the tokenizer, and this model has no `preprocessor`. Pass '
                    "a sequence of ids, or None to always generate `max_length` tokens."
                )
            tokenizer = self.preprocessor.tokenizer
            return (tokenizer.end_token_id, tokenizer.end_token2_id)
        ids = tuple(int(i) for i in stop_token_ids)
        size = self.backbone.config.vocabulary_size
        if outside := [i for i in ids if not 0 <= i < size]:
            raise ValueError(f"`stop_token_ids` must be in [0, {size}). Received: {outside}.")
        return ids


def _distribute(x):
    """Puts an array where the active `keras.distribution` wants the batch; as it is where there is none."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return x
    x = ops.convert_to_tensor(x)
    return keras.distribution.distribute_tensor(x, distribution.get_data_layout(x.shape))
