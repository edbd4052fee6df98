"""How far packed checkpoints are from the 16-bit model, token by token; perplexity only says how well they guess the text:

python benchmarks/divergence.py RESULTS/model/FOLDER RESULTS/corpus/FOLDER RESULTS/quantization/FOLDER...

On the test text of `conf/evaluation/default.yaml`, in the domains of the calibration text and outside them: the divergence
KL(p || p_hat) in nats a token, and the share of tokens after which both think the same next one most likely, each with its
standard error over blocks; perplexity against the 16-bit model's. All models must fit in memory together, two at a time.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import moepress
from moepress.artefacts import read_json
from moepress.config import resolve
from moepress.models.folders import locate
from moepress.report.table import mean_over_domains
from moepress.stages.evaluation import test_text


@torch.inference_mode()
def compared(original, packed, ids_S: torch.Tensor) -> dict[str, float]:
    """Of one block: mean divergence, share of equal first choices, and how much more surprised the packed model is (nats)."""
    log_p, log_q = (
        model(input_ids=ids_S[None], use_cache=False).logits[0, :-1].float().log_softmax(-1) for model in (original, packed)
    )
    surprise = (log_p - log_q).gather(-1, ids_S[1:, None])
    return {
        "divergence": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
        "same first choice": (log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item(),
        "surprise": surprise.mean().item(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("packed", type=Path, nargs="+")
    parser.add_argument("--blocks", type=int, default=20, help="of text in each domain")
    arguments = parser.parse_args()
    settings = resolve([f"evaluation.num_blocks={arguments.blocks}"])["evaluation"]
    folder = locate(arguments.model)
    texts = {domain: blocks for domain, (blocks, _) in test_text(arguments.corpus, folder, settings).items()}
    splits = read_json(arguments.corpus / "summary.json")["domains"]
    inside = [domain for domain in texts if "calibration" in splits[domain]]
    outside = [domain for domain in texts if domain not in inside]
    original, _ = moepress.load(folder)
    print(f"{'':40}{'divergence, nats':>24}{'same first choice, %':>24}{'perplexity, %':>22}")
    for path in arguments.packed:
        packed, _ = moepress.load(path)
        rows = [
            {"domain": domain} | compared(original, packed, ids)
            for domain, blocks in texts.items()
            for ids in tqdm(torch.from_numpy(blocks).to(original.device), desc=f"{path.name}, {domain}", leave=False)
        ]
        frame = pd.DataFrame(rows)
        for where, domains in (("in", inside), ("out", outside)):
            of = {name: mean_over_domains(frame.rename(columns={name: "nll"}), domains) for name in frame.columns[1:]}
            (kl, kl_se), (same, same_se), (surprise, surprise_se) = of.values()
            print(
                f"{path.name + ' ' + where:40}{kl:>14.5f} ± {kl_se:.5f}{100 * same:>15.2f} ± {100 * same_se:.2f}"
                f"{100 * np.expm1(surprise):>+15.2f} ± {100 * surprise_se:.2f}"
            )
