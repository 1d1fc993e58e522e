"""What a T5Gemma generates, as it comes."""

from keras_t5gemma.generation.streaming import DecodingStream, check_streamable, default_chunk_size
from keras_t5gemma.models.inputs import prompt_arrays
from keras_t5gemma.text.streaming import TextStream


class Streams:
    """Mixed into a `Generates`."""

    def stream(self, inputs, max_length=None, stop_token_ids="auto", strip_prompt=False, chunk_size=None):
        """Generates from one prompt, and gives what is there while the rest is still to come.

        Joined, it is what `generate()` gives for the same arguments, sampler and seed. A stream may be given up at any
        point, and others may run between two of its steps; samplers with seeds then share these.

        Args:
            inputs: as for `generate`, one prompt.
            max_length: as for `generate`.
            stop_token_ids: as for `generate`.
            strip_prompt: as for `generate`.
            chunk_size: tokens decoded between two looks at them, beginning with 1, 2, 4, .... 8 where left out, or 1 on
                PyTorch; 1 shows each token at once, more cost less time.

        Returns:
            An iterator of strings that are never empty and hold whole characters only; without a preprocessor of ids.

        Raises:
            ValueError: as for `generate`, at once; for several prompts; for a `chunk_size` that is no positive integer;
                and for beam search and contrastive search, whose first token stands only with the last.
        """
        chunk_size = default_chunk_size() if chunk_size is None else chunk_size
        if not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f"`chunk_size` must be a positive integer. Received: {chunk_size!r}.")
        check_streamable(self.sampler)
        stop_token_ids = self._stop_token_ids(stop_token_ids)
        if self.preprocessor is not None:
            inputs = self.preprocessor.generate_preprocess(inputs, sequence_length=max_length)
        prompts = prompt_arrays(inputs, max_length, self.backbone.config.vocabulary_size)
        if (rows := len(prompts["encoder_token_ids"])) != 1:
            raise ValueError(f"`stream()` takes one prompt at a time. Received: {rows}. `generate()` takes several.")
        chunks = _id_chunks(self._decoding_stream(stop_token_ids), prompts, strip_prompt, chunk_size)
        return (int(i) for ids in chunks for i in ids) if self.preprocessor is None else self._texts(chunks)

    def compile(self, *args, **kwargs):
        """Forgets the programs of the sampler before."""
        super().compile(*args, **kwargs)
        self._decoding_streams = {}

    def _decoding_stream(self, stop_token_ids):
        if stop_token_ids not in self._decoding_streams:
            self._decoding_streams[stop_token_ids] = DecodingStream(
                self._start_decoding, self.decoding_step, self.sampler, self, stop_token_ids
            )
        return self._decoding_streams[stop_token_ids]

    def _start_decoding(self, inputs):
        """`(token_ids, cache)` of a prompt that was read; see `DecodingStream`."""
        encoder_mask, token_ids = inputs["encoder_padding_mask"], inputs["decoder_token_ids"]
        encoder_output = self.backbone.encoder(inputs["encoder_token_ids"], encoder_mask, training=False)
        cache = self.backbone.decoder.start_cache(encoder_output, encoder_mask, token_ids.shape[1])
        if prefill := inputs["prefill"].shape[0]:
            _, _, cache = self.decoding_step(token_ids[:, :prefill], cache, 0)
        return token_ids, cache

    def _texts(self, chunks):
        text = TextStream(self.preprocessor.tokenizer.detokenize)
        for ids in chunks:
            if new := text.add(ids[self.preprocessor.has_text(ids)].tolist()):
                yield new
        if rest := text.finish():
            yield rest


def _id_chunks(decode, prompts, strip_prompt, chunk_size):
    """The ids of a stream, prompt included where it is not to be stripped, as arrays."""
    prompt = prompts["decoder_token_ids"][prompts["decoder_padding_mask"] == 1]
    if not strip_prompt:
        yield prompt
    yield from decode(prompts, len(prompt), chunk_size)
