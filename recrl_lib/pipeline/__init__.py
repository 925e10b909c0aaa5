"""Running the study.

Owns the execution of notebooks by papermill, the stages as tasks, batches of derived runs, the
verification of a finished run, published runs and the report, and the bench.
May import every other package; none imports it.
"""
