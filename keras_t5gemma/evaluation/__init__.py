"""Benchmarks by lm-evaluation-harness, and metrics of generated texts during `fit`.

batches             Requests of the harness in batches: all continuations of a context together
benchmarks          `evaluate`: benchmarks by lm-evaluation-harness
code_runner         Runs programs that a model wrote: each in a process of its own, with limits
decoding            The generation options of the harness's tasks as options of `generate`
extra               The optional packages, and what an error says if they are missing
generation_metrics  `GenerationMetrics`: generates on held-out prompts during `fit`, and logs metrics of the texts
harness             `HarnessLM`: a T5Gemma as a model of lm-evaluation-harness
human_eval          HumanEval: functions completed by the model and run against their tests
model_info          What results say about the model that they are of
plan                What `evaluate` will run: names are checked before a model is loaded
prompts             Contexts of the harness as the ids of the two stacks
published           The papers' numbers, with their sources, and a table of one's own beside them
suites              The benchmarks of the paper as tasks of the harness
text_metrics        Metrics of texts beside references: exact match, F1, ROUGE, BLEU, chrF, accuracy
"""
