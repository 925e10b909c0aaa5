"""Shielded PPO and its arms: warm start, reinforcement learning, TRL's RLOO and GRPO, checkpoints, diagnostics.

May import: study, ranker, scoring, shield, and what they import.
"""
