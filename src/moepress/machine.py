"""This machine's processor or GPU, found without importing torch."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from moepress.schema.values import check


def uses_gpu(device: str) -> bool:
    """Whether stages will run on a GPU, found without importing torch."""
    return device.startswith("cuda") or (device == "auto" and shutil.which("nvidia-smi") is not None)


@cache
def hardware(device: str) -> str:
    """Name of the machine part that latency is measured on, found without importing torch."""
    if uses_gpu(device):
        names = _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").split("\n")
        number = int(device.partition(":")[2] or 0)
        if number < len(names) and names[number].strip():
            return names[number].strip()
    return _processor() or platform.processor() or platform.machine()


def _processor() -> str:
    """As the system calls it; "" where it has no name for it."""
    if platform.system() == "Darwin":
        return _said("sysctl", "-n", "machdep.cpu.brand_string").strip()
    cpuinfo = Path("/proc/cpuinfo")
    listed = cpuinfo.read_text() if cpuinfo.exists() else ""
    if "model name" not in listed:  # ARM's
        listed = _said("lscpu")
    found = re.search(r"model name\s*:\s*(.+)", listed, re.IGNORECASE)
    return found.group(1).strip() if found else ""


def _said(*command: str) -> str:
    """What a program prints, in English; "" where there is none."""
    if shutil.which(command[0]) is None:
        return ""
    english = os.environ | {"LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=english).stdout


def has_gpu() -> bool:
    drivers = ("/dev/nvidiactl", "/dev/dxg", "/dev/nvhost-gpu", "/dev/kfd")  # NVIDIA, under Windows, on a Jetson; AMD
    return bool(shutil.which("nvidia-smi") or any(map(os.path.exists, drivers)))


def check_gpu(device: str) -> None:
    """ValueError for a GPU where this machine has none, or a torch that knows of none; where stages run here. No import of
    torch."""
    if not device.startswith("cuda"):
        return
    check(has_gpu(), "device", device, NO_GPU)
    found = importlib.util.find_spec("torch")
    version = Path(found.origin).with_name("version.py") if found and found.origin else None
    text = version.read_text(encoding="utf-8") if version and version.is_file() else ""
    is_without = all(re.search(rf"^{name}\b.*= None", text, re.MULTILINE) for name in ("cuda", "hip"))
    check(
        not is_without, "device", device, "the torch that is installed is for CPUs only; install one with CUDA, or device=cpu"
    )


NO_GPU = "this machine has no GPU (no nvidia-smi); take device=cpu or auto, or jobs elsewhere: hydra.launcher.profile=slurm"


def check_timing(device: str, named: str) -> None:
    """ValueError for times of a GPU that would be kept under this machine's name, which has none; where stages run elsewhere.
    named: latency.hardware, which `auto` makes the name of the machine that is asked."""
    if device.startswith("cuda") and not has_gpu() and named == hardware("cpu"):
        raise ValueError(
            f"latency.hardware={named!r} is this machine, which has no GPU, and device={device} is timed elsewhere; give that "
            "machine's, latency.hardware='NAME' latency.threads=N (NAME as its nvidia-smi --query-gpu=name "
            "--format=csv,noheader says it), or latency.repeats=0 for no timing"
        )
