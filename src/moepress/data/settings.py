"""Checks of the group `corpus`, made before anything heavy is imported or read."""

import math
import platform
import re
from collections import Counter

from moepress.data import packages
from moepress.schema.values import check_seed, nearest

SPLITS = ("train", "calibration", "test")


def check(config: dict) -> None:
    """ValueError, naming the key, for values of the group `corpus` that no corpus can be built with."""
    fractions = config["fractions"]
    shares = [share if isinstance(share, int | float) else math.nan for share in fractions.values()]
    if set(fractions) != set(SPLITS) or not all(share > 0 for share in shares) or not abs(sum(shares) - 1) <= 1e-6:
        raise ValueError(f"corpus.fractions={fractions}: give a share above 0 for {', '.join(SPLITS)}, 1 in all.")
    share = config["overlap"]["max_share"]
    if config["overlap"]["words"] < 1 or (share is not None and not 0 <= share <= 1):
        raise ValueError(f"corpus.overlap={config['overlap']}: words is 1 or more, max_share in [0, 1] or null.")
    for name in ("max_characters", "max_documents", "min_documents", "block_characters", "line_characters"):
        value = config.get(name)
        if value is not None and value < 1:
            raise ValueError(f"corpus.{name}={value}: at least 1" + (", or null." if name.startswith("max") else "."))
    check_seed("corpus.seed", config["seed"])
    if config.get("field") == "":
        raise ValueError("corpus.field='': give the name of the field with the text.")
    if config["kind"] == "packages":
        _check_packages(config)
    elif config["kind"] == "hub":
        _check_hub(config)


def _check_packages(config: dict) -> None:
    domains, test_domains = config["domains"], config["test_domains"]
    if not domains:
        raise ValueError(f"corpus.domains=[]: name at least one of {', '.join(packages.DOMAINS)}.")
    twice = [name for name, count in Counter([*domains, *test_domains]).items() if count > 1]
    if twice:
        raise ValueError(f"corpus.domains={domains} and corpus.test_domains={test_domains}: {twice[0]} is in them twice.")
    unknown = sorted({*domains, *test_domains} - set(packages.DOMAINS))
    if unknown:
        raise ValueError(f"corpus.domains has no {', '.join(unknown)}: there are {', '.join(packages.DOMAINS)}.")
    if config["python"] != platform.python_version():
        raise ValueError(
            f"corpus.python={config['python']}, but this is Python {platform.python_version()}: the text of the "
            "domain python follows the interpreter, so leave the key at its default."
        )


def _check_hub(config: dict) -> None:
    if not config["id"]:
        raise ValueError("corpus.id is not set: give a `datasets` id such as Salesforce/wikitext, or a folder.")
    if not set(config["splits"]) <= set(SPLITS):
        raise ValueError(f"corpus.splits={config['splits']}: its keys are {', '.join(SPLITS)}.")
    try:
        re.compile(config["heading"] or "")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"corpus.heading={config['heading']!r}: not a regular expression ({error}).") from error
    taken, share = [split for split in config["splits"].values() if split], config["overlap"]["max_share"]
    if config["verbatim"] and (len(set(taken)) < len(taken) or share is not None):
        raise ValueError(
            f"corpus.verbatim=True with corpus.splits={config['splits']} and corpus.overlap.max_share={share}: text that stays "
            "as it is is neither divided nor dropped; give each split one of the hub's own or null, and max_share=null."
        )


def check_domains(config: dict, domains: list[str], test_domains: list[str] | tuple[str, ...] = ()) -> None:
    """ValueError for a group of a configuration that names a domain that the corpus has not. test_domains: with test text
    only."""
    groups = {"calibration": domains, "evaluation": [*domains, *test_domains]}
    asked = {group: config[group]["domains"] for group in groups}
    if config["model"]["kind"] == "carved":
        groups["model.calibration"], asked["model.calibration"] = domains, config["model"]["calibration"]["domains"]
    for group, known in groups.items():
        for name in asked[group] or ():
            if name not in known:
                why = f"{name!r} has test text only" if name in test_domains else f"the corpus has no {name!r}"
                raise ValueError(
                    f"{group}.domains={asked[group]}: {why}{nearest(name, known)}; it has {', '.join(known)}, or null for all"
                )
