"""Benchmarks by lm-evaluation-harness, and metrics of generated texts during `fit`.

generation_metrics  `GenerationMetrics`: generates on held-out prompts during `fit`, and logs metrics of the texts
text_metrics        Metrics of texts beside references: exact match, F1, ROUGE, BLEU, chrF, accuracy
"""
