"""Training recipes: one TOML file describes a run. The published runs' recipes lie here.

components         Builds the model, the data and the optimizer that a recipe names
devices            The devices and the processes of a recipe
no_effect          Recipe keys that have no effect beside others
objective_section  The section `[objective]` of a recipe, as an objective
reading            Reads and checks a recipe file; an error names the file, the key, what came and what would work
run                Runs a recipe, and resumes a run that was stopped
run_folder         The folder of a run: which recipe it was begun with, and who uses it. Needs no Keras
schema             Every key of a training recipe, with its type, its range and its meaning. Needs no Keras
"""
