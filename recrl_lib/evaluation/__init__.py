"""What tuning did: to the ranking, to the texts and to simulated clicks, with statistics.

Owns the rows of the evaluation, the ablations, the audit and the rules of the report.
May import: plots, study, ranker, scoring, shield, and what they import.
"""
