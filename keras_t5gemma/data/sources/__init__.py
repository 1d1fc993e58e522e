"""Where texts come from.

open        Where texts come from: files, Hugging Face datasets and Python iterables, as Grain datasets
parquet     Parquet files: rows by number, read a row group at a time
rows        A source's rows: the texts in them
text_files  Text and JSONL files, plain or compressed, a document at a time
"""
