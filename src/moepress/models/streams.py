"""Hidden states on their way through the layers, in files that memory maps: they need not fit in memory, and what was killed
goes on from its last whole layer.
"""

import json
import os
from pathlib import Path

import torch

from moepress.models.files import sync
from moepress.models.streaming import ModelStream


class Streams:
    """Named streams of hidden states `[N, S, H]` between two layers, float32, in files under `folder`.

    `streams["x"]` is what enters layer `streams.layer`; `streams.next("x")` is written while it runs; `advance` makes the
    one the other, all streams at once or not at all. `scratch` is for what lives within a layer. With keeps=True what entered
    every layer stays, as `at(name, layer)`.
    """

    def __init__(self, folder: Path, names: tuple[str, ...], shape: tuple[int, int, int], keeps: bool = False):
        self.folder, self.names, self.shape, self.keeps = Path(folder), names, tuple(shape), keeps
        self.folder.mkdir(parents=True, exist_ok=True)
        self.layer = next_layer(self.folder)
        self._open: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.at(name, self.layer)

    def at(self, name: str, layer: int) -> torch.Tensor:
        return self._map(f"{name}-{layer}")

    def next(self, name: str) -> torch.Tensor:
        return self.at(name, self.layer + 1)

    def scratch(self, name: str) -> torch.Tensor:
        return self._map(name)

    def advance(self) -> None:
        """The layer is whole: what was written to `next` enters the one after it."""
        before = self.layer
        self.layer += 1
        for name in self.names:
            if (path := self.folder / f"{name}-{self.layer}.bin").is_file():
                sync(path)  # before it is said to be whole, lest the machine ends between the two
        mark(self.folder, self.layer)
        for name in self.names:
            self._open.pop(f"{name}-{before}", None)
            if not self.keeps:
                (self.folder / f"{name}-{before}.bin").unlink(missing_ok=True)

    def _map(self, name: str) -> torch.Tensor:
        if name not in self._open:
            N, S, H = self.shape
            path, size = self.folder / f"{name}.bin", 4 * N * S * H
            with path.open("ab") as file:
                reserve(file, size)
            self._open[name] = torch.from_file(str(path), shared=True, size=N * S * H, dtype=torch.float32).view(N, S, H)
        return self._open[name]


def reserve(file, size: int) -> None:
    """Make a file's bytes its own: on a full disk an error here, not a crash at the first touch of a mapped page."""
    try:
        if hasattr(os, "posix_fallocate") and size:
            os.posix_fallocate(file.fileno(), 0, size)
        file.truncate(size)
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}: {size:,} bytes of hidden states; free some space or set paths.results", file.name
        ) from error


def mark(folder: Path, layer: int) -> None:
    """Keep that everything before `layer` is whole; atomic."""
    beside = folder / "next_layer.json.new"
    beside.write_text(json.dumps({"next_layer": layer}))
    sync(beside)
    beside.replace(folder / "next_layer.json")


def next_layer(folder: Path) -> int:
    """The first layer that is not whole, 0 at the start."""
    path = folder / "next_layer.json"
    return json.loads(path.read_text())["next_layer"] if path.is_file() else 0


def run_layers(stream: ModelStream, ids_NS: torch.Tensor, folder: Path, progress, keep=lambda *_: None) -> torch.Tensor:
    """Run tokens `[N, S]` through all layers. Returns what leaves the last one, `[N, S, H]`, in a file below `folder`, which
    the caller removes; what was killed goes on from its last whole layer.

    keep: called with each layer's index, module and MoE block's input. progress: counts layers.
    """
    streams = Streams(folder, ("x",), (*ids_NS.shape, stream.shape.hidden_size))
    if streams.layer == 0:
        stream.embed(ids_NS, streams["x"])
    progress.update(streams.layer)
    for index, layer in stream.layers(streams.layer):
        m = streams.scratch("m")
        stream.attend(index, layer, streams["x"], streams.next("x"), m)
        keep(index, layer, m)
        stream.add_block(layer, streams.next("x"), m)
        streams.advance()
        progress.update()
    return streams["x"]
