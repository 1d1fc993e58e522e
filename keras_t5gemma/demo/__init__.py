"""`keras-t5gemma demo`: all features of the package, at toy size, on text that every Python has.

adaptation   Trains a T5Gemma adapted from Gemma 2, and one of the same size from scratch
benchmark    The last chapter: lm-evaluation-harness measures a model before and after it is fine-tuned on dates
corpus       The demo's corpus: the documentation of the running Python
dates        A small task with right answers: a date in any of a dozen forms becomes ISO 8601
finetuning   Fine-tunes the demo's models on a task with right answers, and asks them held-out questions
fitting      The optimizer of every training run of the demo
pretraining  Trains a small Gemma 2 from scratch, in place of a downloaded checkpoint
report       The demo's outputs: tables, a plot, completions, and a file with every number
run          The demo from end to end: text, tokenizer, Gemma 2, T5Gemma, training, fine-tuning, benchmark
settings     Every number of the demo in one place
"""
