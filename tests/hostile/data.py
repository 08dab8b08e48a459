"""Data that a task cannot learn from: files, columns, labels and functions, as `validate` reads them."""

import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import ConfigError
from pipeline.runs.config import parse_config, read_config
from pipeline.runs.validate import read_data
from tests.hostile.case import Case

BASE = """\
name: base
model: {path: nowhere}
task: {type: classification, text: [text], label: label}
data: {source: files, train: rows.csv}
prune: {sparsity: 0.5}
"""


def read(case: Case) -> Any:
    """Read the rows that `run.yaml` and the case's overrides name, as `validate` does."""
    values, problems = read_config("run.yaml", case.overrides)
    if problems:
        raise ConfigError(problems)
    config = parse_config(values)
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path.cwd())
        patch.setattr(sys, "dont_write_bytecode", True)
        _, problems = read_data({"data": config.data, "task": config.task})
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(f"{Path.cwd()}/"):
            del sys.modules[name]
    if problems:
        raise ConfigError(problems)
    return None


Files = Mapping[str, Any]


def _rows(name: str, file: str, content: Any, line: str, *overrides: str) -> Case:
    """A case of training rows in one file."""
    where = () if file == "rows.csv" else (f"data.train={file}",)
    return Case(name=name, files={file: content}, overrides=(*where, *overrides), line=line)


def _pair(name: str, train: str, validation: str, line: str, *overrides: str) -> Case:
    """A case of training and validation rows as JSON lines."""
    files = {"train.jsonl": train, "dev.jsonl": validation}
    both = ("data.train=train.jsonl", "data.validation=dev.jsonl")
    return Case(name=name, files=files, overrides=(*both, *overrides), line=line)


def _lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _labelled(*labels: Any) -> str:
    return _lines(*({"text": "a", "label": label} for label in labels))


def _csv(*labels: Any) -> str:
    return "text,label\n" + "".join(f"a,{label}\n" for label in labels)


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _column(values: pa.Array) -> bytes:
    """A Parquet file whose labels are these."""
    return _parquet(pa.table({"text": ["a"] * len(values), "label": values}))


REGRESSION = "task={type: regression, text: [text], label: label}"
INSTRUCTION = "task={type: instruction, prompt: [question, more], response: answer}"
ANSWERS = "task={type: question-answering}"
WRITING = "task={type: text-to-text, source: text, target: label}"
LANGUAGE = "task={type: causal-lm, text: text}"


def _answer(**answers: Any) -> str:
    return _lines(*[{"question": "who", "context": "it is me", "answers": answers}] * 4)


_FILES = [
    _rows("empty-file", "rows.csv", "", ""),
    _rows("header-alone", "rows.csv", "text,label\n", ""),
    _rows("header-alone-tsv", "rows.tsv", "text\tlabel\n", ""),
    _rows("header-without-line-break", "rows.csv", "text,label", ""),
    _rows("blank-lines", "rows.csv", "\n\n\n", ""),
    _rows("no-header", "rows.csv", "a,0\nb,1\n", ""),
    _rows("column-twice", "rows.csv", "text,label,text\na,0,b\nb,1,c\n", ""),
    _rows("column-twice-tsv", "rows.tsv", "text\tlabel\tlabel\na\t0\t1\n", ""),
    _rows("column-twice-parquet", "rows.parquet", _parquet(pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], ["text", "label", "label"])), ""),
    _rows("column-twice-json", "rows.jsonl", '{"text": "a", "label": 0, "text": "b"}\n', ""),
    _rows("column-twice-in-an-array", "rows.json", '[{"text": "a", "label": 0, "text": "b"}]', ""),
    _rows("column-twice-in-a-field", "rows.json", '{"data": [{"text": "a", "label": 0, "text": "b"}]}', "", "data.options={field: data}"),
    _rows("a-field-too-many", "rows.csv", "text,label\na,b,0\nc,d,1\n", ""),
    _rows("a-field-too-many-later", "rows.csv", "text,label\na,0\nb,1\nc,d,1\n", ""),
    _rows("a-quote-that-stays-open", "rows.csv", 'text,label\n"a,0\nb,1\n', ""),
    _rows("semicolons", "rows.csv", "text;label\na;0\nb;1\n", ""),
    _rows("utf-16", "rows.csv", _csv(0, 1).encode("utf-16"), ""),
    _rows("latin-1", "rows.csv", "text,label\né,0\nb,1\n".encode("latin-1"), ""),
    _rows("null-bytes", "rows.csv", b"\0" * 100, ""),
    _rows("zip-named-csv", "rows.csv", b"PK\x03\x04" + bytes(range(256)), ""),
    _rows("html-named-jsonl", "rows.jsonl", "<html></html>\n", ""),
    _rows("json-cut-off", "rows.json", '[{"text": "a", "label": 0}, {"te', ""),
    _rows("jsonl-cut-off", "rows.jsonl", '{"text": "a", "label": 0}\n{"te', ""),
    _rows("json-of-numbers", "rows.json", "[1, 2, 3]", ""),
    _rows("json-of-nothing", "rows.json", "[]", ""),
    _rows("json-null", "rows.json", "null", ""),
    _rows("json-field-that-is-not-there", "rows.json", '{"rows": []}', "", "data.options={field: data}"),
    _rows("parquet-cut-off", "rows.parquet", _column(pa.array([0, 1]))[:-20], ""),
    _rows("parquet-without-rows", "rows.parquet", _parquet(pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())})), ""),
    _rows("text-file-without-labels", "rows.txt", "a\nb\n", ""),
    _rows("a-folder", "folder/rows.csv", _csv(0, 1), "", "data.train=folder"),
    _rows("one-row", "rows.csv", _csv(0), ""),
    Case(name="files-of-two-kinds", files={"a.csv": _csv(0, 1), "b.jsonl": _labelled(0, 1)}, overrides=("data.train=[a.csv, b.jsonl]",), line=""),
    Case(name="validation-of-a-header", files={"rows.csv": _csv(0, 1), "dev.csv": "text,label\n"}, overrides=("data.validation=dev.csv",), line=""),
    Case(name="validation-without-labels", files={"rows.csv": _csv(0, 1), "dev.csv": "text\na\n"}, overrides=("data.validation=dev.csv",), line=""),
]

_TEXT = [
    _rows("null-text", "rows.jsonl", _lines({"text": "a", "label": 0}, {"text": None, "label": 1}), ""),
    _rows("number-for-text", "rows.jsonl", _lines({"text": 7, "label": 0}, {"text": 8, "label": 1}), ""),
    _rows("list-for-text", "rows.jsonl", _lines({"text": ["a", "b"], "label": 0}, {"text": [], "label": 1}), ""),
    _rows("mapping-for-text", "rows.jsonl", _lines({"text": {"en": "a"}, "label": 0}, {"text": {"en": "b"}, "label": 1}), ""),
    _rows("boolean-for-text", "rows.jsonl", _lines({"text": True, "label": 0}, {"text": False, "label": 1}), ""),
    _rows("text-and-number", "rows.jsonl", _lines({"text": "a", "label": 0}, {"text": 3, "label": 1}), ""),
    _rows("text-and-list", "rows.jsonl", _lines({"text": "a", "label": 0}, {"text": ["b"], "label": 1}), ""),
    _rows("text-and-mapping", "rows.jsonl", _lines({"text": {"a": "x"}, "label": 0}, {"text": "b", "label": 1}), ""),
    _rows("text-missing-in-a-row", "rows.jsonl", _lines({"text": "a", "label": 0}, {"label": 1}), ""),
    _rows("text-nowhere", "rows.jsonl", _lines({"text": None, "label": 0}, {"text": None, "label": 1}), ""),
    _rows("bytes-for-text", "rows.parquet", _parquet(pa.table({"text": [b"a", b"b"], "label": [0, 1]})), ""),
    _rows("date-for-text", "rows.parquet", _parquet(pa.table({"text": pa.array([0, 1], pa.timestamp("s")), "label": [0, 1]})), ""),
    _rows("null-text-parquet", "rows.parquet", [{"text": "a", "label": 0}, {"text": "b", "label": 1}, {"text": None, "label": 1}], ""),
    _pair("null-text-in-validation", _labelled(0, 1), _lines({"text": None, "label": 1}), ""),
    _rows("number-for-a-second-text", "rows.jsonl", _lines({"text": "a", "more": 1, "label": 0}, {"text": "b", "more": 2, "label": 1}), "", "task.text=[text, more]"),
    _rows("number-for-a-prompt", "rows.jsonl", _lines({"question": "a", "more": 1, "answer": "b"}, {"question": "a", "more": 2, "answer": "b"}), "", INSTRUCTION),
    _rows("list-for-a-prompt", "rows.jsonl", _lines({"question": "a", "more": ["x"], "answer": "b"}, {"question": "a", "more": None, "answer": "b"}), "", INSTRUCTION),
    _rows("null-response", "rows.jsonl", _lines({"question": "a", "more": None, "answer": "b"}, {"question": "a", "more": "x", "answer": None}), "", INSTRUCTION),
    _rows("blank-response", "rows.csv", "question,more,answer\na,,b\na,x, \n", "", INSTRUCTION),
    _rows("null-target", "rows.jsonl", _lines({"text": "a", "label": "b"}, {"text": "b", "label": None}), "", WRITING),
    _rows("list-for-a-target", "rows.jsonl", _lines({"text": "a", "label": ["b"]}, {"text": "b", "label": ["c"]}), "", WRITING),
    _rows("messages-for-a-text", "rows.jsonl", _lines({"text": [{"role": "user", "content": "a"}]}, {"text": [{"role": "user", "content": "b"}]}), "", LANGUAGE),
]

_LABELS = [
    _pair("unseen-label", _labelled(0, 1), _labelled(0, 2), ""),
    _pair("many-unseen-labels", _labelled(0, 1), _labelled(*range(2000)), ""),
    _pair("text-against-numbers", _labelled(0, 1), _labelled("0", "1"), ""),
    _pair("numbers-against-text", _labelled("bad", "good"), _labelled(0, 1), ""),
    _pair("booleans-against-numbers", _labelled(True, False), _labelled(0, 1), ""),
    _rows("text-and-numbers", "rows.jsonl", _labelled(0, "1", 0, "1"), ""),
    _rows("a-class-alone", "rows.csv", _csv(1, 1, 1), ""),
    _rows("missing-label", "rows.csv", _csv(0, 1, ""), ""),
    _rows("missing-label-json", "rows.jsonl", _labelled(0, 1, None), ""),
    _rows("no-label-at-all", "rows.csv", _csv("", "", ""), ""),
    _rows("minus-one", "rows.csv", _csv(*[0, 1, -1] * 4), ""),
    _pair("minus-one-in-validation", _labelled(0, 1), _labelled(-1, -1), ""),
    _rows("fractions", "rows.parquet", _column(pa.array([0.5, 1.0])), ""),
    _rows("nan-label", "rows.parquet", _column(pa.array([0.0, float("nan")])), ""),
    _rows("list-of-labels", "rows.jsonl", _labelled([0], [0, 1]), ""),
    _rows("date-label", "rows.parquet", _column(pa.array([0, 1], pa.date32())), ""),
    _rows("zeros-before-a-number", "rows.csv", _csv("007", "007", "007"), ""),
    _pair("numbers-written-otherwise", _labelled("7", "8"), _labelled("07"), ""),
    _rows("nan-number", "rows.parquet", _column(pa.array([0.5, float("nan"), 1.0])), "", REGRESSION),
    _rows("nan-in-csv", "rows.csv", _csv("0.5", "nan", "1.0"), "", REGRESSION),
    _rows("infinite-number", "rows.csv", _csv("0.5", "inf", "1.0"), "", REGRESSION),
    _rows("huge-number", "rows.csv", _csv("0.5", "1e400", "1.0"), "", REGRESSION),
    _rows("text-for-a-number", "rows.csv", _csv("0.5", "good", "1.0"), "", REGRESSION),
    _rows("decimal-comma", "rows.csv", 'text,label\na,"0,5"\nb,"1,5"\n', "", REGRESSION),
    _rows("missing-number", "rows.csv", _csv("0.5", "", "1.0"), "", REGRESSION),
    _rows("boolean-for-a-number", "rows.csv", _csv(True, False, True), "", REGRESSION),
    _rows("answers-that-are-text", "rows.jsonl", _lines(*[{"question": "who", "context": "me", "answers": "me"}] * 3), "", ANSWERS),
    _rows("answer-without-a-place", "rows.jsonl", _answer(text=["me"], answer_start=[]), "", ANSWERS),
    _rows("answer-of-a-number", "rows.jsonl", _answer(text=[6], answer_start=[6]), "", ANSWERS),
    _rows("answer-no-list", "rows.jsonl", _answer(text="me", answer_start=6), "", ANSWERS),
    _rows("answer-elsewhere", "rows.jsonl", _answer(text=["me"], answer_start=[2]), "", ANSWERS),
    _rows("answer-before-the-text", "rows.jsonl", _answer(text=["me"], answer_start=[-2]), "", ANSWERS),
]


def _function(name: str, body: str, line: str, *overrides: str) -> Case:
    source = f"from datasets import Dataset, DatasetDict\n\n{body}\n"
    return Case(
        name=name,
        files={"my_rows.py": source},
        overrides=("data={source: function, function: 'my_rows:load'}", *overrides),
        line=line,
    )


_FUNCTIONS = [
    _function("function-raises", "def load():\n    raise KeyError('no such table')", ""),
    _function("function-raises-lines", "def load():\n    raise ValueError('one\\ntwo')", ""),
    _function("function-exits", "def load():\n    raise SystemExit('bye')", ""),
    _function("function-exits-well", "import sys\ndef load():\n    sys.exit()", ""),
    _function("function-never-ends", "def load():\n    return load()", ""),
    _function("module-raises", "raise RuntimeError('not here')", ""),
    _function("module-exits", "raise SystemExit(3)", ""),
    _function("module-does-not-parse", "def load(:\n    pass", ""),
    _function("module-imports-what-is-not-there", "import nowhere_at_all\ndef load(): pass", ""),
    _function("no-such-function", "def other(): pass", ""),
    _function("no-function", "load = 7", ""),
    _function("arguments-missing", "def load(path): pass", ""),
    _function("arguments-too-many", "def load(): pass", "", "data.arguments={seed: 1}"),
    _function("returns-nothing", "def load(): pass", ""),
    _function("returns-rows", "def load(): return [{'text': 'a'}]", ""),
    _function("returns-one-split", "def load(): return Dataset.from_dict({'text': ['a']})", ""),
    _function("returns-no-train", "def load(): return DatasetDict(test=Dataset.from_dict({'text': ['a']}))", ""),
    _function("returns-lists", "def load(): return DatasetDict(train=[{'text': 'a'}])", ""),
    _function("returns-a-stream", "def load(): return DatasetDict(train=Dataset.from_dict({'text': ['a']}).to_iterable_dataset())", ""),
    _function("returns-no-rows", "def load(): return DatasetDict(train=Dataset.from_dict({'text': [], 'label': []}))", ""),
    _function("returns-other-columns", "def load(): return DatasetDict(train=Dataset.from_dict({'words': ['a'] * 4}))", ""),
    _function("returns-numbers", "def load(): return DatasetDict(train=Dataset.from_dict({'text': [1] * 4, 'label': [0, 1] * 2}))", ""),
]

CASES = [*_FILES, *_TEXT, *_LABELS, *_FUNCTIONS]
