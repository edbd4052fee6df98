"""Thin entry points, one module per stage: read the inputs, call the library, write the outputs.

Each runs as `python -m moepress.stages.<stage> TASK.yaml OUT` and knows nothing of Snakemake.
"""
