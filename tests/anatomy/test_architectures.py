"""Law 2 on every architecture that the project names, everything at random, under two schemes."""

import pytest
import torch
from architectures import build

from mimicut.anatomy.cost import count_traced
from mimicut.anatomy.find_seam import trace
from mimicut.planning.planner import make_plan
from mimicut.proof.laws import check_cut
from mimicut.proof.randomised import randomised
from mimicut.surgery.cut import cut

pytestmark = pytest.mark.long  # minutes: make test-all

TORCHVISION = [
    "resnet18",
    "resnet34",
    "resnet50",
    "vgg16_bn",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "regnet_y_400mf",
    "densenet121",
    "googlenet",
    "mnasnet1_0",
    "shufflenet_v2_x1_0",
    "convnext_tiny",
]
TIMM = [
    "resnet50",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "convnext_atto",
    "repvgg_a0",
    "regnety_002",
    "ghostnet_100",
    "dla34",
    "res2net50_26w_4s",
]
SEAMS = {
    "torchvision:resnet34": "layer4:output", "torchvision:vgg16_bn": "features:output",
    "torchvision:mobilenet_v2": "features:output", "torchvision:densenet121": "features:output",
    "torchvision:mobilenet_v3_small": "features:output", "torchvision:googlenet": "inception5b:output",
    "torchvision:mnasnet1_0": "layers:output", "torchvision:shufflenet_v2_x1_0": "conv5:output",
    "timm:mobilenetv4_conv_small": "blocks:output", "timm:convnext_atto": "stages:output",
    "timm:dla34": "level5:output",
}  # fmt: skip


@pytest.mark.parametrize("spec", [f"torchvision:{n}" for n in TORCHVISION] + [f"timm:{n}" for n in TIMM])
def test_law_2_holds(spec):
    model = randomised(build(spec))
    example = torch.zeros(2, 3, 64, 64)
    anatomy = trace(model, example)
    if spec in SEAMS:
        assert [str(p) for p in anatomy.seam.points] == [SEAMS[spec]]
    assert not anatomy.unread
    total = count_traced(anatomy.traced).macs
    plans = [make_plan(model, anatomy, keep=0.5)]
    if plans[0].scheme == "mid":
        plans.append(make_plan(model, anatomy, keep_width=0.3, scheme="all", score="random"))
    for plan in plans:
        student = cut(model, plan)
        found = check_cut(anatomy, plan, model, student)
        assert found["dtype"] == "float64"
        assert found["error"] <= 1e-10
    assert 0.49 * total <= plans[0].macs["student"] <= 0.5 * total


def test_parameters_of_heads_that_never_run_are_listed():
    anatomy = trace(build("torchvision:googlenet").eval(), torch.zeros(2, 3, 64, 64))
    assert {n.split(".")[0] for n in anatomy.unused} == {"aux1", "aux2"}


def test_sizes_in_attributes_of_real_models():
    model = build("timm:res2net50_26w_4s").eval()
    anatomy = trace(model, torch.zeros(2, 3, 64, 64))
    student = cut(model, make_plan(model, anatomy, keep_width=0.5, scheme="mid"))
    assert (model.layer1[0].width, student.layer1[0].width) == (26, 13)


def _segmenter(name: str) -> torch.nn.Module:
    from torchvision.models import segmentation

    return getattr(segmentation, name)(weights=None, weights_backbone=None)


def _pyramid() -> torch.nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name="resnet18", weights=None)


@pytest.mark.parametrize(
    ("make", "points"),
    [
        (lambda: build("torchvision:squeezenet1_1"), ["classifier.0:output"]),
        (lambda: _segmenter("fcn_resnet50"), ["backbone:output.out"]),
        (
            lambda: _segmenter("deeplabv3_mobilenet_v3_large"),
            ["classifier.3:output"],
        ),  # most of its MACs are the head's
        (lambda: _segmenter("lraspp_mobilenet_v3_large"), ["backbone:output.low", "backbone:output.high"]),
        (_pyramid, [f"<model>:output.{part}" for part in (0, 1, 2, 3, "pool")]),
        (lambda: build("timm:efficientvim_m1"), [f"norm.{i}:output" for i in range(4)]),
    ],
)
def test_seams_that_are_not_one_map_before_a_pooling(make, points):
    model = randomised(make())
    anatomy = trace(model, torch.zeros(2, 3, 64, 64))
    assert [str(p) for p in anatomy.seam.points] == points
    plan = make_plan(model, anatomy, keep=0.7, score="random")
    assert check_cut(anatomy, plan, model, cut(model, plan))["error"] <= 1e-10
