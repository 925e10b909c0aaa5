"""Training of the arms.

Owns the warm start, Shielded PPO, TRL's RLOO and GRPO under the same shield, checkpoints, and the
statistics that a step logs.
May import: study, ranker, scoring (not its judge), shield, and what they import.
"""
