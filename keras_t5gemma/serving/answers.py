"""An answer while its tokens arrive: pieces of text, stop strings, and the result."""

import numpy as np

from keras_t5gemma.inference.stops import AnswerText, cut_at_stops
from keras_t5gemma.serving.handles import Answer, Handle
from keras_t5gemma.serving.requests import Request


class OpenAnswer:
    """The answer to a request that has a slot.

    Args:
        lm: the model, whose preprocessor makes text of ids, if it has one.
        request: the request.
        handle: its handle, which receives pieces and the answer.
    """

    def __init__(self, lm, request: Request, handle: Handle):
        self._preprocessor = lm.preprocessor
        self.request = request
        self.handle = handle
        self._read = len(request.prompt)
        self._text = None
        begin = None if request.strip_prompt else request.prompt
        if self._preprocessor is None:
            handle.add([] if begin is None else begin.tolist())
            return
        self._text = AnswerText(self._preprocessor, request.stops, begin)
        handle.add([self._text.prompt] if self._text.prompt else [])

    def take(self, token_ids: np.ndarray, log_probs: np.ndarray, has_ended: bool) -> bool:
        """Takes the row of a slot.

        Args:
            token_ids: int [N], all tokens so far, the decoder prompt first.
            log_probs: float32 [N].
            has_ended: whether no more tokens will come.

        Returns:
            Whether the request is done, by its tokens, a stop string or its caller.
        """
        new, self._read = token_ids[self._read :], max(self._read, len(token_ids))
        pieces = new.tolist() if self._text is None else [self._text.add(new)]
        stopped = self._text is not None and self._text.stopped
        if has_ended and self._text is not None and not stopped:
            pieces.append(self._text.finish())
            stopped = self._text.stopped
        pieces = [piece for piece in pieces if piece != ""]
        if has_ended or stopped:
            self.handle.finish(self._answer(token_ids, log_probs, stopped), pieces)
        else:
            self.handle.add(pieces)
        return self.handle.done

    def _answer(self, token_ids: np.ndarray, log_probs: np.ndarray, stopped: bool) -> Answer:
        request, length = self.request, len(self.request.prompt)
        ended = len(token_ids) > length and token_ids[-1] in request.stop_ids
        first = length if request.strip_prompt else 0
        log_probs = np.where(np.arange(len(token_ids)) < length, np.float32(0), log_probs)  # a prompt has none
        arrays = {"decoder_token_ids": token_ids[None, first:].copy(), "log_probs": log_probs[None, first:]}
        arrays["decoder_padding_mask"] = np.ones_like(arrays["decoder_token_ids"], bool)
        text, mask = None, arrays["decoder_padding_mask"][0]
        if self._preprocessor is not None:
            texts = self._preprocessor.generate_postprocess(arrays)
            if request.stops:
                prompt = {"decoder_token_ids": request.prompt[None], "decoder_padding_mask": np.ones((1, length), bool)}
                prompt = None if request.strip_prompt else prompt
                texts = cut_at_stops(self._preprocessor, texts, arrays, request.stops, prompt)
            (text,) = texts
        return Answer(
            text=text,
            token_ids=arrays["decoder_token_ids"][0][mask],
            log_probs=arrays["log_probs"][0][mask] if request.row.log_probs else None,
            finish_reason="stop" if stopped or ended else "length",
            prompt_tokens=len(request.encoder_ids),
            seed=request.seed,
        )
