"""Sources of texts.

open        `text_source`: files, Hugging Face datasets and Python iterables as Grain datasets
parquet     Parquet files: random access to rows, one row group in memory at a time
rows        Rows of a source: the text in a row, and streams of rows that can save their position
text_files  Text and JSONL files, plain or compressed, one document in memory at a time
"""
