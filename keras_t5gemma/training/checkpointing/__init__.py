"""`TrainingCheckpoint`: saves and restores the complete state of a training run.

best_epoch       The epoch of a run with the best value of a metric
callback         Checkpoints of a training run. A killed run resumes bit-exactly (JAX)
callback_state   The state of Keras's callbacks: saved with a run, and restored when the run resumes
data_position    A Grain dataset that knows which of its batches were trained on, however far ahead it is read
model_state      Captures and restores the state of a training model: weights, optimizer, metrics
preemption       Notices that the machine will be taken away: a SIGTERM, after which a run saves and leaves
process_folders  The folders of a run of several processes: one per process, each with that process's checkpoints
random_state     Captures and restores the state of all global random generators
rows             Rows in memory as a dataset of batches, in an order determined by a seed and the epoch
shards           The arrays of a checkpoint: written as the shards that this process holds, and read region by region
step_folder      A training checkpoint on disk: one folder per step, complete or absent, each file with its checksum
weights          The weights in a run's checkpoints: as folders to average and load, and loaded into a model
writer           Writes checkpoints in a thread, one after the other, and removes older ones
"""
