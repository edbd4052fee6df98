# The door for `snakemake --cores N`: the default study. What there is to run: workflow/Snakefile.
include: "workflow/Snakefile"


# An included `rule all` is no default target by itself.
workflow.default_target = "all"
