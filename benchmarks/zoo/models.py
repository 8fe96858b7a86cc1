"""The models of the zoo: every torchvision classifier, and the smallest of every timm family.

The smallest members are kept in timm.json, which `python -m benchmarks.zoo smallest` writes.
"""

import json
import sys
import warnings
from pathlib import Path

FAMILIES = Path(__file__).parent / "timm.json"


def specs() -> list[str]:
    """As `understudy.load_teacher` reads them."""
    from torchvision import models

    classifiers = models.list_models(module=models)
    families = json.loads(FAMILIES.read_text(encoding="utf-8"))
    return [f"torchvision:{n}" for n in classifiers] + [f"timm:{n}" for n in sorted(set(families.values()))]


def write_smallest() -> None:
    """timm.json: family (a module of timm.models) -> its smallest member by parameters, toys ("test_*") left out."""
    import timm
    import torch

    warnings.simplefilter("ignore")
    smallest = {}
    for family in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=family):
            if name.startswith("test_"):
                continue
            try:
                with torch.device("meta"):
                    model = timm.create_model(name)
            except Exception as error:  # whatever a model's own code raises
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            sizes[name] = sum(p.numel() for p in model.parameters())
        if sizes:
            smallest[family] = min(sizes, key=sizes.get)
    FAMILIES.write_text(json.dumps(smallest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
