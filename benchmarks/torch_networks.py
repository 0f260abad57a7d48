"""The reference networks in PyTorch, layer for layer those of `benchmarks/networks.py`, starting from the same weights.

What PyTorch does otherwise by default is set as Keras has it: epsilon of normalisations 1e-3, momentum of
BatchNorm 0.99 (PyTorch calls it 0.01), a 3x3 convolution of stride 2 pads after and not before, the LSTM has one bias,
logits are float32 under autocast. One difference stays, seen only when a trained network infers: PyTorch's running
variance is the unbiased one. Otherwise each network is written as one would write it for PyTorch: queries, keys and
values are one product, attention is `scaled_dot_product_attention`.

Weights come by kind of layer in the order in which the layers were made, so layers are made in Keras' order here.
"""

import itertools

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.batches import CLASSES, INVERTED_BLOCKS, UNET_FILTERS, VOCABULARY

_EPSILON = 1e-3


class SameConv2d(nn.Conv2d):
    """A convolution that pads as TensorFlow's "same" does for inputs of even height and width."""

    def __init__(self, channels: int, filters: int, size: int, stride: int = 1, groups: int = 1, bias: bool = False):
        padding = size // 2 if stride == 1 else 0
        super().__init__(channels, filters, size, stride, padding, groups=groups, bias=bias)
        self.pad_after = max(0, size - stride) if stride != 1 else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pads on the right and below, then convolves."""
        if self.pad_after:
            x = functional.pad(x, (0, self.pad_after, 0, self.pad_after))
        return super().forward(x)


def _norm(filters: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(filters, eps=_EPSILON, momentum=0.01)


def _conv_norm(channels: int, filters: int, size: int, stride: int) -> nn.Sequential:
    return nn.Sequential(SameConv2d(channels, filters, size, stride), _norm(filters))


def _in_float32(head: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return head(x.float())


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a projection, or beside nothing where the shape stays."""

    def __init__(self, channels: int, filters: int, stride: int):
        super().__init__()
        self.first = _conv_norm(channels, filters, 3, stride)
        self.second = _conv_norm(filters, filters, 3, 1)
        self.shortcut = _conv_norm(channels, filters, 1, stride) if stride != 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns float `[batch, filters, height / stride, width / stride]`."""
        return functional.relu(self.shortcut(x) + self.second(functional.relu(self.first(x))))


class ResNet(nn.Module):
    """`networks.build_resnet`; pictures are `[batch, 3, 64, 64]`, channels last in memory."""

    def __init__(self):
        super().__init__()
        self.stem = _conv_norm(3, 64, 3, 1)
        channels = (64, 64, 64, 128, 128, 256, 256)
        blocks = [BasicBlock(channels[i], channels[i + 1], 2 - i % 2) for i in range(6)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(256, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits float32 `[batch, 10]`."""
        x = self.blocks(functional.relu(self.stem(x)))
        return _in_float32(self.head, x.mean((2, 3)))


class Attention(nn.Module):
    """Self-attention; queries, keys and values in one product."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.inputs = nn.Linear(width, 3 * width)
        self.outputs = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns float `[batch, tokens, width]`."""
        batch, tokens, width = x.shape
        shape = batch, tokens, 3, self.num_heads, width // self.num_heads
        query, key, value = self.inputs(x).view(shape).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(query, key, value)
        return self.outputs(x.transpose(1, 2).reshape(batch, tokens, width))


class EncoderBlock(nn.Module):
    """A pre-norm block of attention and a GELU network."""

    def __init__(self, width: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=_EPSILON)
        self.attention = Attention(width, 8)
        self.norm = nn.LayerNorm(width, eps=_EPSILON)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns float `[batch, tokens, width]`."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.narrow(functional.gelu(self.wide(self.norm(x))))


class Encoder(nn.Module):
    """`networks.build_encoder`."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 512)
        self.blocks = nn.Sequential(*[EncoderBlock(512) for _ in range(4)])
        self.head = nn.Linear(512, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns logits float32 `[batch, 10]`."""
        return _in_float32(self.head, self.blocks(self.embedding(ids)).mean(1))


class Recurrent(nn.Module):
    """`networks.build_lstm`."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 256)
        self.both_ways = nn.LSTM(256, 256, batch_first=True, bidirectional=True)
        self.forwards = nn.LSTM(512, 256, batch_first=True)
        self.head = nn.Linear(256, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns logits float32 `[batch, 10]`."""
        x, _ = self.both_ways(self.embedding(ids))
        x, _ = self.forwards(x)
        return _in_float32(self.head, x[:, -1])


class UNet(nn.Module):
    """`networks.build_unet`; pictures are `[batch, 3, 128, 128]`, channels last in memory."""

    def __init__(self):
        super().__init__()
        channels = (3, *UNET_FILTERS)
        levels = range(len(UNET_FILTERS))
        self.down = nn.ModuleList([_conv_norm_twice(channels[i], channels[i + 1]) for i in levels])
        self.grow, self.up = nn.ModuleList(), nn.ModuleList()
        for filters in reversed(UNET_FILTERS[:-1]):
            self.grow.append(nn.ConvTranspose2d(2 * filters, filters, 2, 2))
            self.up.append(_conv_norm_twice(2 * filters, filters))
        self.head = SameConv2d(UNET_FILTERS[0], CLASSES, 1, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits float32 `[batch, 10, 128, 128]`."""
        kept = []
        for convolutions in self.down[:-1]:
            x = convolutions(x)
            kept.append(x)
            x = functional.max_pool2d(x, 2)
        x = self.down[-1](x)
        for grow, convolutions in zip(self.grow, self.up, strict=True):
            x = convolutions(torch.cat([kept.pop(), grow(x)], 1))
        return _in_float32(self.head, x)


def _conv_norm_twice(channels: int, filters: int) -> nn.Sequential:
    first, second = _conv_norm(channels, filters, 3, 1), _conv_norm(filters, filters, 3, 1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


class InvertedBlock(nn.Module):
    """Expands, convolves each channel by itself, projects; adds its input where the shape stays."""

    def __init__(self, channels: int, expansion: int, filters: int, stride: int):
        super().__init__()
        wide = expansion * channels
        expand = [_conv_norm(channels, wide, 1, 1), nn.ReLU6()] if expansion != 1 else []
        depthwise = [SameConv2d(wide, wide, 3, stride, groups=wide), _norm(wide), nn.ReLU6()]
        self.layers = nn.Sequential(*expand, *depthwise, _conv_norm(wide, filters, 1, 1))
        self.adds = stride == 1 and channels == filters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns float `[batch, filters, height / stride, width / stride]`."""
        return x + self.layers(x) if self.adds else self.layers(x)


class Depthwise(nn.Module):
    """`networks.build_depthwise`; pictures are `[batch, 3, 64, 64]`, channels last in memory."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(_conv_norm(3, 32, 3, 1), nn.ReLU6())
        blocks, channels = [], 32
        for expansion, filters, stride in INVERTED_BLOCKS:
            blocks.append(InvertedBlock(channels, expansion, filters, stride))
            channels = filters
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(_conv_norm(channels, 1280, 1, 1), nn.ReLU6())
        self.head = nn.Linear(1280, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns logits float32 `[batch, 10]`."""
        return _in_float32(self.head, self.last(self.blocks(self.stem(x))).mean((2, 3)))


_NETWORKS = {"resnet": ResNet, "encoder": Encoder, "lstm": Recurrent, "unet": UNet, "depthwise": Depthwise}


def build(network: str, weights_path: str) -> nn.Module:
    """Builds a network with the weights that `keras_contenders.save_weights` wrote, channels last in memory."""
    model = _NETWORKS[network]()
    layers = {}
    with np.load(weights_path) as saved:
        # Named kind/layer/array, two numbers of three digits.
        for (kind, _), names in itertools.groupby(sorted(saved.files), lambda name: name.split("/")[:2]):
            layers.setdefault(kind, []).append([torch.from_numpy(saved[name]) for name in names])
    with torch.no_grad():
        _load(model, layers)
    if left := [kind for kind, arrays in layers.items() if arrays]:
        raise ValueError(f"build: {network} lacks layers in PyTorch: {', '.join(left)}")
    return model.to(memory_format=torch.channels_last)


def _load(module: nn.Module, layers: dict[str, list]) -> None:
    kind = _keras_kind(module)
    if kind is not None:
        _LOADERS[kind](module, *layers[kind].pop(0))
        return
    for child in module.children():
        _load(child, layers)


def _keras_kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Conv2d):
        return "DepthwiseConv2D" if module.groups > 1 else "Conv2D"
    if isinstance(module, nn.LSTM):
        return "Bidirectional" if module.bidirectional else "LSTM"
    return next((kind for base, kind in _KINDS if isinstance(module, base)), None)


def _load_convolution(module, kernel, bias=None):
    module.weight.copy_(kernel.permute(3, 2, 0, 1))
    if bias is not None:
        module.bias.copy_(bias)


def _load_depthwise(module, kernel):
    module.weight.copy_(kernel.permute(2, 3, 0, 1))


def _load_norm(module, gamma, beta, *moving):
    module.weight.copy_(gamma)
    module.bias.copy_(beta)
    if moving:
        module.running_mean.copy_(moving[0])
        module.running_var.copy_(moving[1])


def _load_dense(module, kernel, bias):
    module.weight.copy_(kernel.T)
    module.bias.copy_(bias)


def _load_embedding(module, embeddings):
    module.weight.copy_(embeddings)


def _load_attention(module, *arrays):
    """Kernel and bias of query, key, value, each by heads, and of the outputs."""
    width = module.outputs.in_features
    kernels = [kernel.reshape(width, width).T for kernel in arrays[0:6:2]]
    module.inputs.weight.copy_(torch.cat(kernels))
    module.inputs.bias.copy_(torch.cat([bias.reshape(width) for bias in arrays[1:6:2]]))
    _load_dense(module.outputs, arrays[6].reshape(width, width), arrays[7])


def _load_lstm(module, *arrays):
    """Both have the gates in the order input, forget, cell, output."""
    for suffix, first in (("", 0), ("_reverse", 3))[: len(arrays) // 3]:
        kernel, recurrent, bias = arrays[first : first + 3]
        getattr(module, f"weight_ih_l0{suffix}").copy_(kernel.T)
        getattr(module, f"weight_hh_l0{suffix}").copy_(recurrent.T)
        getattr(module, f"bias_ih_l0{suffix}").copy_(bias)
        # The second bias would be trained like the first, and both together twice as fast as Keras' one.
        getattr(module, f"bias_hh_l0{suffix}").zero_().requires_grad_(False)


_KINDS = (
    (nn.ConvTranspose2d, "Conv2DTranspose"),
    (nn.BatchNorm2d, "BatchNormalization"),
    (nn.LayerNorm, "LayerNormalization"),
    (nn.Embedding, "Embedding"),
    (Attention, "MultiHeadAttention"),
    (nn.Linear, "Dense"),
)
_LOADERS = {
    "Conv2D": _load_convolution,
    "Conv2DTranspose": _load_convolution,
    "DepthwiseConv2D": _load_depthwise,
    "BatchNormalization": _load_norm,
    "LayerNormalization": _load_norm,
    "Embedding": _load_embedding,
    "MultiHeadAttention": _load_attention,
    "Dense": _load_dense,
    "LSTM": _load_lstm,
    "Bidirectional": _load_lstm,
}
