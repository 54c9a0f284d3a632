"""Held-out text is really held out, and there is some of every kind."""

import ast
from pathlib import Path

import pytest

import moesaic.launch.demo.corpus as corpus_module
from moesaic.launch.demo.baseline import five_gram_bits
from moesaic.launch.demo.corpus import Corpus, load_corpus

np = pytest.importorskip("numpy")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(limit_files=120)


def test_no_origin_is_on_both_sides(corpus: Corpus) -> None:
    assert not {d.origin for d in corpus.train} & {d.origin for d in corpus.held_out}
    assert len(corpus.train) + len(corpus.held_out) == len(corpus.documents)


def test_no_text_is_on_both_sides(corpus: Corpus) -> None:
    assert not {d.text for d in corpus.train if d.kind == "code"} & {d.text for d in corpus.held_out}


def test_both_sides_have_code_prose_and_chat(corpus: Corpus) -> None:
    assert {d.kind for d in corpus.train} == {d.kind for d in corpus.held_out} == {"code", "prose", "chat"}
    assert any(d.origin.startswith("topics/") for d in corpus.held_out)


def test_the_corpus_is_the_same_every_time(corpus: Corpus) -> None:
    assert load_corpus(limit_files=120).sha256 == corpus.sha256


def test_the_demo_does_not_import_the_engine() -> None:
    for path in Path(corpus_module.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moesaic"):
                assert (node.module or "").startswith("moesaic.launch.demo"), f"{path.name} imports {node.module}"


def test_the_baseline_is_a_probability_distribution() -> None:
    rng = np.random.default_rng(0)
    train = [rng.integers(1, 9, 200) for _ in range(3)]
    for context in (train[0][:4], np.array([8, 8, 8, 8]), train[1][10:13]):
        base = five_gram_bits(train, [context], 8)
        bits = [five_gram_bits(train, [np.append(context, symbol)], 8) - base for symbol in range(1, 9)]
        assert sum(2.0**-b for b in bits) == pytest.approx(1.0)
