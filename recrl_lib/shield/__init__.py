"""The gradient shield: subspaces to protect, and the projection that keeps an optimizer's updates off them.

May import: explainer, and what it imports.
"""
