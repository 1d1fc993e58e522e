"""Models for other runtimes, which run without this package.

ctranslate2_export  `export_ctranslate2`: a folder of CTranslate2, written from the model's tensors
ctranslate2_specs   The model's tensors in the layout of CTranslate2
model_parts         What every export reads of a model: config, tensors, tokenizer
"""
