"""`tokenizer.json`, the file of Hugging Face's `tokenizers`, from a SentencePiece model."""

from typing import Any

from keras_t5gemma.checkpoints.hugging_face.sentencepiece_proto import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
    parse_proto,
)

_SPACE = "▁"  # SentencePiece's sign for a space
# `transformers`' class for Gemma marks it as special, whatever its kind.
_MASK = "<mask>"


def fast_tokenizer(proto: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """Converts a SentencePiece model to the content of `tokenizer.json`.

    The result gives the same ids as SentencePiece for every text without `<pad>`, `<eos>`, `<bos>` and `<unk>`, and the
    same text for ids that come from a text. The four are plain characters to SentencePiece, and special tokens to
    `tokenizers`, whose users expect this.

    Args:
        proto: the SentencePiece model, bytes.

    Returns:
        `(content, None)`, a JSON-ready dict; or `(None, reason)` for a vocabulary that `tokenizers` cannot express.

    Raises:
        CheckpointError: if `proto` is not a SentencePiece model.
    """
    model = parse_proto(proto)
    if reason := _obstacle(model):
        return None, reason
    unknown = next(piece.text for piece in model.pieces if piece.kind == UNKNOWN)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(index, piece.text, piece.kind)
            for index, piece in enumerate(model.pieces)
            if piece.kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text: index for index, piece in enumerate(model.pieces)},
            "merges": _merges(model),
        },
    }, None


def _obstacle(model: SentencePieceModel) -> str | None:
    """Why `tokenizers` cannot give the ids of a vocabulary; None if it can."""
    kinds = {piece.kind for piece in model.pieces}
    normal = {piece.text for piece in model.pieces if piece.kind == NORMAL}
    missing = next((text for text in normal if not set(text) <= normal), None)
    obstacles = (
        (model.model_type != BPE, "its algorithm is not BPE"),
        (not model.byte_fallback or BYTE not in kinds, "it has no bytes for unknown characters"),
        (model.has_charsmap or model.removes_extra_whitespace, "it normalizes texts"),
        (model.dummy_prefix or model.whitespace_is_suffix, "it adds a space to each text or treats it as a suffix"),
        (not model.escapes_whitespace, "it does not replace spaces"),
        (UNUSED in kinds or UNKNOWN not in kinds, "it has unused pieces, or no unknown one"),
        (missing is not None, f"its piece {missing!r} has a character that is not a piece"),
    )
    return next((reason for applies, reason in obstacles if applies), None)


def _merges(model: SentencePieceModel) -> list[list[str]]:
    """Each pair of pieces that SentencePiece merges, the first to merge first.

    SentencePiece joins any two neighbors that are a piece together, by the score of that piece. `tokenizers` needs the
    pairs. User-defined pieces are never joined to anything.
    """
    normal = {piece.text for piece in model.pieces if piece.kind == NORMAL}
    by_score = sorted(
        (piece for piece in model.pieces if piece.kind == NORMAL), key=lambda piece: piece.score, reverse=True
    )
    return [
        [piece.text[:cut], piece.text[cut:]]
        for piece in by_score
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in normal and piece.text[cut:] in normal
    ]


def _added_token(index: int, text: str, kind: int) -> dict[str, Any]:
    """The entry of a piece that is cut out of a text before any merge."""
    return {
        "id": index,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        # User-defined pieces are searched in the text after spaces became ▁, because some are runs of spaces.
        "normalized": kind == USER_DEFINED and text != _MASK,
        "special": kind != USER_DEFINED or text == _MASK,
    }
