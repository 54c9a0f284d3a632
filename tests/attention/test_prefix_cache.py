"""The prefix cache finds exactly what was inserted and not evicted, never evicts what is locked, and leaks no page."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

from moesaic.attention.page_allocator import OutOfPages, PageAllocator
from moesaic.attention.prefix_cache import Node, PrefixCache

PAGE_SIZE = 4


def tokens(*pages: int) -> NDArray[np.int32]:
    """Whole pages of tokens: page content `n` is PAGE_SIZE times the token n."""
    return np.repeat(np.array(pages, dtype=np.int32), PAGE_SIZE)


def make(num_pages: int = 16, enabled: bool = True) -> PrefixCache:
    return PrefixCache(PageAllocator(num_pages), PAGE_SIZE, enabled)


def serve(cache: PrefixCache, prompt: NDArray[np.int32]) -> list[int]:
    """A request from match to release; its page row as the cache holds it."""
    match = cache.match(prompt)
    row = np.concatenate([match.pages, cache.allocate(len(prompt) // PAGE_SIZE - len(match.pages))])
    insertion = cache.insert(prompt, row, match.node)
    cache.release(insertion.node)
    return insertion.pages.tolist()


def test_a_second_request_finds_the_first_ones_pages() -> None:
    cache = make()
    row = serve(cache, tokens(1, 2, 3))
    match = cache.match(tokens(1, 2, 9))
    assert match.pages.tolist() == row[:2]
    assert match.num_tokens == 2 * PAGE_SIZE
    assert cache.counters.hit_rate == pytest.approx(2 / 6)


def test_only_whole_pages_are_found_and_max_tokens_rounds_down() -> None:
    cache = make()
    row = serve(cache, tokens(1, 2, 3))
    assert cache.match(tokens(1, 2, 3), max_tokens=3 * PAGE_SIZE - 1).pages.tolist() == row[:2]
    assert cache.match(tokens(1, 2, 3)[:-1]).pages.tolist() == row[:2]
    assert cache.match(tokens(1, 2, 3), max_tokens=0).num_tokens == 0


def test_pages_that_differ_in_one_token_are_different() -> None:
    cache = make()
    serve(cache, np.array([1, 2, 3, 4], dtype=np.int32))
    assert cache.match(np.array([1, 2, 3, 5], dtype=np.int32)).num_tokens == 0


def test_a_partial_page_stays_the_requests_own() -> None:
    cache = make()
    match = cache.match(tokens(1, 2)[:-1])
    insertion = cache.insert(tokens(1, 2)[:-1], cache.allocate(2), match.node)
    assert insertion.num_new == insertion.node.depth == cache.num_cached_pages == 1
    cache.release(insertion.node)
    cache.allocator.free(insertion.pages[insertion.node.depth :])
    cache.flush()
    assert cache.allocator.num_free == 16


def test_content_cached_meanwhile_replaces_the_requests_own_page() -> None:
    cache = make()
    first, second = cache.match(tokens(1, 2)), cache.match(tokens(1, 2, 3))
    first_row, second_row = cache.allocate(2), cache.allocate(3)
    first_insertion = cache.insert(tokens(1, 2), first_row, first.node)
    insertion = cache.insert(tokens(1, 2, 3), second_row, second.node)
    assert insertion.pages.tolist() == [*first_row.tolist(), int(second_row[2])]
    assert (insertion.num_replaced, insertion.num_new) == (2, 1)
    assert second_row.tolist() == [2, 3, 4], "the caller's row must not change under it"
    assert cache.allocator.num_free == 16 - 3
    cache.release(first_insertion.node)
    assert cache.num_evictable_pages == 0, "the second request still stands on the shared pages"
    cache.release(insertion.node)
    assert cache.num_evictable_pages == 3


def test_a_growing_request_inserts_page_by_page() -> None:
    cache = make()
    node, row = cache.match(tokens(1)).node, cache.allocate(3)
    for num in (1, 2, 3):
        insertion = cache.insert(tokens(1, 2, 3)[: num * PAGE_SIZE + 1], row, node)
        node, row = insertion.node, insertion.pages
        assert (node.depth, insertion.num_new, cache.num_cached_pages) == (num, 1, num)
    cache.release(node)
    assert cache.match(tokens(1, 2, 3)).pages.tolist() == row.tolist()


def test_the_least_recently_used_leaf_goes_first() -> None:
    cache = make()
    serve(cache, tokens(1, 2))
    serve(cache, tokens(3))
    cache.release(cache.match(tokens(1, 2)).node)
    assert cache.evict(1) == 1
    assert cache.match(tokens(3)).num_tokens == 0
    assert cache.match(tokens(1, 2)).num_tokens == 2 * PAGE_SIZE


def test_a_leaf_goes_before_its_parent() -> None:
    cache = make()
    serve(cache, tokens(1, 2, 3))
    cache.evict(2)
    assert cache.match(tokens(1, 2, 3)).num_tokens == PAGE_SIZE


def test_locked_pages_stay_and_allocate_evicts_the_others() -> None:
    cache = make(num_pages=4)
    serve(cache, tokens(1, 2))
    serve(cache, tokens(3, 4))
    match = cache.match(tokens(1, 2))
    assert cache.available_pages() == 2
    with pytest.raises(OutOfPages, match="wanted 3 KV pages, but 2 of 4"):
        cache.allocate(3)
    assert cache.num_cached_pages == 4, "an allocation that cannot succeed must evict nothing"
    assert not set(cache.allocate(2).tolist()) & set(match.pages.tolist())
    assert cache.match(tokens(1, 2)).num_tokens == 2 * PAGE_SIZE


def test_a_disabled_cache_keeps_nothing() -> None:
    cache = make(enabled=False)
    match = cache.match(tokens(1, 2))
    row = cache.allocate(2)
    insertion = cache.insert(tokens(1, 2), row, match.node)
    assert insertion.pages.tolist() == row.tolist()
    assert (insertion.node.depth, insertion.num_replaced, cache.num_cached_pages) == (0, 0, 0)
    cache.release(insertion.node)
    assert cache.match(tokens(1, 2)).num_tokens == 0
    cache.allocator.free(row)
    assert cache.allocator.num_free == cache.available_pages() == 16


def test_wrong_use_is_caught() -> None:
    cache = make()
    match = cache.match(tokens(1))
    insertion = cache.insert(tokens(1), cache.allocate(1), match.node)
    cache.release(insertion.node)
    with pytest.raises(AssertionError, match="not locked"):
        cache.release(insertion.node)
    with pytest.raises(AssertionError, match="int32"):
        cache.match(tokens(1).astype(np.int64))
    with pytest.raises(ValueError, match="page_size"):
        PrefixCache(PageAllocator(1), 0)


@dataclass
class Request:
    """A live request of the model test."""

    prompt: NDArray[np.int32]
    node: Node
    row: NDArray[np.int32]


ACTIONS = ["arrive"] * 4 + ["insert"] * 4 + ["finish"] * 2 + ["evict"]


class CacheMachine(RuleBasedStateMachine):
    """Random requests against a plain model: a dict from page-aligned prefix (tuple of page contents) to page.

    One rule for all actions, chosen with fixed weights: Hypothesis's own choice among rules left most runs without a
    single duplicate page.
    """

    @initialize(num_pages=st.integers(4, 40))
    def start(self, num_pages: int) -> None:
        self.cache = make(num_pages)
        self.model: dict[tuple[int, ...], int] = {}
        self.live: list[Request] = []

    @rule(data=st.data(), action=st.sampled_from(ACTIONS))
    def act(self, data: st.DataObject, action: str) -> None:
        if action == "arrive":
            content = data.draw(st.lists(st.integers(0, 1), max_size=6))
            self.arrive(content, data.draw(st.integers(0, PAGE_SIZE - 1)), data.draw(st.none() | st.integers(0, 24)))
        elif action == "evict":
            self.evict(data.draw(st.integers(0, 8)))
        elif self.live:
            index = data.draw(st.integers(0, len(self.live) - 1))
            if action == "insert":
                self.insert(self.live[index], data.draw(st.integers(0, len(self.live[index].prompt))))
            else:
                self.finish(self.live.pop(index))

    def cached(self) -> dict[tuple[int, ...], int]:
        """What the tree really holds, by walking it."""
        found: dict[tuple[int, ...], int] = {}
        todo: list[tuple[tuple[int, ...], Node]] = [((), self.cache.root)]
        while todo:
            path, node = todo.pop()
            for key, child in node.children.items():
                found[(*path, int(np.frombuffer(key, dtype=np.int32)[0]))] = child.page
                todo.append(((*path, int(np.frombuffer(key, dtype=np.int32)[0])), child))
        return found

    def forget_evicted(self) -> None:
        """Only unlocked content may be gone; the model follows."""
        cached = self.cached()
        locked = {tuple(r.prompt[::PAGE_SIZE][:k].tolist()) for r in self.live for k in range(1, r.node.depth + 1)}
        gone = self.model.keys() - cached.keys()
        assert not gone & locked, "evicted a locked page"
        self.model = {path: page for path, page in self.model.items() if path not in gone}

    def arrive(self, content: list[int], tail: int, cap: int | None) -> None:
        prompt = np.concatenate([tokens(*content), np.full(tail, 7, dtype=np.int32)])
        peeked = self.cache.peek(prompt, cap)
        match = self.cache.match(prompt, cap)
        assert match.num_tokens == peeked
        expected: list[int] = []
        most = len(content) if cap is None else min(len(content), cap // PAGE_SIZE)
        for k in range(1, most + 1):
            if tuple(content[:k]) not in self.model:
                break
            expected.append(self.model[tuple(content[:k])])
        assert match.pages.tolist() == expected
        num_new = -(-len(prompt) // PAGE_SIZE) - len(expected)
        if num_new > self.cache.available_pages():
            self.cache.release(match.node)
            return
        self.live.append(Request(prompt, match.node, match.pages))
        own = self.cache.allocate(num_new)
        self.forget_evicted()
        self.live[-1].row = np.concatenate([match.pages, own])

    def insert(self, request: Request, num_tokens: int) -> None:
        insertion = self.cache.insert(request.prompt[:num_tokens], request.row, request.node)
        for k in range(1, num_tokens // PAGE_SIZE + 1):
            path = tuple(request.prompt[: k * PAGE_SIZE : PAGE_SIZE].tolist())
            assert self.model.setdefault(path, int(insertion.pages[k - 1])) == insertion.pages[k - 1]
        request.node, request.row = insertion.node, insertion.pages

    def finish(self, request: Request) -> None:
        self.cache.release(request.node)
        self.cache.allocator.free(request.row[request.node.depth :])

    def evict(self, num: int) -> None:
        evictable = self.cache.num_evictable_pages
        assert self.cache.evict(num) == min(num, evictable)
        self.forget_evicted()

    @invariant()
    def every_page_has_one_owner(self) -> None:
        if not hasattr(self, "cache"):
            return
        cached = self.cached()
        assert cached == self.model
        own = [int(page) for r in self.live for page in r.row[r.node.depth :]]
        assert sorted([*cached.values(), *own]) == self.cache.allocator.out_pages().tolist()
        locked = {int(page) for r in self.live for page in r.row[: r.node.depth]}
        assert self.cache.num_cached_pages == len(cached)
        assert self.cache.num_evictable_pages == len(set(cached.values()) - locked)

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        for request in self.live:
            self.finish(request)
        self.cache.flush()
        assert self.cache.allocator.num_free == self.cache.allocator.num_pages


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_long_random_traffic_keeps_to_the_model() -> None:
    rng, machine, num_replaced = np.random.default_rng(0), CacheMachine(), 0
    machine.cache, machine.model, machine.live = make(200), {}, []
    for _ in range(3000):
        action = rng.choice(ACTIONS)
        if action == "arrive":
            machine.arrive(rng.integers(0, 3, size=rng.integers(0, 8)).tolist(), int(rng.integers(PAGE_SIZE)), None)
        elif action == "evict":
            machine.evict(int(rng.integers(60)))
        elif machine.live:
            index = int(rng.integers(len(machine.live)))
            if action == "insert":
                request, before = machine.live[index], machine.live[index].row
                machine.insert(request, int(rng.integers(len(request.prompt) + 1)))
                num_replaced += int((request.row != before).sum())
            else:
                machine.finish(machine.live.pop(index))
        machine.every_page_has_one_owner()
    assert num_replaced > 25, "the traffic must reach the rare case"
    machine.teardown()
