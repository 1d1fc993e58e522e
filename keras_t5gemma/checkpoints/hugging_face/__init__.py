"""Hugging Face's formats: safetensors, configs, tokenizers, PEFT.

config      `config.json` of T5Gemma and Gemma 2, converted to and from our configs; every field is checked
export      Exports a checkpoint or a model in memory to a folder that `transformers` loads with the same logits
fast_tokenizer  `tokenizer.json`, the file of Hugging Face's `tokenizers`, from a SentencePiece model
heads       Heads of `transformers`' classifiers: fields of `config.json`, and two tensors
model_card  The README.md of a checkpoint: its sources, its options and the versions that wrote it
modules     The files by which sentence-transformers reads an encoder's folder with its pooling
peft        Writes and reads LoRA's matrices in the files of Hugging Face's PEFT
reader      A Hugging Face folder as a lazy `TensorSource`: every file is checked, one tensor is read at a time
sentencepiece_proto  A SentencePiece model as plain values: its pieces and settings
tokenizer   The tokenizer's files: Gemma's SentencePiece model, and what `transformers` needs beside it
writer      Tensors to safetensors, one piece at a time, each tensor with its checksum
"""
