"""Shares of a sparsity: exact sums, nobody above one, and whole blocks as near to a count as they come."""

from __future__ import annotations

import random

import pytest

from app.pruning.sparsity_allocation import blocks_to_remove, equal_blocks_to_remove, erk_kept

VGG_LIKE = {"a": (64, 3, 3, 3), "b": (128, 64, 3, 3), "c": (256, 128, 3, 3), "d": (512, 4096), "e": (10, 512)}


def sizes_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    sizes = {}
    for name, shape in shapes.items():
        sizes[name] = 1
        for axis in shape:
            sizes[name] *= axis
    return sizes


def authors_densities(shapes: dict[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """As in the authors' code: whoever would be denser than 1 is dense, and epsilon is worked out again."""
    sizes, dense = sizes_of(shapes), set[str]()
    while True:
        divisor = sum(sum(shape) for name, shape in shapes.items() if name not in dense)
        wanted = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        found = {n: 1.0 if n in dense else wanted / divisor * sum(shapes[n]) / sizes[n] for n in shapes}
        above = {name for name, value in found.items() if value > 1}
        if not above:
            return found
        dense.add(max(above, key=lambda name: found[name]))


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.5, 0.9])
def test_the_layers_densities_are_those_of_the_authors_to_one_weight(density: float) -> None:
    sizes = sizes_of(VGG_LIKE)
    kept = round(density * sum(sizes.values()))
    found = erk_kept(VGG_LIKE, sizes, kept)
    assert sum(found.values()) == kept
    for name, expected in authors_densities(VGG_LIKE, density).items():
        assert abs(found[name] - expected * sizes[name]) <= 1.001
        assert found[name] <= sizes[name]


def test_the_sum_is_exact_and_nobody_is_above_what_it_has_whatever_was_pruned_before() -> None:
    draw = random.Random(0)
    for _ in range(300):
        shapes = {
            str(number): tuple(draw.randint(1, 9) for _ in range(draw.choice([2, 3, 4, 5])))
            for number in range(draw.randint(1, 8))
        }
        alive = {name: draw.randint(1, size) for name, size in sizes_of(shapes).items()}
        kept = draw.randint(0, sum(alive.values()) + 5)
        found = erk_kept(shapes, alive, kept)
        assert sum(found.values()) == min(max(kept, len(shapes)), sum(alive.values()))
        assert all(1 <= found[name] <= alive[name] for name in shapes)


def test_small_layers_stay_denser_and_asking_again_for_what_is_left_changes_nothing() -> None:
    sizes = sizes_of(VGG_LIKE)
    found = erk_kept(VGG_LIKE, sizes, sum(sizes.values()) // 10)
    assert found["a"] / sizes["a"] == 1.0
    assert found["b"] / sizes["b"] > found["c"] / sizes["c"]
    assert found["e"] / sizes["e"] > found["d"] / sizes["d"]
    assert erk_kept(VGG_LIKE, found, sum(sizes.values()) // 10) == found


def test_as_many_blocks_go_as_come_nearest_and_of_two_that_are_equally_near_the_fewer() -> None:
    assert [blocks_to_remove([4] * 10, 0, wanted) for wanted in (0, 1, 2, 3, 4, 6, 7, 40, 99)] == [
        *[0, 0, 0, 1, 1],
        *[1, 2, 10, 10],
    ]
    assert blocks_to_remove([6, 1, 1], 0, 4) == 1  # the weakest is removed, though 6 and 0 are both off
    assert blocks_to_remove([6, 1, 1], 0, 2) == 0
    assert blocks_to_remove([], 0, 5) == 0


def test_zeros_that_are_there_count_and_blocks_without_a_living_weight_cost_nothing() -> None:
    assert blocks_to_remove([0, 0, 4, 4], 8, 12) == 3
    assert blocks_to_remove([4, 4], 9, 8) == 0


def test_equal_blocks_are_counted_without_a_list_of_them() -> None:
    for blocks in (0, 1, 2, 7):
        for size in (1, 2, 3, 8):
            for wanted in range(blocks * size + 3):
                assert equal_blocks_to_remove(blocks, size, wanted) == blocks_to_remove([size] * blocks, 0, wanted)


def test_every_count_is_within_half_a_block() -> None:
    draw = random.Random(1)
    for _ in range(200):
        blocks = [draw.randint(1, 20) for _ in range(draw.randint(1, 12))]
        wanted = draw.randint(0, sum(blocks))
        count = blocks_to_remove(blocks, 0, wanted)
        assert abs(sum(blocks[:count]) - wanted) <= max(blocks) / 2
