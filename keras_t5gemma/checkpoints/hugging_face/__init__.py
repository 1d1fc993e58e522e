"""Hugging Face's formats: safetensors, configs, tokenizers, PEFT.

config      `config.json` of T5Gemma and Gemma 2, to and from our configs, field by field and strictly
export      A checkpoint, or a model in memory, to a folder that `transformers` loads with the same logits
model_card  The README.md of a checkpoint: where it comes from, and which program wrote it
peft        LoRA's matrices in the files of Hugging Face's PEFT, written and read
reader      A Hugging Face folder as a lazy `TensorSource`, read strictly and one tensor at a time
tokenizer   The tokenizer's files: Gemma's SentencePiece model, and the files that `transformers` needs beside it
writer      Tensors to safetensors, one piece at a time, each tensor with its checksum
"""
