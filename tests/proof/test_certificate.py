"""What so many images can prove."""

import pytest
import torch
from by_hand import SCORES_NK, SEAM, scaler
from scipy.stats import binomtest

import mimicut as us
from mimicut.proof.certificate import binomial_interval, check_threshold, images_needed, images_to_halve, in_words
from mimicut.proof.figures import figures


@pytest.mark.parametrize(("threshold", "needed"), [(0.95, 72), (0.9, 36), (0.5, 6), (0.99, 368), (0.01, 1)])
def test_the_images_that_a_threshold_needs(threshold, needed):
    assert images_needed(threshold) == needed
    assert binomial_interval(needed, needed)[0] >= threshold
    assert needed == 1 or binomtest(needed - 1, needed - 1).proportion_ci().low < threshold


@pytest.mark.parametrize(("agree", "n"), [(45, 50), (50, 50), (10, 20), (900, 1000)])
def test_the_images_that_halve_an_interval(agree, n):
    more = images_to_halve(agree, n)
    low, high = binomial_interval(agree, n)
    narrow = binomial_interval(agree / n * (n + more), n + more)
    assert narrow[1] - narrow[0] <= (high - low) / 2
    assert 0.9 * n < more < 5 * n  # a width goes with the root of the images, or with the images where all agree


def test_the_fewest_images_that_halve_are_said():
    assert [images_to_halve(1, 10), images_to_halve(19, 20), images_to_halve(2, 50)] == [
        next(m for m in range(1, 500) if width(k / n * (n + m), n + m) <= width(k, n) / 2)
        for k, n in ((1, 10), (19, 20), (2, 50))
    ]


def width(successes, trials):
    low, high = binomial_interval(successes, trials)
    return high - low


def test_a_threshold_that_no_images_show_and_one_without_class_scores():
    with pytest.raises(us.MimicutError, match="not even 10,000,000 images"):
        check_threshold(0.9999999)
    assert "NO GO: the agreement is unknown" in us.Report(min_agreement=0.8).table()


def test_plain_words_round_down():
    assert in_words(0.9199).endswith("at least 91 times in 100")
    assert in_words(0.29).endswith("at least 29 times in 100")


def test_cosine_classes_confidence_and_disagreements_by_hand():
    teacher, model = scaler(1.0, 1.0, 1.0), scaler(1.0, 2.0, 1.0)
    found = figures(teacher, model, SEAM, SCORES_NK, batch_size=3)
    assert found.agreement_by_class == {0: (1, 2), 1: (1, 1), 2: (1, 1)}
    probabilities = [net(SCORES_NK).detach().double().softmax(1) for net in (teacher, model)]
    assert found.confidence_teacher == pytest.approx(float(probabilities[0].amax(1).mean()))
    assert found.confidence_student == pytest.approx(float(probabilities[1].amax(1).mean()))
    doubled = SCORES_NK * torch.tensor([1.0, 2.0, 1.0])
    assert found.feature_cosine == pytest.approx(float(torch.cosine_similarity(SCORES_NK, doubled).mean()))
    first = found.disagreements[0]  # the one image that is answered differently
    assert (first["image"], first["teacher"][0], first["student"][0]) == (3, 0, 1)
    assert first["student"][1] == pytest.approx(float(probabilities[1][3, 1]))
    assert 2 not in [each["image"] for each in found.disagreements]  # answered alike to the last digit
    same = figures(teacher, teacher, SEAM, SCORES_NK)
    assert (same.feature_cosine, same.disagreements) == (pytest.approx(1.0), ())


def test_a_report_says_go_and_in_words_what_was_proved():
    report = us.Report(
        top1_agreement=0.9, top1_agreement_low=0.78186, top1_agreement_high=0.967, images_held_out=50,
        confidence_teacher=0.8, confidence_student=0.7, min_agreement=0.8,
    )  # fmt: skip
    assert report.go is False
    said = " ".join(report.table(200).split())
    assert "at least 78 times in 100; " in said
    assert "NO GO: the lower end of the interval is 78.2%, at least 80.0% was required" in said
    assert "mean confidence in their own answers: teacher 80.0%, student 70.0%" in said
    assert us.Report(top1_agreement_low=0.8, min_agreement=0.8).go is True
    assert us.Report(top1_agreement_low=0.8).go is None
    assert us.Report(min_agreement=0.8).go is False
