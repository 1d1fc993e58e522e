"""Training recipes: one TOML file describes a run. The recipes of the published runs are in this folder.

components         Builds the model, the data and the optimizer of a recipe
cross_checks       Checks of recipe keys against each other
devices            The devices and the processes of a recipe
no_effect          Recipe keys that have no effect beside others
objective_section  Makes the objective of the section `[objective]` of a recipe
reading            Reads and checks a recipe file. An error names the file, the key, the value and a valid value
run                Runs a recipe, and resumes a run that was stopped
run_folder         The folder of a run: its recipe and its lock. Needs no Keras
schema             Every key of a training recipe, with its type, its range and its meaning. Needs no Keras
"""
