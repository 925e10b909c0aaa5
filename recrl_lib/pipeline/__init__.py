"""Running the study: papermill, resume, batches, verification, published runs, benchmarks.

May import every other package; none imports it.
"""
