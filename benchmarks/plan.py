"""How long `moepress plan` takes for a model of 671B parameters, from config.json and an index of 92 thousand names:

python benchmarks/plan.py
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from large import write_index

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        folder = write_index(Path(place) / "deepseek-v3", float8=True)
        names = len(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
        command = [sys.executable, "-m", "moepress", "plan", "model=local", f"model.path={folder}", "allocation.budget=220GiB"]
        for _ in range(3):
            start = time.perf_counter()
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
            print(f"plan over an index of {names:,} names: {time.perf_counter() - start:.2f} s, exit code {done.returncode}")
    print(done.stdout + done.stderr)
