"""`keras-t5gemma demo`: everything the package does, at toy size, on text that every Python has."""
