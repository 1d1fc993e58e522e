"""Learning from rewards.

advantages    How much better an answer is than the other answers to its prompt
policy        The model that is trained: a task model under the loss of a policy
policy_loss   The loss of a policy: clipped ratios of probabilities, distance to a reference
prompts       Prompts with columns, in an order determined by a seed
reference     The weights at the start, and the log-probabilities of answers by them
reinforce     `reinforce`: generates, rewards, updates
rewards       Reward functions, and checks of their results
rollouts      Answers drawn from a model, as arrays to train on
run_folder    The saved states and the log of a run
"""
