"""Types and ranges of every configuration value, by groups. The values themselves live in conf/; an experiment has none from
anywhere else. (Recipe and grid.Search have defaults for those who call them without a configuration.)"""

from moepress.schema import allocation, measuring, models, pruning, quantization, text

SCHEMA = {
    "corpus": {"packages": text.PackagesCorpus, "local": text.LocalCorpus, "hub": text.HubCorpus},
    "model": {"tiny": models.TinyModel, "local": models.LocalModel, "hub": models.HubModel, "carved": models.CarvedModel},
    "calibration": text.Calibration,
    "statistics": text.Statistics,
    "gradients": text.Gradients,
    "allocation": {
        "uniform": allocation.Uniform,
        "half": allocation.Mixed,
        "random": allocation.RandomWidths,
        **dict.fromkeys(("pmq", "pmq_code", "frequency", "weight"), allocation.PMQ),
        "hessian": allocation.Kept,
        "bsp": allocation.Mixed,
        "global": allocation.Global,
    },
    "quantization": {
        "none": quantization.NoQuantization,
        "rtn": quantization.RTN,
        "gptq": quantization.GPTQ,
        "qesc": quantization.QESC,
    },
    "pruning": {
        "none": pruning.NoPruning,
        "pesf": pruning.PESF,
        "odp": pruning.ODP,
        "ees": pruning.EES,
        "static": pruning.Static,
    },
    "evaluation": measuring.Evaluation,
    "latency": measuring.Latency,
    "tracking": measuring.Tracking,
}
"""Group -> its dataclass, or for groups with variants the dataclass of each `kind` or `method`."""
