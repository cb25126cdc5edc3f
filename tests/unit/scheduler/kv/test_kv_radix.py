"""RadixTree: finds exactly what was inserted, protects what is locked, evicts by policy."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quire_scheduler.kv.blocks import BlockAccountingError
from quire_scheduler.kv.eviction import POLICIES, policy
from quire_scheduler.kv.radix import MatchResult, Node, RadixTree

BLOCK = 2  # tokens


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def make_tree(policy_name: str = "lru") -> RadixTree:
    return RadixTree(4 * BLOCK, policy(policy_name), Clock(), lambda namespace: b"r" * 16)


def data(tokens: Sequence[int]) -> bytes:
    return np.array(tokens, np.int32).tobytes()


def find(tree: RadixTree, tokens: Sequence[int], namespace: Hashable = "ns") -> MatchResult:
    return tree.match(namespace, data(tokens), len(tokens) // BLOCK)


def add(tree: RadixTree, tokens: Sequence[int], ids: Sequence[int]) -> Node:
    """Inserts from the root and returns the lock."""
    root = tree.lock(tree.match("ns", b"", 0))
    return tree.insert(root, data(tokens), np.array(ids, np.int32)).node


def test_match_ends_at_the_last_equal_block() -> None:
    tree = make_tree()
    add(tree, [1, 2, 3, 4, 5, 6], [10, 11, 12])
    assert find(tree, [1, 2, 3, 4, 5, 7]).block_ids.tolist() == [10, 11]
    assert find(tree, [1, 2, 3, 4, 5, 6, 9, 9]).block_ids.tolist() == [10, 11, 12]
    assert find(tree, [1, 9, 3, 4]).block_ids.tolist() == []


def test_match_obeys_its_limit() -> None:
    tree = make_tree()
    add(tree, [1, 2, 3, 4], [10, 11])
    assert tree.match("ns", data([1, 2, 3, 4]), 1).block_ids.tolist() == [10]


def test_namespaces_do_not_meet() -> None:
    tree = make_tree()
    add(tree, [1, 2], [10])
    assert find(tree, [1, 2], "other").block_ids.tolist() == []


def test_match_does_not_change_the_tree() -> None:
    tree = make_tree()
    tree.unlock(add(tree, [1, 2, 3, 4], [10, 11]))
    before = [(n.last_access, n.hits, len(n.ids)) for n in tree.nodes()]
    find(tree, [1, 2, 9, 9])
    find(tree, [1, 2], "other")
    assert [(n.last_access, n.hits, len(n.ids)) for n in tree.nodes()] == before
    assert list(tree.roots) == ["ns"]


def test_lone_request_grows_its_leaf_in_place() -> None:
    tree = make_tree()
    node = add(tree, [1, 2], [10])
    for i in range(5):
        node = tree.insert(node, data([i, i]), np.array([20 + i], np.int32)).node
    assert [n.ids.tolist() for n in tree.nodes()] == [[10, 20, 21, 22, 23, 24]]


def test_a_leaf_locked_by_two_is_not_grown_in_place() -> None:
    tree = make_tree()
    node = add(tree, [1, 2], [10])
    other = tree.lock(find(tree, [1, 2]))
    assert other is node
    tree.insert(node, data([3, 4]), np.array([11], np.int32))
    tree.insert(other, data([5, 6]), np.array([12], np.int32))
    tree.check()
    assert find(tree, [1, 2, 3, 4]).block_ids.tolist() == [10, 11]
    assert find(tree, [1, 2, 5, 6]).block_ids.tolist() == [10, 12]


def test_cursor_survives_a_split_above_it() -> None:
    tree = make_tree()
    node = add(tree, [1, 2, 3, 4, 5, 6], [10, 11, 12])
    add(tree, [1, 2, 7, 8], [10, 13])
    node = tree.insert(node, data([9, 9]), np.array([14], np.int32)).node
    tree.check()
    assert find(tree, [1, 2, 3, 4, 5, 6, 9, 9]).block_ids.tolist() == [10, 11, 12, 14]
    tree.unlock(node)
    tree.check()


def test_equal_block_locked_by_another_is_shared_not_replaced() -> None:
    tree = make_tree()
    add(tree, [1, 2, 3, 4], [10, 11])
    root = tree.lock(tree.match("ns", b"", 0))
    result = tree.insert(root, data([1, 2, 3, 4, 5, 6]), np.array([20, 21, 22], np.int32))
    assert result.shared.tolist() == [10, 11] and result.displaced.tolist() == []
    assert find(tree, [1, 2, 3, 4, 5, 6]).block_ids.tolist() == [10, 11, 22]


def test_equal_block_nobody_locks_is_displaced() -> None:
    tree = make_tree()
    tree.unlock(add(tree, [1, 2, 3, 4], [10, 11]))
    root = tree.lock(tree.match("ns", b"", 0))
    result = tree.insert(root, data([1, 2]), np.array([20], np.int32))
    assert result.shared.tolist() == [] and result.displaced.tolist() == [10]
    assert find(tree, [1, 2, 3, 4]).block_ids.tolist() == [20, 11]


def test_locked_blocks_are_not_evicted() -> None:
    tree = make_tree()
    node = add(tree, [1, 2, 3, 4], [10, 11])
    assert tree.evict(9).tolist() == []
    tree.unlock(node)
    assert tree.evict(9).tolist() == [10, 11]
    assert not tree.roots


def test_only_the_part_under_the_lock_is_protected() -> None:
    tree = make_tree()
    tree.unlock(add(tree, [1, 2, 3, 4, 5, 6], [10, 11, 12]))
    tree.lock(find(tree, [1, 2, 9, 9]))
    assert tree.evict(9).tolist() == [11, 12]
    assert tree.evict(9).tolist() == []


def test_eviction_takes_the_tail_and_only_what_is_needed() -> None:
    tree = make_tree()
    tree.unlock(add(tree, [1, 2, 3, 4, 5, 6], [10, 11, 12]))
    assert tree.evict(1).tolist() == [12]
    assert find(tree, [1, 2, 3, 4, 5, 6]).block_ids.tolist() == [10, 11]


def test_receipt_given_back_twice_is_an_error() -> None:
    tree = make_tree()
    node = add(tree, [1, 2], [10])
    tree.unlock(node)
    with pytest.raises(BlockAccountingError, match="given back twice"):
        tree.unlock(node)


@pytest.mark.parametrize(
    ("name", "first_out"),
    [("lru", [11]), ("lfu", [12]), ("fifo", [10])],
)
def test_policy_decides_who_goes_first(name: str, first_out: list[int]) -> None:
    tree = make_tree(name)
    for tokens, block in (([1, 1], 10), ([2, 2], 11), ([3, 3], 12)):
        tree.unlock(add(tree, tokens, [block]))
    tree.unlock(tree.lock(find(tree, [2, 2])))  # 11: one hit, then left alone
    tree.unlock(tree.lock(find(tree, [1, 1])))
    tree.unlock(tree.lock(find(tree, [1, 1])))  # 10: two hits
    tree.unlock(add(tree, [3, 3], [12]))  # 12: newest access, no hit
    assert tree.evict(1).tolist() == first_out


def test_unknown_policy_names_the_choices() -> None:
    with pytest.raises(ValueError, match="use one of fifo, lfu, lru"):
        policy("random")


def test_heap_does_not_grow_with_use() -> None:
    tree = make_tree()
    tree.unlock(add(tree, [1, 2], [10]))
    for _ in range(1000):
        tree.unlock(tree.lock(find(tree, [1, 2])))
    assert len(tree._heap) < 100
    tree.check()


class TreeMachine(RuleBasedStateMachine):
    """Against a dict: (namespace, prefix) -> block id."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = make_tree()
        self.model: dict[tuple[str, tuple[int, ...]], int] = {}
        self.cursors: list[tuple[str, list[int], Node]] = []
        self.next_id = 1

    tokens = st.lists(st.integers(0, 1), max_size=12).map(lambda t: t[: len(t) // BLOCK * BLOCK])

    def expect(self, namespace: str, tokens: list[int]) -> list[int]:
        found: list[int] = []
        for end in range(BLOCK, len(tokens) + 1, BLOCK):
            block = self.model.get((namespace, tuple(tokens[:end])))
            if block is None:
                break
            found.append(block)
        return found

    @rule(namespace=st.sampled_from("ab"), tokens=tokens)
    def match_agrees(self, namespace: str, tokens: list[int]) -> None:
        found = find(self.tree, tokens, namespace).block_ids
        assert found.tolist() == self.expect(namespace, tokens)

    @rule(namespace=st.sampled_from("ab"), tokens=tokens)
    def lock(self, namespace: str, tokens: list[int]) -> None:
        match = find(self.tree, tokens, namespace)
        matched = tokens[: len(match.block_ids) * BLOCK]
        self.cursors.append((namespace, matched, self.tree.lock(match)))

    @precondition(lambda self: self.cursors)
    @rule(pick=st.integers(0, 99), tokens=tokens)
    def insert(self, pick: int, tokens: list[int]) -> None:
        namespace, prefix, node = self.cursors[pick % len(self.cursors)]
        n = len(tokens) // BLOCK
        ids = list(range(self.next_id, self.next_id + n))
        self.next_id += n
        whole = prefix + tokens
        before = self.expect(namespace, whole)[len(prefix) // BLOCK :]
        result = self.tree.insert(node, data(tokens), np.array(ids, np.int32))
        num_shared = len(result.shared)
        assert [*result.shared.tolist(), *result.displaced.tolist()] == before
        for i in range(num_shared, n):
            self.model[namespace, tuple(whole[: len(prefix) + (i + 1) * BLOCK])] = ids[i]
        self.cursors[pick % len(self.cursors)] = (namespace, whole, result.node)

    @precondition(lambda self: self.cursors)
    @rule(pick=st.integers(0, 99))
    def unlock(self, pick: int) -> None:
        self.tree.unlock(self.cursors.pop(pick % len(self.cursors))[2])

    @rule(n=st.integers(1, 4))
    def evict(self, n: int) -> None:
        gone = set(self.tree.evict(n).tolist())
        assert len(gone) <= n
        keys = [key for key, block in self.model.items() if block in gone]
        assert len(keys) == len(gone)
        for key in keys:
            del self.model[key]
        for namespace, prefix, _ in self.cursors:
            assert len(self.expect(namespace, prefix)) == len(prefix) // BLOCK

    @invariant()
    def sound(self) -> None:
        self.tree.check()
        assert sum(len(node.ids) for node in self.tree.nodes()) == len(self.model)

    def teardown(self) -> None:
        for _, _, node in self.cursors:
            self.tree.unlock(node)
        while len(self.tree.evict(3)):
            pass
        assert not self.tree.roots and not self.tree.unnamed


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_policies_are_named() -> None:
    assert sorted(POLICIES) == ["fifo", "lfu", "lru"]
