"""What a text says, and what it is worth.

Owns the reading of claims, the training reward, the composed lines and controls, and the judge,
which nothing that trains may import.
May import: data, explainer, assets, runs, params, paths.
"""
