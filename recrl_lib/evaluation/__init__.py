"""What tuning did: arms side by side, ranking change, simulated clicks, statistics, audit, frontier, findings.

May import: study, ranker, scoring, shield, training, and what they import.
"""
