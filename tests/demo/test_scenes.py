"""The demo's teachers of other tasks: what they return, and that they have the figures that they state."""

import pytest
import torch

from mimicut.anatomy.find_seam import trace
from mimicut.demo import teacher_networks
from mimicut.demo.train_scenes import measure
from mimicut.results.teachers import load_teacher

KINDS = {
    "segmenter_tiny": {"map"},
    "detector_tiny": {"multilabel", "values"},
    "embedder_tiny": {"embedding"},
    "denoiser_tiny": {"values"},
}


@pytest.mark.parametrize("name", teacher_networks.OTHER_TASKS)
def test_every_output_is_imitated_and_of_its_kind(name):
    teacher = load_teacher(f"demo:{name}")
    outputs = trace(teacher.model, torch.zeros(2, *teacher.preprocessing.input_size)).seam.outputs
    assert all(output.imitated for output in outputs)
    assert {output.kind for output in outputs} == KINDS[name]


@pytest.mark.long
@pytest.mark.parametrize("name", teacher_networks.OTHER_TASKS)
def test_they_have_the_figures_that_they_state(name):
    stated = teacher_networks.facts(name)
    for figure, found in measure(name, teacher_networks.load(name)[0]).items():
        assert found == pytest.approx(stated[figure], abs=0.1), figure
