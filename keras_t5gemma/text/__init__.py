"""Text to ids and back: tokenizer, preprocessor, chat turns."""
