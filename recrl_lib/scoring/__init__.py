"""What a text says and what it is worth: claims, training reward, composed lines, and the judge.

May import: data, explainer, and what they import.
"""
