"""A small instruct LLM with LoRA adapters: its prompts, its sampler and its item vectors.

May import: assets, runs, params, paths.
"""
