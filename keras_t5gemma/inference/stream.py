"""`stream`: generated text as it comes."""

import itertools

from keras import ops

from keras_t5gemma.checks import integer
from keras_t5gemma.concurrency import reading
from keras_t5gemma.inference.arrays import prompt_arrays
from keras_t5gemma.inference.decoding.chunks import DecodingStream, check_streamable, default_chunk_size
from keras_t5gemma.inference.generate import MOST_PROGRAMS
from keras_t5gemma.inference.memory import memory_errors_explained
from keras_t5gemma.inference.programs.compiled import Program, Programs
from keras_t5gemma.inference.samplers.top_k_top_p import Draws
from keras_t5gemma.text.whole_characters import TextStream


class Streams:
    """Mixed into a `Generates`."""

    def stream(
        self,
        inputs,
        max_length=None,
        stop_token_ids="auto",
        strip_prompt=False,
        *,
        max_new_tokens=None,
        processors=(),
        seed=None,
        chunk_size=None,
    ):
        """Generates from one prompt, and gives what is there while the rest is still to come.

        Joined, it is what `generate()` gives for the same arguments, sampler and seed. A stream may be given up at any
        point, and others may run between two of its chunks.

        Args:
            inputs: as for `generate`, one prompt.
            max_length: as for `generate`.
            stop_token_ids: as for `generate`.
            strip_prompt: as for `generate`.
            max_new_tokens: as for `generate`.
            processors: as for `generate`.
            seed: as for `generate`.
            chunk_size: tokens decoded between two looks at them, beginning with 1, 2, 4, .... 8 where left out, or 1 on
                PyTorch; 1 shows each token at once, more cost less time.

        Returns:
            An iterator of strings that are never empty and hold whole characters only; without a preprocessor of ids.

        Raises:
            ValueError: as for `generate`, at once; for several prompts; for a `chunk_size` that is no positive integer;
                and for beam search and contrastive search, whose first token stands only with the last.
            MemoryError: as for `generate`, when the iterator begins.
        """
        chunk_size = integer(default_chunk_size() if chunk_size is None else chunk_size, "chunk_size")
        check_streamable(self.sampler)
        options = {"stop_token_ids": self._stop_token_ids(stop_token_ids), "processors": processors}
        if self.preprocessor is not None:
            inputs = self.preprocessor.generate_preprocess(inputs, sequence_length=max_length)
        prompts = prompt_arrays(inputs, max_length, self.backbone.config.vocabulary_size, max_new_tokens)
        if (rows := len(prompts["encoder_token_ids"])) != 1:
            raise ValueError(f"`stream()` takes one prompt at a time. Received: {rows}. `generate()` takes several.")
        prompt = prompts["decoder_token_ids"][prompts["decoder_padding_mask"] == 1]
        decode = self._decoding_stream(self._control(prompts, options))
        chunks = self._chunks(decode, prompts, len(prompt), chunk_size, Draws(self.sampler, seed))
        chunks = chunks if strip_prompt else itertools.chain([prompt], chunks)
        return (int(i) for ids in chunks for i in ids) if self.preprocessor is None else self._texts(chunks)

    def compile(self, *args, **kwargs):
        """Forgets the programs of the sampler before."""
        super().compile(*args, **kwargs)
        self._start_program = Program(self._start_decoding, self)
        self._decoding_streams = Programs(MOST_PROGRAMS)

    def _decoding_stream(self, control):
        return self._decoding_streams.get(
            control, lambda: DecodingStream(self._start_program, self._recorded_step, self.sampler, self, control)
        )

    def _chunks(self, decode, prompts, start, chunk_size, draws):
        """What a `DecodingStream` gives for prompts of one row and `start` tokens."""
        arrays = self._rounded(prompts, most_rows=1)
        positions = range(start, prompts["limits"][0])
        with memory_errors_explained(self, prompts, arrays, caches=1), draws:
            chunks = decode(arrays, positions, chunk_size, draws)
            # Not between two chunks: who reads the stream may train meanwhile.
            while (ids := self._next_chunk(chunks)) is not None:
                yield ids

    def _next_chunk(self, chunks):
        with reading(self, "stream"):
            return next(chunks, None)

    def _start_decoding(self, inputs):
        """`(token_ids, prompt_mask, cache)` of a prompt that was read; see `DecodingStream`."""
        encoder_mask, token_ids = inputs["encoder_padding_mask"], inputs["decoder_token_ids"]
        encoder_output = self.backbone.encoder(inputs["encoder_token_ids"], encoder_mask, training=False)
        prefill = inputs["prefill"].shape[0]
        cache = self.backbone.decoder.start_cache(encoder_output, encoder_mask, token_ids.shape[1], prefill)
        if prefill:
            _, _, cache = self.decoding_step(token_ids[:, :prefill], cache, 0)
        return token_ids, ops.cast(inputs["decoder_padding_mask"], "bool"), cache

    def _texts(self, chunks):
        text = TextStream(self.preprocessor.tokenizer.detokenize)
        for ids in chunks:
            if new := text.add(ids[self.preprocessor.has_text(ids)].tolist()):
                yield new
        if rest := text.finish():
            yield rest
