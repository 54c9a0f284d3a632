"""The training text: this Python's standard library, as documents of three kinds, split once and for all.

- code: the sources themselves;
- prose: documentation without code around it, that is the language reference topics behind `help("for")` and, per
  module, the doc strings of its modules, classes and functions;
- chat: questions about public functions and classes, answered with their doc string or their source.

A document is held out if the hash of its origin says so. The origin of everything made from a file is the file, and
of a topic the topic, so that no text of a held-out file is trained on in another form. Files that other tables were
generated into, machine-dependent files and exact copies are dropped.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Kind = Literal["code", "prose", "chat"]

HELD_OUT_PERCENT = 5
HELD_OUT_TOPICS_PERCENT = 10
"""Topics are few and long: a larger share makes sure that the held-out prose has some."""
TEST_PERCENT = 40
"""Share of the `test` package that is used: more would make the model write mostly unit tests."""
MAX_CHAT_CHARS = 1600
MAX_FILE_BYTES = 300_000

SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data", "__phello__", "cjkencodings", "data"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "stringprep", "badsyntax", "bad_")

USER, ASSISTANT = "<|user|>", "<|assistant|>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One training or held-out text. `origin` is a path below the standard library, or `topics/<name>`."""

    origin: str
    kind: Kind
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """All documents, in a fixed order: topics by name, then files by path. `sha256` covers kinds, origins and texts."""

    documents: list[Document]
    sha256: str

    @property
    def train(self) -> list[Document]:
        """What the model learns from."""
        return [d for d in self.documents if not is_held_out(d.origin)]

    @property
    def held_out(self) -> list[Document]:
        """What it is measured on."""
        return [d for d in self.documents if is_held_out(d.origin)]


def percentile(name: str, salt: str) -> int:
    """A stable pseudo-random number in [0, 100) for a name."""
    return int(hashlib.sha256(f"{salt}:{name}".encode()).hexdigest()[:8], 16) % 100


def is_held_out(origin: str) -> bool:
    """Whether everything made from this file or topic is kept away from training."""
    limit = HELD_OUT_TOPICS_PERCENT if origin.startswith("topics/") else HELD_OUT_PERCENT
    return percentile(origin, "held-out") < limit


def load_corpus(limit_files: int | None = None) -> Corpus:
    """Reads the standard library of the running Python. `limit_files` keeps the first files only (for tests)."""
    documents = [Document(origin=f"topics/{name}", kind="prose", text=text) for name, text in read_topics().items()]
    for origin, source in itertools.islice(read_sources(), limit_files):
        documents.append(Document(origin=origin, kind="code", text=source))
        documents.extend(documents_from_syntax(origin, source))
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.kind}\0{document.origin}\0{document.text}\0".encode())
    return Corpus(documents=documents, sha256=digest.hexdigest())


def read_sources() -> Iterator[tuple[str, str]]:
    """(path below the standard library, text) of every file that is used, sorted by path, exact copies dropped."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or path.name.startswith(SKIPPED_PREFIXES):
            continue
        origin = relative.as_posix()
        if "test" in relative.parts[0] and percentile(origin, "test") >= TEST_PERCENT:
            continue
        text = read_text(path)
        if text is not None and text not in seen:
            seen.add(text)
            yield origin, text


def read_text(path: Path) -> str | None:
    """The file's text, or None if it is not UTF-8, nearly empty, too large, or a table rather than a program."""
    raw = path.read_bytes()
    if not 200 <= len(raw) <= MAX_FILE_BYTES:
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    digits_and_escapes = sum(text.count(c) for c in "0123456789\\")
    longest = max(len(line) for line in text.splitlines())
    return None if digits_and_escapes > 0.12 * len(text) or longest > 500 else text.replace("\r\n", "\n")


def read_topics() -> dict[str, str]:
    """The language reference behind `help()`: topic name -> reStructuredText rendered as plain text."""
    spec = importlib.util.find_spec("pydoc_data.topics")
    assert spec is not None and spec.origin is not None, "every CPython ships pydoc_data"
    module = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    assignment = next(node for node in module.body if isinstance(node, ast.Assign))
    topics: dict[str, str] = ast.literal_eval(assignment.value)
    return {name: topics[name].strip() + "\n" for name in sorted(topics)}


def documents_from_syntax(origin: str, source: str) -> Iterator[Document]:
    """The prose and chat documents of one source file; none if the running Python can't parse it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    module = origin.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    sections = list(doc_sections(tree, module))
    if sum(len(text) for _, text in sections) >= 400:
        text = "\n\n".join(f"{name}\n\n{text}" for name, text in sections) + "\n"
        yield Document(origin=origin, kind="prose", text=text)
    if module.split(".")[0] not in {"test", "lib2to3", "distutils", "idlelib"}:
        for text in chats(tree, module, source):
            yield Document(origin=origin, kind="chat", text=text)


def doc_sections(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """(dotted name, cleaned doc string) of a module and everything in it, in source order."""
    documented = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, (ast.Module, *documented)) and (text := ast.get_docstring(node)):
            yield name, text
        for child in ast.iter_child_nodes(node):
            yield from visit(child, f"{name}.{child.name}" if isinstance(child, documented) else name)

    return visit(tree, module)


def chats(tree: ast.Module, module: str, source: str) -> Iterator[str]:
    """Conversations about the public functions and classes at a module's top level."""
    lines = source.splitlines(keepends=True)
    if text := ast.get_docstring(tree):
        yield from chat(f"What is the module {module} for?", text.split("\n\n")[0])
    for node in tree.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
            continue
        name = f"{module}.{node.name}"
        text = ast.get_docstring(node)
        if text:
            yield from chat(f"What does {name} do?", "\n\n".join(text.split("\n\n")[:2]))
        code = "".join(lines[node.lineno - 1 : node.end_lineno])
        yield from chat(f"Show the source of {name}.", code)


def chat(question: str, answer: str) -> Iterator[str]:
    """One conversation in the chat template's form (without begin and end of text), if it has a fair length."""
    answer = answer.strip()
    if 30 <= len(answer) <= MAX_CHAT_CHARS:
        yield f"{USER}{question}{ASSISTANT}{answer}"
