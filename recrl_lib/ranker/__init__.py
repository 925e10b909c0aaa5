"""The frozen ranker: SASRec, its training, ranking of all items, baselines, cold start, ranking
metrics.

May import: data, explainer, and what they import.
"""
