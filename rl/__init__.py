"""Reinforcement learning of tool use, from a question to an update of the weights:

    Task -> Prompt -> rollout (turns with tools, by a Generate) -> Trajectory -> Group -> Batch -> loss -> TrainMetrics

`types` has the nouns in that order, `zorplex` the four tasks, `prompts` their training and held-out sets, `rollout` the
conversation, `scoring` its reward, `advantages` and `loss` the mathematics, `evaluation` what a model can do. Importing
this package, `types` or anything named here but `advantages` and `loss` needs no torch.
"""
