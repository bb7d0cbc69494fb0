"""The test images that an audit stores for its report: right and wrong in their true proportion."""

from __future__ import annotations

import pytest
import torch

from gambeson.auditing.stages.examples import in_proportion

LABELS = torch.arange(1000) % 10


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ((640, 337, 13, 10), (7, 3, 0, 0)),
        ((560, 410, 30, 0), (6, 4, 0, 0)),
        ((0, 1000, 0, 0), (0, 10, 0, 0)),
        ((1, 0, 0, 999), (0, 0, 0, 10)),
    ],
)
def test_every_group_has_its_share(sizes: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    groups = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    groups = groups[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    found = in_proportion(LABELS, groups, 10)
    assert len(found.unique()) == 10
    counts = groups[found].bincount(minlength=4).tolist()
    assert sum(counts) == 10
    assert all(abs(count - size / 100) < 1 for count, size in zip(counts, sizes, strict=True))
    assert tuple(counts) == wanted
    assert groups[found].tolist() == sorted(groups[found].tolist())  # what the pattern turns comes first


def test_inside_a_group_the_first_of_every_class_come_in_turn() -> None:
    groups = torch.ones(1000, dtype=torch.long)
    assert in_proportion(LABELS, groups, 12).tolist() == [*range(10), 10, 11]
    assert in_proportion(LABELS[[5, 3, 13, 4]], groups[:4], 10).tolist() == [1, 3, 0, 2]
