"""Random parameters for checks of the laws, which reveal errors that fresh weights hide."""

import torch
from torch import nn


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill `model` with random numbers, in place, so that `check_cut` sees every wrong index.

    Fresh weights hide such errors: a norm's gamma of 0 or a layer scale of 1e-6 silences a branch, whatever was cut in
    it.
    Tests and benchmarks use it; the package itself never does.

    Args:
        model: Any network. Integer tensors stay, since they may be indices; a buffer that is positive throughout
            stays positive, since it may be a variance of which the code takes the root.
        seed: Seed of the random numbers; the caller's random state stays as it is.

    Returns:
        `model` itself, in eval mode.

    >>> from torch import nn
    >>> norm = randomised(nn.BatchNorm2d(4))
    >>> bool((norm.running_var > 0).all()), bool((norm.weight == 1).any()), norm.training
    (True, False, False)
    """
    positive = {
        name for name, tensor in model.named_buffers() if tensor.is_floating_point() and bool((tensor > 0).all())
    }
    positive |= {name for name, _ in model.named_buffers() if name.endswith("running_var")}

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("num_batches_tracked"):
                tensor.fill_(3)
            elif not tensor.is_floating_point():
                continue  # indices: others would be out of range
            elif name in positive:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.dim() > 1 and (inputs := tensor.shape[1:].numel()) > 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / inputs) ** 0.5)
            else:  # a vector, or a scale of each channel in another shape: (C, 1, 1)
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5 + 0.3)
    return model.eval()
