"""Modules in the place of a part of a model that is only watched or left out: blocks, experts, layers, the embedding."""

import torch
from torch import nn


class BlockTap(nn.Module):
    """In a block's place: keeps the input (`kept`), adds nothing to the residual stream."""

    def __init__(self, returns_tuple: bool):
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, x):
        self.kept = x
        return (torch.zeros_like(x), None) if self.returns_tuple else torch.zeros_like(x)


class RoutingTap(nn.Module):
    """In the experts' place: keeps the selected experts and their weights of every call, `[T, K]`, and adds nothing."""

    def __init__(self):
        super().__init__()
        self.indices, self.weights = [], []

    def forward(self, hidden_TH, top_k_index_TK, top_k_weights_TK):
        self.indices.append(top_k_index_TK.cpu())
        self.weights.append(top_k_weights_TK.float().cpu())
        return torch.zeros_like(hidden_TH)


class ArgumentsTap(nn.Module):
    """In a layer's place: keeps its keyword arguments (mask, positions), changes nothing."""

    def forward(self, x, **arguments):
        self.arguments = arguments
        return x


class Replay(nn.Module):
    """In the layers' place: gives the hidden states that left the last one."""

    def __init__(self, x):
        super().__init__()
        self.x = x

    def forward(self, *_, **__):
        return self.x


class Embedding(nn.Module):
    """The embedding as stored; only the rows that are looked up are widened."""

    def __init__(self, weight, device, dtype):
        super().__init__()
        self.weight, self.device, self.dtype = weight, device, dtype

    def forward(self, ids):
        return nn.functional.embedding(ids.cpu(), self.weight).to(self.device, self.dtype)
