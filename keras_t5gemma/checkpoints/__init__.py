"""Files to tensors to variables and back: one table of tensors serves load, export and adapt."""
