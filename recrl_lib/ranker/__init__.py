"""The frozen ranker.

Owns SASRec with item texts, its training, the ranking of all items in bounded memory, rankers
without gradient training, cold start, and metrics of a ranking.
May import: data, explainer, assets, runs, params, paths.
"""
