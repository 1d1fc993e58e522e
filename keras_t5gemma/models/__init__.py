"""The models: the two stacks, the backbone, the sequence-to-sequence task."""
