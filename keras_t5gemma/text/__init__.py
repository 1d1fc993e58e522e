"""Text to ids and back: tokenizer, preprocessor, chat turns.

chat              Gemma's turns: formats a conversation as the string that an instruction-tuned model was trained on
cuts              Texts that were cut because they were too long: counted, and reported in one warning
encoding          Texts to padded arrays of ids, one batch at a time, in numpy: the work of the preprocessor
preprocessor      Strings and conversations to the model's four inputs, for `fit` and for `generate`
stop_strings      Where a text ends that must not hold any of several strings
tokenizer         Gemma's SentencePiece vocabulary as a keras-hub tokenizer
train_tokenizer   Trains a SentencePiece vocabulary in Gemma's layout, for models from scratch and for tests
whole_characters  Decodes ids that arrive one at a time to text in whole characters
"""
