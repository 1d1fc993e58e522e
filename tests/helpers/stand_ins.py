"""Tiny models under the names of published ones: what the hubs give where pages and notebooks ask them."""

from pathlib import Path

import keras_t5gemma as kt
from keras_t5gemma.demo.pretraining import build_gemma2, save_gemma2

_VOCABULARY = 500
# Wide enough apart for an unbalanced pair; windows shorter than any input.
_SIZES = {
    "9b": kt.StackConfig(1, 16, 24, 2, 1, 8, sliding_window=8),
    "2b": kt.StackConfig(1, 12, 24, 2, 1, 6, sliding_window=8),
    "b": kt.StackConfig(1, 12, 24, 2, 1, 6, sliding_window=8),
}


def write_stand_ins(
    folder, texts, gemma2=("gemma2_9b_en", "gemma2_2b_en"), t5gemma=("t5gemma_2b_2b_prefixlm_it",), loudness=1
):
    """Writes tiny random models.

    Args:
        folder: an empty one.
        texts: what their vocabulary is made of.
        gemma2: names of keras-hub's Gemma 2.
        t5gemma: names of published T5Gemma.
        loudness: what embeddings are multiplied by. With 20 logits are as large as a trained model's, so that what
            happens before them, such as LoRA, can lower the loss.

    Returns:
        What `serve` takes.
    """
    proto = kt.train_tokenizer(texts, _VOCABULARY)
    for name in gemma2:
        save_gemma2(_louder(build_gemma2(_SIZES[name.split("_")[1]], _VOCABULARY), loudness), proto, folder / name)
    for name in t5gemma:
        encoder, decoder = (_SIZES[size] for size in name.split("_")[1:3])
        backbone = _louder(kt.T5GemmaBackbone(encoder, decoder, vocabulary_size=_VOCABULARY), loudness)
        tokenizer = kt.T5GemmaTokenizer(proto=proto)
        kt.export_to_hugging_face(backbone, folder / name, tokenizer=tokenizer, chat=name.endswith("_it"))
    return {name: str(folder / name) for name in (*gemma2, *t5gemma)}


def _louder(backbone, loudness):
    for weight in backbone.weights:
        if weight.path.endswith("embeddings"):
            weight.assign(loudness * weight.value)
    return backbone


def serve(folders, replace=setattr):
    """Has Hugging Face's and Kaggle's clients answer with folders instead of downloads.

    Args:
        folders: a name to its folder.
        replace: as `setattr`, such as pytest's `monkeypatch.setattr`, which puts things back.
    """
    import huggingface_hub
    import kagglehub

    def snapshot_download(name, **_):
        return folders[name.rpartition("/")[2].replace("-", "_")]

    def model_download(handle, path=None):
        folder = Path(folders[handle.split("/")[3]])
        if path is None:
            return str(folder)
        if not (folder / path).is_file():
            raise ValueError(f"{path} is not present in the model files.")  # in Kaggle's words
        return str(folder / path)

    replace(huggingface_hub, "snapshot_download", snapshot_download)
    replace(kagglehub, "model_download", model_download)
