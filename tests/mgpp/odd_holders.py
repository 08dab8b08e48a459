"""Layers that hold their matrices in unusual ways."""

import torch
from torch import nn


class Experts(nn.Module):
    """A stack of experts by names of its own, with a router whose class tells what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(4, 12, 8))
        self.w_in_bias = nn.Parameter(torch.empty(4, 12))
        self.choose = NoisyRouter()


class NoisyRouter(nn.Module):
    """Holds its linear layers by names that do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 4)


class Layer(nn.Module):
    """A layer of all of these, and of some that only look like them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.crossed = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True)
        self.experts = Experts()
        self.gate = nn.Linear(8, 4)
        self.head_gate = nn.Linear(8, 2)
        self.gate_proj = nn.Linear(8, 16)
        self.output_gate = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 4, groups=8)
        self.scan = nn.Parameter(torch.empty(8, 16))
        self.per_head = nn.Parameter(torch.empty(8, 2, 4))


def make_model() -> nn.Module:
    """Return two layers and a head, on the meta device."""
    with torch.device("meta"):
        head = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
        return nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(2)), "head": head})
