"""The step of a contender that runs on PyTorch: on the CPU, pictures channels last in memory, Adam fused.

Runs in a contender's own process (`benchmarks/contenders.py`), which imports no Keras. Adam's epsilon is Keras' 1e-7;
Keras adds it before the second moment's bias is corrected, PyTorch after. Number and waiting of threads are PyTorch's
defaults: they were seen to sleep between turns.
"""

import numpy as np
import torch
from torch.nn import functional

from benchmarks import torch_networks

LEARNING_RATE = 1e-4


def make_step(kind: str, library: str, policy: str, network: str, weights_path: str):
    """Returns the step: (inputs, targets) to the loss when `kind` is "training", else to logits."""
    model = torch_networks.build(network, weights_path)
    model.train(kind == "training")
    forward = torch.compile(model) if library == "PyTorch compiled" else model
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=policy == "mixed_bfloat16")
    if kind == "inference":
        return _inference_step(forward, autocast)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE, eps=1e-7, fused=True)

    def step(inputs: np.ndarray, targets: np.ndarray) -> float:
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = functional.cross_entropy(forward(_tensor(inputs)), torch.from_numpy(targets).long())
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _inference_step(forward, autocast):
    def step(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), autocast:
            return forward(_tensor(inputs)).movedim(1, -1).numpy()

    return step


def _tensor(inputs: np.ndarray) -> torch.Tensor:
    """Pictures `[batch, height, width, channels]` are seen as channels first; nothing moves in memory."""
    tensor = torch.from_numpy(inputs)
    return tensor.movedim(-1, 1) if tensor.ndim == 4 else tensor
