"""Thin entry points, one module per stage, each with `run(task)`: read the inputs, call the library, write the outputs.

`python -m moepress.stages TASK.yaml OUT` runs the stage that the task file names. They know nothing of Snakemake.
"""
