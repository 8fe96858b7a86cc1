"""The models of the zoo: every torchvision classifier, the smallest of every timm family, what is no classifier, and
models of other libraries (`libraries`).

The smallest members are kept in timm.json, which `python -m benchmarks.zoo smallest` writes.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.zoo import libraries

if TYPE_CHECKING:
    from mimicut.inputs.teacher import Teacher

FAMILIES = Path(__file__).parent / "timm.json"
SIZE = (3, 224, 224)
_SMALL = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
_DETR = {"backbone_config": {"model_type": "resnet", "out_features": ["stage1", "stage2", "stage3", "stage4"]}}
# spec -> what else `mimicut.load_teacher` is given: parts of detectors, segmentation at the zoo's size, small
# members of the families of transformers; three of 518 and 768 pixels smaller, as float64 would take many minutes.
OTHERS: dict[str, dict[str, Any]] = {
    "timm:gemma4_vit_167m": {"input_size": (3, 240, 240)},
    "timm:qwen3_vit_88m": {"input_size": (3, 256, 256)},
    "torchvision:vit_h_14": {"model_kwargs": {"image_size": 224}},
    "torchvision:fcn_resnet50": {"input_size": SIZE},
    "torchvision:deeplabv3_mobilenet_v3_large": {"input_size": SIZE},
    "torchvision:lraspp_mobilenet_v3_large": {"input_size": SIZE},
    "torchvision:retinanet_resnet50_fpn": {"part": "backbone", "input_size": SIZE},
    "torchvision:fasterrcnn_mobilenet_v3_large_fpn": {"part": "backbone", "input_size": SIZE},
    "torchvision:ssdlite320_mobilenet_v3_large": {"part": "backbone"},
    "hf:ViTForImageClassification": {"model_kwargs": _SMALL},
    "hf:DeiTForImageClassification": {"model_kwargs": _SMALL},
    "hf:SwinForImageClassification": {},
    "hf:ConvNextV2ForImageClassification": {},
    "hf:ResNetForImageClassification": {},
    "hf:SegformerForImageClassification": {},
    "hf:SegformerForSemanticSegmentation": {},
    "hf:CLIPModel": {"part": "vision_model", "model_kwargs": {"vision_config": _SMALL, "text_config": _SMALL}},
    "open_clip:RN50": {},
    "open_clip:ViT-S-32-alt": {},
    "open_clip:ViT-B-32-SigLIP2-256": {},
    "open_clip:convnext_tiny": {},
    "open_clip:MobileCLIP-S1": {},
    "open_clip:ViTamin-S": {},
    "open_clip:coca_ViT-B-32": {},
    "hf:DetrForObjectDetection": {"part": "model.backbone.model", "model_kwargs": _DETR},
}


def specs() -> list[str]:
    """As `mimicut.load_teacher` reads them, with what OTHERS says."""
    from torchvision import models

    classifiers = models.list_models(module=models)
    families = json.loads(FAMILIES.read_text(encoding="utf-8"))
    smallest = [f"timm:{n}" for n in sorted(set(families.values()))]
    everything = [f"torchvision:{n}" for n in classifiers] + smallest + list(OTHERS) + list(libraries.MODELS)
    return list(dict.fromkeys(everything))


def load(spec: str) -> "Teacher":
    """The teacher of one of `specs`, with random weights."""
    from mimicut.results.teachers import load_teacher

    if spec in libraries.MODELS:
        return load_teacher(libraries.BUILDER, model_kwargs={"name": spec})
    return load_teacher(spec, pretrained=False, **OTHERS.get(spec, {}))


def builder(spec: str) -> str:
    """What `mimicut.load` needs as build_teacher for a result of that teacher; "" if nothing."""
    return libraries.BUILDER if spec in libraries.MODELS else ""


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
