"""What values of the group `corpus` make sense; checked before anything heavy is imported or read."""

import platform

from moepress.data import packages

SPLITS = ("train", "calibration", "test")


def check(config: dict) -> None:
    """ValueError, naming the key, for values of the group `corpus` that no corpus can be built with."""
    fractions = config["fractions"]
    if set(fractions) != set(SPLITS) or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"corpus.fractions={fractions}: give a share above 0 for {', '.join(SPLITS)}, 1 in all.")
    share = config["overlap"]["max_share"]
    if config["overlap"]["words"] < 1 or (share is not None and not 0 <= share <= 1):
        raise ValueError(f"corpus.overlap={config['overlap']}: words is 1 or more, max_share in [0, 1] or null.")
    if config["kind"] == "packages":
        unknown = sorted({*config["domains"], *config["test_domains"]} - set(packages.DOMAINS))
        if unknown:
            raise ValueError(f"corpus.domains has no {', '.join(unknown)}: there are {', '.join(packages.DOMAINS)}.")
        if config["python"] != platform.python_version():
            raise ValueError(
                f"corpus.python={config['python']}, but this is Python {platform.python_version()}: the text of the "
                "domain python follows the interpreter, so leave the key at its default."
            )
    if config["kind"] != "hub":
        return
    if not set(config["splits"]) <= set(SPLITS):
        raise ValueError(f"corpus.splits={config['splits']}: its keys are {', '.join(SPLITS)}.")
    taken = [split for split in config["splits"].values() if split]
    if config["verbatim"] and (len(set(taken)) < len(taken) or share is not None):
        raise ValueError(
            f"corpus.verbatim=True with corpus.splits={config['splits']} and corpus.overlap.max_share={share}: text that stays "
            "as it is is neither divided nor dropped; give each split one of the hub's own or null, and max_share=null."
        )
