"""Training of the arms: warm start, Shielded PPO, TRL's RLOO and GRPO, checkpoints, diagnostics.

May import: study, ranker, scoring, shield, and what they import.
"""
