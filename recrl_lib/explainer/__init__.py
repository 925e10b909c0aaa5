"""The explainer: a small instruct LLM with LoRA adapters.

Owns the model and its one forward pass, the prompts, the sampler, and the item vectors that the
ranker reads.
May import: assets, runs, params, paths.
"""
