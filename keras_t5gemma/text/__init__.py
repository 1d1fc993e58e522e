"""Text to ids and back: tokenizer, preprocessor, chat turns.

chat              Gemma's turns: a conversation as the one string that an instruction-tuned model was trained to
encoding          Texts to padded arrays of ids, one batch at a time, in numpy: the work of the preprocessor
preprocessor      Strings and conversations to the model's four inputs, for `fit` and for `generate`
progress          A progress bar for long lists of texts
tokenizer         Gemma's SentencePiece vocabulary as a keras-hub tokenizer
train_tokenizer   Trains a SentencePiece vocabulary in Gemma's layout, for models from scratch and for tests
whole_characters  Ids that come one at a time, as text in whole characters
"""
