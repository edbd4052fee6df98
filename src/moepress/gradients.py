"""The gradient of the loss at every decoder layer's output, by a backward pass that holds one layer at a time.

Forward, the input of every layer is kept in a file. Backward, from the head down, each layer runs again on its own input and
hands the gradient at its output to its input (a vector-Jacobian product). The gradients are those of torch's autograd over the
whole model.

Legend: N sequences, S positions, H hidden size.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from moepress.models.streaming import ModelStream
from moepress.models.streams import Streams

LOSS = "nll.json"


@torch.no_grad()
def layer_gradients(stream: ModelStream, tokens_NS: torch.Tensor, folder: Path) -> Iterator[tuple[int, torch.Tensor]]:
    """`(layer, gradient at its output [N, S, H])` of every MoE layer and every layer above one, the last first.

    The loss is the negative log-likelihood (nats) summed over all next tokens; that of each sequence is left in `folder`,
    which also holds the hidden states: what was killed goes on from its last whole layer, forward or backward. A gradient is
    whole, and its layer never done again, when the next one is asked for.
    """
    shape = (*tokens_NS.shape, stream.shape.hidden_size)
    x = Streams(folder / "forward", ("x",), shape, keeps=True)
    if x.layer == 0:
        stream.embed(tokens_NS, x["x"])
    for index, layer in stream.layers(x.layer):
        stream.attend(index, layer, x["x"], x.next("x"), x.scratch("m"))
        stream.add_block(layer, x.next("x"), x.scratch("m"))
        x.advance()

    g, last, first = Streams(folder / "backward", ("g",), shape), stream.shape.num_layers - 1, min(stream.shape.moe_layers)
    if g.layer == 0:
        nll = loss_gradient(stream, tokens_NS, x.at("x", last + 1), g["g"])
        (folder / LOSS).write_text(json.dumps(nll))
    back = ModelStream(stream.folder, stream.device)  # a stream gives each of its layers once
    for index, layer in back.layers_back(last - g.layer):
        yield index, g["g"]
        if index == first:
            return
        back.pull_back(index, layer, x.at("x", index), g["g"], g.next("g"))
        g.advance()


def loss_gradient(stream: ModelStream, tokens_NS: torch.Tensor, x_NSH: torch.Tensor, g_NSH: torch.Tensor) -> list[float]:
    """Each sequence's negative log-likelihood (nats, summed over its tokens but the first); its gradient for what leaves the
    last layer is written to g."""
    found = []
    for ids_S, x_SH, g_SH in zip(tokens_NS, x_NSH, g_NSH, strict=True):
        x = x_SH[None].to(stream.device, copy=True).requires_grad_()
        with torch.enable_grad():
            logits_SV = stream.logits(x)[0, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits_SV, ids_S[1:].to(logits_SV.device), reduction="sum")
        g_SH.copy_(torch.autograd.grad(nll, x)[0][0])
        found.append(nll.item())
    return found
