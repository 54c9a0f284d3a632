"""Keeps the KV pages of earlier requests, so that a request with a known beginning does not compute it again.

A radix tree at page granularity: one node is one page, and the path from the root spells the tokens before it. A node's
key is the bytes of its page's int32 token ids, compared exactly: there are no hash collisions that could mix two texts.
The method is SGLang's RadixAttention (Zheng et al. 2024, arXiv:2312.07104). It knows no scheduler, tensor, clock or
rank.

Why one page per node, not runs of pages (a compressed radix): a node then never splits, so a lock, an LRU place and a
page each have one owner for life, and every operation is a walk. It is fast enough: match + allocate + evict + insert +
release cost 1.3 us per page of prompt with 100k pages cached, 0.2 ms for a prompt of 2,500 tokens
(`benchmarks/bench_prefix_cache.py`).

Who owns a page: a page in the tree belongs to the tree; a page not yet in it belongs to the request that allocated it.
A request holds a lock on one node, which protects the whole path above it. The life of a request's pages:

    match    -> a locked node, and the cached pages of the longest known prefix
    allocate -> pages of the request's own, for the rest
    insert   -> full pages move into the tree, the lock moves down to the last of them; where the tree had the same
                content already, the request's own page is freed and its row shows the tree's page instead
    release  -> the lock goes; the pages stay until `evict` needs them. The tail (pages beyond the node's, such as one
                that is not full) is the request's to free.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesaic.attention.page_allocator import OutOfPages, PageAllocator, PageArray

TokenArray = NDArray[np.int32]


class Node:
    """One cached page. `depth` counts pages from the root (root 0), so a node's path holds depth * page_size tokens.

    `num_uses` = locks on this very node + children that are in use. A node in use keeps its parent in use, so a lock or
    a release walks up only as far as something changes: a shared prefix in use is not walked at all.
    """

    __slots__ = ("children", "depth", "key", "num_uses", "page", "parent")

    def __init__(self, key: bytes, page: int, parent: Node | None) -> None:
        self.key = key
        self.page = page
        self.parent = parent
        self.depth: int = parent.depth + 1 if parent is not None else 0
        self.num_uses = 0
        self.children: dict[bytes, Node] = {}


class Match(NamedTuple):
    """The longest cached prefix. `node` is locked for the caller; `pages` int32 [num_tokens / page_size]."""

    node: Node
    pages: PageArray
    num_tokens: int


class Insertion(NamedTuple):
    """What `insert` did. `node` carries the caller's lock now and covers the first `node.depth` pages of `pages`.

    `pages` int32 is the row that was given, with `num_replaced` duplicates (freed) replaced by the cached page of the
    same content: the request must read and write through this row from now on. `num_new` pages went into the tree.
    """

    node: Node
    pages: PageArray
    num_new: int
    num_replaced: int


@dataclass(slots=True)
class CacheCounters:
    """Sums since the start. Every `match` counts, also a repeated one for a request that waits."""

    lookup_tokens: int = 0
    hit_tokens: int = 0
    evicted_pages: int = 0

    @property
    def hit_rate(self) -> float:
        """Tokens found / tokens looked up, 0 before the first lookup."""
        return self.hit_tokens / self.lookup_tokens if self.lookup_tokens else 0.0


class PrefixCache:
    """The tree, its locks, and the LRU order of what may go. Also the one door to pages: `allocate` evicts when it
    must.

    LRU: `_unused` holds every node with num_uses 0, oldest first. A release appends from the tail up to the root, and a
    node can only become unused after all its children have, so a child always stands before its parent and the front is
    always a leaf. Order depends on the calls alone (no clock, no id), so ranks that replay one schedule evict the same
    pages.

    Disabled (`enabled=False`), nothing is ever found or kept: all pages stay their requests' own.
    """

    def __init__(self, allocator: PageAllocator, page_size: int, enabled: bool = True) -> None:
        """page_size in tokens. Raises ValueError unless it is at least 1."""
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1 token, got {page_size}")
        self.allocator = allocator
        self.page_size = page_size
        self.enabled = enabled
        self.counters = CacheCounters()
        self._key_bytes = page_size * np.dtype(np.int32).itemsize
        self._root = Node(b"", -1, None)
        self._root.num_uses = 1  # never unused, never evicted, and the end of every walk up
        self._unused: OrderedDict[Node, None] = OrderedDict()
        self._num_cached = 0

    @property
    def num_cached_pages(self) -> int:
        """Pages the tree owns, locked or not."""
        return self._num_cached

    @property
    def num_evictable_pages(self) -> int:
        """Pages the tree owns that no lock protects."""
        return len(self._unused)

    @property
    def root(self) -> Node:
        """The node of a request without any cached page."""
        return self._root

    def match(self, token_ids: TokenArray, max_tokens: int | None = None) -> Match:
        """Find and lock the longest cached prefix of `token_ids` (int32 [n]), whole pages only, at most `max_tokens`
        tokens.

        The caller gives the node back once: by `release`, or by handing it to `insert` and releasing what that returns.
        """
        num_tokens = len(token_ids) if max_tokens is None else min(max_tokens, len(token_ids))
        self.counters.lookup_tokens += num_tokens
        if not self.enabled:
            return Match(self._root, np.empty(0, dtype=np.int32), 0)
        path = self._walk(self._root, self._keys(token_ids, 0, num_tokens // self.page_size))
        node = path[-1] if path else self._root
        self._lock(node)
        num_hit = len(path) * self.page_size
        self.counters.hit_tokens += num_hit
        return Match(node, np.array([cached.page for cached in path], dtype=np.int32), num_hit)

    def peek(self, token_ids: TokenArray, max_tokens: int | None = None) -> int:
        """How many tokens `match` would find. Locks nothing, counts nothing, and is no use in the sense of the LRU."""
        num_tokens = len(token_ids) if max_tokens is None else min(max_tokens, len(token_ids))
        if not self.enabled:
            return 0
        return len(self._walk(self._root, self._keys(token_ids, 0, num_tokens // self.page_size))) * self.page_size

    def insert(self, token_ids: TokenArray, pages: PageArray, node: Node) -> Insertion:
        """Give the request's full pages to the tree and move its lock from `node` to the last of them.

        token_ids int32 [n]: the tokens whose KV is computed; only the n // page_size full pages are taken. pages int32
        [>= n // page_size]: the request's row; its first `node.depth` pages are the tree's already. The row given is
        not changed.
        """
        num_full = len(token_ids) // self.page_size
        if not self.enabled or num_full <= node.depth:
            return Insertion(node, pages, 0, 0)
        assert len(pages) >= num_full, f"{len(token_ids)} tokens fill {num_full} pages, but the row has {len(pages)}"
        assert node is self._root or pages[node.depth - 1] == node.page, "the locked node is not on this row's path"
        keys = self._keys(token_ids, node.depth, num_full)
        known = self._walk(node, keys)
        tail, row = node, pages
        if known:
            tail, row = known[-1], pages.copy()
            duplicates = slice(node.depth, tail.depth)
            row[duplicates] = [cached.page for cached in known]
            assert not (row[duplicates] == pages[duplicates]).any(), "the request owns a page that the tree owns too"
            self.allocator.free(pages[duplicates])
        for key, page in zip(keys[len(known) :], pages[tail.depth : num_full].tolist(), strict=True):
            child = Node(key, page, tail)
            tail.children[key] = child
            tail = child
        num_new = len(keys) - len(known)
        self._num_cached += num_new
        self._lock(tail)
        self.release(node)
        return Insertion(tail, row, num_new, len(known))

    def release(self, node: Node) -> None:
        """Give back one lock on `node`. What nobody uses any more becomes evictable, as the most recently used."""
        if not self.enabled:
            return
        at: Node | None = node
        while at is not None:
            assert at.num_uses > 0, "released a node that is not locked"
            at.num_uses -= 1
            if at.num_uses:
                return
            self._unused[at] = None
            at = at.parent

    def available_pages(self) -> int:
        """Pages that `allocate` could give now: the free ones and those it may evict."""
        return self.allocator.num_free + len(self._unused)

    def allocate(self, num_pages: int) -> PageArray:
        """Pages for a request, int32 [num_pages]; evicts what it must. Raises OutOfPages, having evicted none."""
        num_short = num_pages - self.allocator.num_free
        if num_short > len(self._unused):
            raise OutOfPages(num_pages, self.available_pages(), self.allocator.num_pages)
        if num_short > 0:
            self.evict(num_short)
        return self.allocator.allocate(num_pages)

    def evict(self, num_pages: int) -> int:
        """Free up to `num_pages` unused pages, least recently used first, leaves before parents. Returns how many."""
        freed = []
        for _ in range(min(num_pages, len(self._unused))):
            node, _ = self._unused.popitem(last=False)
            assert not node.children and node.parent is not None, "the LRU order put a parent before its child"
            del node.parent.children[node.key]
            node.parent = None  # breaks the cycle: the node goes now, not at the next garbage collection
            freed.append(node.page)
        self.allocator.free(np.array(freed, dtype=np.int32))
        self._num_cached -= len(freed)
        self.counters.evicted_pages += len(freed)
        return len(freed)

    def flush(self) -> int:
        """Evict everything that no lock protects. Returns how many pages that freed."""
        return self.evict(len(self._unused))

    def _keys(self, token_ids: TokenArray, first_page: int, end_page: int) -> list[bytes]:
        """The node keys of pages [first_page, end_page) of a token row: copied to bytes once, then sliced."""
        assert token_ids.dtype == np.int32, f"token ids must be int32 (their bytes are the keys), got {token_ids.dtype}"
        data = token_ids[first_page * self.page_size : end_page * self.page_size].tobytes()
        width = self._key_bytes
        return [data[start : start + width] for start in range(0, len(data), width)]

    @staticmethod
    def _walk(node: Node, keys: list[bytes]) -> list[Node]:
        """The nodes below `node` that spell the longest known beginning of `keys`."""
        path: list[Node] = []
        for key in keys:
            child = node.children.get(key)
            if child is None:
                break
            node = child
            path.append(node)
        return path

    def _lock(self, node: Node) -> None:
        """One use more; whatever becomes used by that leaves the LRU (a node just made was never in it)."""
        at: Node | None = node
        while at is not None:
            at.num_uses += 1
            if at.num_uses > 1:
                return
            self._unused.pop(at, None)
            at = at.parent
