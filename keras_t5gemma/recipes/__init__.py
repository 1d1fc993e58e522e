"""Training recipes: one TOML file describes a run. The recipes of the published runs are in this folder.

components         Builds the model, the data and the optimizer of a recipe
cross_checks       Checks of recipe keys against each other
devices            The devices and the processes of a recipe
no_effect          Recipe keys that have no effect beside others
objective_section  Makes the objective of the section `[objective]` of a recipe
prompts            The held-out prompts of the section `[evaluation]` of a recipe. Needs no Keras
reading            Reads and checks a recipe file. An error names the file, the key, the value and a valid value
reporters          The callbacks of a run that count, show and log
run                Runs a recipe, and resumes a run that was stopped
run_folder         The folder of a run: its recipe and its lock. Needs no Keras
schema             Every key of a training recipe, with its type, its range and its meaning. Needs no Keras
section_rules      Checks of the keys of the sections `[evaluation]` and `[task]` against others
superglue/         The paper's fine-tuning on SuperGLUE: seven tasks, a grid each, the mean of the best accuracies
tasks/             The section `[task]`: a model with a head, its data and its held-out measurement
times              Where the time of a run went, over all its starts: `times.json`
written_model      The model that a run writes at its end
"""
