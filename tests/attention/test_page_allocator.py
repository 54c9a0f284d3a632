"""The page allocator gives a page to one holder at a time, same calls give same pages, and wrong frees are refused."""

from __future__ import annotations

import numpy as np
import pytest

from moesaic.attention.page_allocator import OutOfPages, PageAllocator


def test_a_fresh_allocator_gives_ascending_pages() -> None:
    pages = PageAllocator(8).allocate(3)
    assert pages.dtype == np.int32
    assert pages.tolist() == [0, 1, 2]


def test_asking_for_too_much_says_the_numbers_and_takes_nothing() -> None:
    allocator = PageAllocator(4)
    allocator.allocate(3)
    with pytest.raises(OutOfPages, match="wanted 2 KV pages, but 1 of 4 are available"):
        allocator.allocate(2)
    assert allocator.num_free == 1


def test_no_pages_is_a_legal_request() -> None:
    allocator = PageAllocator(1)
    assert len(allocator.allocate(0)) == 0
    allocator.free(np.empty(0, dtype=np.int32))
    assert allocator.num_free == 1


@pytest.mark.parametrize(
    ("pages", "message"),
    [([1, 1], "twice"), ([3], "already free"), ([-1], "outside"), ([4], "outside"), ([0, 3], "already free")],
)
def test_a_wrong_free_is_refused_and_frees_nothing(pages: list[int], message: str) -> None:
    allocator = PageAllocator(4)
    allocator.allocate(3)
    with pytest.raises(AssertionError, match=message):
        allocator.free(np.array(pages, dtype=np.int32))
    assert allocator.out_pages().tolist() == [0, 1, 2]


def test_a_page_cannot_be_freed_again_later() -> None:
    allocator = PageAllocator(4)
    pages = allocator.allocate(2)
    allocator.free(pages)
    with pytest.raises(AssertionError, match="already free"):
        allocator.free(pages[:1])


def test_random_traffic_never_gives_a_page_twice_and_repeats_exactly() -> None:
    def run() -> list[list[int]]:
        rng, allocator, held, given = np.random.default_rng(0), PageAllocator(64), [], []
        for _ in range(2000):
            if rng.random() < 0.5:
                num = int(rng.integers(0, 9))
                if num <= allocator.num_free:
                    held.append(allocator.allocate(num))
                    given.append(held[-1].tolist())
            elif held:
                allocator.free(held.pop(int(rng.integers(len(held)))))
            out = np.concatenate([np.empty(0, dtype=np.int32), *held])
            assert sorted(out.tolist()) == allocator.out_pages().tolist()
            assert allocator.num_free == 64 - len(out)
        return given

    assert run() == run()


@pytest.mark.parametrize("num_pages", [0, -1])
def test_an_empty_pool_is_refused(num_pages: int) -> None:
    with pytest.raises(ValueError, match="num_pages"):
        PageAllocator(num_pages)
