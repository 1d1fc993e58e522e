"""Models for other runtimes, which run without this package.

array_endpoints     What a SavedModel computes, as functions of arrays: generate, score, embed
ctranslate2_export  `export_ctranslate2`: a folder of CTranslate2, written from the model's tensors
ctranslate2_specs   The model's tensors in the layout of CTranslate2
libraries           The optional libraries of exports, and the names of quantizations
model_parts         What every export reads of a model: config, tensors, tokenizer
onnx_export         `export_onnx`: models for ONNX Runtime, written from their tensors
onnx_graph          ONNX graphs, written node by node, and the one file of weights that they share
onnx_heads          Classifiers and embedders as one ONNX graph
onnx_layers         The layers of a block as ONNX operators
onnx_stacks         The two stacks as ONNX operators
saved_model         `export_saved_model`: a TensorFlow SavedModel
tensorflow_functions  Functions in `keras.ops` as TensorFlow functions, on JAX and TensorFlow
tensorflow_text     Prompts to ids and ids to texts as TensorFlow operations
"""
