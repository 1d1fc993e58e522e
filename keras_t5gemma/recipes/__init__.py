"""Training recipes: one TOML file says everything about a run. The published runs' lie here, each a file of its own."""
