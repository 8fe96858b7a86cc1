"""Figures of outputs by their kind, against answers by hand."""

import math
from dataclasses import replace

import pytest
import torch
from nets import Chain
from scipy.stats import binomtest
from torch import nn

import mimicut as us
from mimicut.base.errors import InputError
from mimicut.inputs.teacher import own_teacher
from mimicut.proof.output_figures import OutputMeter, bootstrap, check_fit
from mimicut.proof.randomised import randomised
from mimicut.results.store import read
from mimicut.surgery.seam import Output, Seam, SeamPoint
from mimicut.workflow.compress import compress
from mimicut.workflow.crossfit import crossfit

SEAM = Seam((SeamPoint("body"),), ((8,),), ())


def measured(output, theirs, ours, batch=3):
    meter = OutputMeter(output)
    for start in range(0, len(theirs), batch):
        meter.add(theirs[start : start + batch], ours[start : start + batch])
    return meter.figures()


def pair(*shape, seed=0, noise=0.3):
    draws = torch.Generator().manual_seed(seed)
    theirs = torch.randn(*shape, generator=draws)
    return theirs, theirs + noise * torch.randn(*shape, generator=draws)


def test_error_and_correlation_by_hand():
    theirs, ours = pair(7, 4)
    found = measured(Output("", "values"), theirs, ours)
    a, b = theirs.double(), ours.double()
    spread = (a - a.mean(0)).square().sum()
    assert found.error == pytest.approx(((a - b).square().sum() / spread).item())
    assert found.error_low < found.error < found.error_high
    centred = [(x - x.mean(0)).flatten() for x in (a, b)]
    assert found.correlation == pytest.approx(torch.corrcoef(torch.stack(centred))[0, 1].item())
    assert found.cosine == pytest.approx(torch.cosine_similarity(a, b).mean().item())
    assert (found.shape, found.agreement, found.overlap, found.neighbours) == ((4,), None, None, None)
    one = measured(Output("", "values"), theirs[:1], ours[:1])
    assert (one.error, one.error_low, one.cosine_low) == (None, None, None)
    assert measured(Output("", "values"), theirs[:0], ours[:0]).error is None


def test_agreement_of_scores_labels_and_positions_by_hand():
    theirs, ours = pair(9, 5, noise=1.0)
    scores = measured(Output("", "scores"), theirs, ours)
    same = int((theirs.argmax(1) == ours.argmax(1)).sum())
    interval = binomtest(same, 9).proportion_ci(method="exact")
    assert (scores.agreement, scores.agreement_low) == (same / 9, pytest.approx(interval.low))

    labels = measured(Output("", "multilabel", "sigmoid"), theirs.sigmoid(), ours.sigmoid())
    yes, no = theirs > 0, ours > 0
    assert labels.agreement == pytest.approx((yes == no).double().mean().item())
    assert labels.overlap == pytest.approx(((yes & no).sum() / (yes | no).sum()).item())
    assert measured(Output("", "multilabel"), theirs, ours).agreement == labels.agreement
    assert labels.agreement_low < labels.agreement < labels.agreement_high

    theirs, ours = pair(6, 3, 4, 4, noise=1.0)
    found = measured(Output("", "map"), theirs, ours)
    first, second = theirs.argmax(1), ours.argmax(1)
    assert found.agreement == pytest.approx((first == second).double().mean().item())
    overlaps = [((first == c) & (second == c)).sum() / ((first == c) | (second == c)).sum() for c in range(3)]
    assert found.overlap == pytest.approx(sum(overlaps).item() / 3)
    mask = measured(Output("", "map"), theirs[:, :1], ours[:, :1])
    assert mask.agreement == pytest.approx(((theirs > 0) == (ours > 0))[:, 0].double().mean().item())


def test_neighbours_and_pictures_by_hand():
    theirs = torch.eye(6) + 0.1 * torch.arange(6.0)[:, None].expand(6, 6)
    same = measured(Output("", "embedding"), theirs, 3 * theirs)
    assert (same.neighbours, same.cosine) == (1.0, pytest.approx(1.0))
    line = torch.tensor([0.0, 0.1, 0.3, 0.6, 1.0, 1.5])
    angles = torch.stack([line.cos(), line.sin()], 1)
    moved = line.clone()
    moved[0] = 1.45  # the first image now lies beside the last one
    # Nearest in the teacher: 1, 0, 1, 2, 3, 4; in the student: 5, 2, 1, 2, 3, 0.
    found = measured(Output("", "embedding"), angles, torch.stack([moved.cos(), moved.sin()], 1))
    assert found.neighbours == pytest.approx(3 / 6)
    theirs, ours = pair(4, 3, 5, 5)
    picture = measured(Output("", "values", image=True), theirs, ours)
    mse = (theirs.double() - ours.double()).square().mean().item()
    assert picture.psnr == pytest.approx(10 * math.log10((theirs.max() - theirs.min()).item() ** 2 / mse))


def test_the_axis_of_images_counts():
    theirs, ours = pair(7, 4, 3)
    first = measured(Output("", "values"), theirs, ours)
    meter = OutputMeter(Output("", "values", batch_axis=1))
    meter.add(theirs.movedim(0, 1), ours.movedim(0, 1))
    assert meter.figures().error == pytest.approx(first.error)


def test_the_bootstrap_covers_a_mean():
    draws = torch.Generator().manual_seed(3)
    inside = 0
    for _ in range(200):
        low, high = bootstrap(torch.rand(60, generator=draws, dtype=torch.float64))
        inside += low <= 0.5 <= high
    assert 180 <= inside <= 200
    assert bootstrap(torch.ones(1)) == (None, None)


class _Two(nn.Module):
    """A body, class scores and coordinates."""

    def __init__(self, activation=None):
        super().__init__()
        self.body, self.classes, self.point = Chain(), nn.Linear(16, 5), nn.Linear(16, 2)
        self.activation = activation or nn.Identity()

    def forward(self, x):
        x = self.body.pool(self.body.body(x)).flatten(1)
        return {"classes": self.activation(self.classes(x)), "point": self.point(x)}


PREPROCESSING = us.Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
CONFIG = us.MimicConfig(steps=0, views="none", start="closed_form")


def images(count=24, seed=0):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def teacher(model=None, seed=0):
    torch.manual_seed(seed)
    return own_teacher(randomised(model or _Two()), preprocessing=PREPROCESSING)


def run(model=None, **options):
    options = {"keep_width": 0.5, "scheme": "all", "config": CONFIG, **options}
    return compress(teacher(model), images(), held_out=images(30, 1), **options)


def test_every_output_is_in_the_report(tmp_path):
    result = run(output={"point": "values", "classes": "scores"}, folder=tmp_path / "small")
    report = result.report
    assert [(o["part"], o["kind"]) for o in report.outputs] == [("classes", "scores"), ("point", "values")]
    assert report.top1_agreement == report.outputs[0]["agreement"]
    table = " ".join(report.table().split())
    assert "output point (values): cosine" in table
    assert "relative error" in table
    _, again, _ = read(tmp_path / "small")
    assert again.output_lines() == report.output_lines() != []
    page = (tmp_path / "small" / "report.html").read_text()
    assert "output point (values)" in page
    assert 'output = ["point=values", "classes=scores"]' in (tmp_path / "small" / "run.toml").read_text()


def test_scores_that_are_coordinates_are_no_classes_where_one_says_so():
    both = run().report  # two rows of numbers: which of them are classes is not known
    assert both.top1_agreement is None
    assert [o["kind"] for o in both.outputs] == ["scores", "scores"]
    values = run(output="values").report
    assert values.top1_agreement is None
    assert not values.agreement_by_class
    assert not values.disagreements
    assert "the teacher names" not in " ".join(values.notes)
    assert not any("same class" in line for line in values.output_lines())


def test_probabilities_are_not_made_probabilities_twice():
    plain, soft = (run(_Two(a), output={"point": "values"}).report for a in (nn.Identity(), nn.Softmax(1)))
    assert soft.confidence_teacher == pytest.approx(plain.confidence_teacher, rel=1e-5)
    log = run(_Two(nn.LogSoftmax(1)), output={"point": "values"}).report
    assert log.confidence_teacher == pytest.approx(plain.confidence_teacher, rel=1e-5)


def test_thresholds_hold_for_every_output_that_they_fit():
    report = run(output={"point": "values"}, min_agreement=0.01, max_error=50.0).report
    assert report.go is True
    said = [line for line in report.certificate() if line.startswith("GO")]
    assert len(said) == 2
    assert "the upper end of the error is" in said[1]
    low = min(o["agreement_low"] for o in report.outputs if o["kind"] == "scores")
    assert replace(report, min_agreement=low + 1e-3).go is False
    high = report.outputs[1]["error_high"]
    assert replace(report, max_error=high * 0.999).go is False
    alone = run(output="values", max_error=1e-9).report
    assert alone.go is False
    assert alone.certificate()[0].startswith("NO GO: the upper end of the error at output")


def test_a_threshold_that_fits_no_output_is_refused_before_any_work():
    stages = []
    with pytest.raises(InputError, match=r"returns no classes .*--max-error"):
        run(output="values", min_agreement=0.5, on_stage=stages.append)
    assert not any("cutting" in s or "channels matter" in s for s in stages)
    with pytest.raises(InputError, match=r"returns classes .*--min-agreement"):
        run(max_error=0.5)
    with pytest.raises(InputError, match="found 0, expected a relative error above 0"):
        run(max_error=0)
    with pytest.raises(InputError, match="found 'logits', expected one of"):
        run(output="logits")
    with pytest.raises(InputError, match="the output 'logits': the network returns 'classes', 'point'"):
        run(output={"logits": "scores"})
    check_fit(SEAM, 0.9, 0.1)  # outputs that are not known are not judged


def test_folds_are_pooled_by_output():
    result = crossfit(teacher(), images(12), 3, keep_width=0.5, scheme="all", config=CONFIG, output={"point": "values"})
    first, second = result.report.outputs
    assert first["agreement"] == result.report.top1_agreement
    assert first["agreement_low"] == pytest.approx(result.report.top1_agreement_low)
    assert second["error"] is not None
    assert second["error_low"] is None
    with pytest.raises(InputError, match="crossfit: found an allowed error"):
        crossfit(teacher(), images(12), 3, keep_width=0.5, max_error=0.5, output="values")


def test_probabilities_are_halved_at_one_half_also_where_no_graph_shows_the_sigmoid():
    theirs, ours = pair(9, 5, noise=1.0)
    seen = measured(Output("", "multilabel", "sigmoid"), theirs.sigmoid(), ours.sigmoid())
    unseen = measured(Output("", "multilabel"), theirs.sigmoid(), ours.sigmoid())
    assert seen.agreement == unseen.agreement < 1


def test_classes_stand_on_their_own_axis():
    theirs, ours = pair(6, 3, 4, 5, noise=1.0)
    first = measured(Output("", "map"), theirs, ours)
    last = measured(Output("", "map", class_axis=3), theirs.movedim(1, 3), ours.movedim(1, 3))
    assert (last.agreement, last.overlap) == (first.agreement, first.overlap)
    mask = measured(Output("", "map"), theirs[:, 0].sigmoid(), ours[:, 0].sigmoid())  # (N, H, W)
    assert mask.agreement == pytest.approx(((theirs > 0) == (ours > 0))[:, 0].double().mean().item())
    tokens = measured(Output("", "scores"), theirs[:, 0], ours[:, 0])  # (N, T, K)
    assert tokens.agreement == pytest.approx((theirs[:, 0].argmax(-1) == ours[:, 0].argmax(-1)).double().mean().item())
    assert 0 <= tokens.agreement_low <= tokens.agreement


def test_one_number_for_each_image_and_several_rows_for_each():
    theirs, ours = pair(8)
    assert measured(Output("", "values"), theirs, ours).error > 0
    rows, others = pair(24, 5)
    meter = OutputMeter(Output("", "scores"))
    meter.add(rows, others, 8)
    found = meter.figures()
    assert found.agreement == pytest.approx((rows.argmax(1) == others.argmax(1)).double().mean().item())
    assert found.agreement_high - found.agreement_low > 0.2  # of eight images, not of 24


@pytest.mark.parametrize(
    "head",
    [
        lambda p: p.view(len(p), -1, 5).sigmoid(),
        lambda p: p.view(len(p), -1, 5).clamp(0, 1),
    ],
)
def test_numbers_from_0_to_1_make_no_detector(head):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = Chain(), nn.Linear(16, 40)

        def forward(self, x):
            return head(self.fc(self.body.pool(self.body.body(x)).flatten(1)))

    report = run(Net()).report
    assert report.detections is None
    with pytest.raises(InputError, match="returns no classes"):
        run(Net(), min_agreement=0.01)


def test_a_number_for_each_image_is_compressed():
    class Age(_Two):
        def forward(self, x):
            return super().forward(x)["point"][:, 0]

    report = run(Age(), max_error=1e9).report
    assert report.go is True
    assert report.outputs[0]["shape"] == ()
