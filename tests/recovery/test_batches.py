"""Extra images beside the few: which images are in a batch, and in which order; a run that continues has the same."""

import torch

from mimicut.recovery.batches import Passes, WithExtra, count, image_keys, images_in_batch, make_views, subset

CPU = torch.device("cpu")


def numbered(images: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + images, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()


def numbers(batch: tuple) -> list[int]:
    (images,), _ = batch
    return images[:, 0, 0, 0].int().tolist()


def passes(few, size: int = 8, share: float = 0.5) -> Passes:
    return Passes(few, size, "none", "none", 3, CPU, torch.float32, extra_share=share)


def test_a_batch_has_the_share_of_extra_images_and_every_image_has_its_turn():
    few = WithExtra(numbered(10), numbered(30, 100))
    batches = passes(few, share=0.75)
    seen = [numbers(next(batches)) for _ in range(5)]
    assert all(sum(n >= 100 for n in batch) == 6 for batch in seen)
    own = [n for batch in seen for n in batch if n < 100]
    others = [n for batch in seen for n in batch if n >= 100]
    assert sorted(own) == list(range(10))
    assert sorted(others) == list(range(100, 130))
    assert len({tuple(n >= 100 for n in batch) for batch in seen}) > 1  # the few are not always the first


def test_extra_images_fill_up_where_the_few_are_fewer_than_their_share():
    few = WithExtra(numbered(3), numbered(30, 100))
    assert images_in_batch(few, 16, 0.5) == (3, 13)
    assert sorted(n for n in numbers(next(passes(few, 16))) if n < 100) == [0, 1, 2]


def test_where_there_are_few_extra_images_a_batch_has_more_of_the_others():
    assert images_in_batch(WithExtra(numbered(50), numbered(2)), 16, 0.5) == (14, 2)
    assert images_in_batch(WithExtra(numbered(9), numbered(2)), 16, 0.5) == (9, 2)


def test_without_a_share_extra_images_are_never_seen():
    few = WithExtra(numbered(8), numbered(30, 100))
    assert max(numbers(next(passes(few, share=0.0)))) < 100


def test_for_all_else_the_few_are_the_only_images():
    few = WithExtra(numbered(4), numbered(9, 100))
    assert count(few) == 4
    assert image_keys(few) == image_keys(numbered(4))
    rest = subset(few, [1, 3])
    assert count(rest) == 2
    assert {n for n in numbers(next(passes(rest, 4))) if n < 100} == {1, 3}
    assert any(n >= 100 for n in numbers(next(passes(rest, 4))))


def test_views_keep_the_order_that_was_asked_for():
    few = WithExtra(numbered(4), numbered(9, 100))
    found = make_views(few, [5, 0, 12, 3], "none", torch.Generator())
    assert found[:, 0, 0, 0].tolist() == [101, 0, 108, 3]


def test_what_else_a_network_takes_stays_beside_the_images():
    class Source:
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def view(self, indices, views, generator):
            return (), {"pixel_values": self.images[indices], "interpolate": True}

    few = WithExtra(Source(numbered(4)), Source(numbered(9, 100)))
    args, kwargs = make_views(few, [4, 1], "none", torch.Generator())
    assert args == ()
    assert kwargs["interpolate"] is True
    assert kwargs["pixel_values"][:, 0, 0, 0].tolist() == [100, 1]


def test_passes_continue_where_they_stood():
    few = WithExtra(numbered(10), numbered(17, 100))
    for stop in (1, 2, 3, 5, 8):  # in the middle of a pass and at its end
        whole, before = passes(few), passes(few)
        wanted = [numbers(next(whole)) for _ in range(12)]
        for _ in range(stop):
            next(before)
        again = passes(few)
        again.go_to(before.state(), stop)
        assert [numbers(next(again)) for _ in range(12 - stop)] == wanted[stop:]
