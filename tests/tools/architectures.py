"""Published architectures with random weights."""

import torch


def build(spec: str) -> torch.nn.Module:
    library, _, name = spec.partition(":")
    if library == "timm":
        import timm

        return timm.create_model(name)
    from torchvision import models

    kwargs = {"init_weights": False} if name == "googlenet" else {}
    return models.get_model(name, weights=None, **kwargs)
