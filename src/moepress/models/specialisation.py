"""How much experts specialise by domain."""

import numpy as np


def mutual_information(selections_DE) -> float:
    """Mutual information in bits of domain and selected expert, every domain counted alike.

    selections: `[domains, experts]` of counts or shares, with at least one selection in every domain. 0 where all domains
    use the experts alike, at most log2 of the number of domains.
    """
    selections = np.asarray(selections_DE, float)
    joint = selections / selections.sum(1, keepdims=True) / len(selections)
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float(max(0.0, (joint[seen] * np.log2(joint[seen] / independent[seen])).sum()))
