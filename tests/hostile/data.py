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
    config = parse_config(values, allow_code=True)
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
    _rows(
        "empty-file",
        "rows.csv",
        "",
        "data.train: rows.csv cannot be read: EmptyDataError: No columns to parse from file",
    ),
    _rows("header-alone", "rows.csv", "text,label\n", "data.train: rows.csv holds no rows"),
    _rows("header-alone-tsv", "rows.tsv", "text\tlabel\n", "data.train: rows.tsv holds no rows"),
    _rows(
        "header-without-line-break", "rows.csv", "text,label", "data.train: rows.csv holds no rows"
    ),
    _rows(
        "blank-lines",
        "rows.csv",
        "\n\n\n",
        "data.train: rows.csv cannot be read: EmptyDataError: No columns to parse from file",
    ),
    _rows(
        "no-header",
        "rows.csv",
        "a,0\nb,1\n",
        "task.text: column 'text' is not in the train data; there are: ['0', 'a']",
        LANGUAGE,
    ),
    _rows(
        "column-twice",
        "rows.csv",
        "text,label,text\na,0,b\nb,1,c\n",
        "data.train: rows.csv has two columns named 'text'",
    ),
    _rows(
        "column-twice-tsv",
        "rows.tsv",
        "text\tlabel\tlabel\na\t0\t1\n",
        "data.train: rows.tsv has two columns named 'label'",
    ),
    _rows(
        "column-twice-parquet",
        "rows.parquet",
        _parquet(
            pa.Table.from_arrays(
                [pa.array(["a"]), pa.array([1]), pa.array([2])], ["text", "label", "label"]
            )
        ),
        "data.train: rows.parquet has two columns named 'label'",
    ),
    _rows(
        "column-twice-json",
        "rows.jsonl",
        '{"text": "a", "label": 0, "text": "b"}\n',
        "data.train: rows.jsonl has two columns named 'text'",
    ),
    _rows(
        "column-twice-in-an-array",
        "rows.json",
        '[{"text": "a", "label": 0, "text": "b"}]',
        "data.train: rows.json has two columns named 'text'",
    ),
    _rows(
        "column-twice-in-a-field",
        "rows.json",
        '{"data": [{"text": "a", "label": 0, "text": "b"}]}',
        "data.train: rows.json has two columns named 'text'",
        "data.options={field: data}",
    ),
    _rows(
        "a-field-too-many",
        "rows.csv",
        "text,label\na,b,0\nc,d,1\n",
        "data.train: rows.csv cannot be read: ParserError: Error tokenizing data. C error: Expected 2 fields in line 2, saw 3",
    ),
    _rows(
        "a-field-too-many-later",
        "rows.csv",
        "text,label\na,0\nb,1\nc,d,1\n",
        "data.train: rows.csv cannot be read: ParserError: Error tokenizing data. C error: Expected 2 fields in line 4, saw 3",
    ),
    _rows(
        "a-quote-that-stays-open",
        "rows.csv",
        'text,label\n"a,0\nb,1\n',
        "data.train: rows.csv cannot be read: ParserError: Error tokenizing data. C error: EOF inside string starting at row 1",
    ),
    _rows(
        "semicolons",
        "rows.csv",
        "text;label\na;0\nb;1\n",
        "task.text: column 'text' is not in the train data; there are: ['text;label']",
        LANGUAGE,
    ),
    _rows(
        "utf-16",
        "rows.csv",
        _csv(0, 1).encode("utf-16"),
        "data.train: rows.csv cannot be read: UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    ),
    _rows(
        "latin-1",
        "rows.csv",
        "text,label\né,0\nb,1\n".encode("latin-1"),
        "data.train: rows.csv cannot be read: UnicodeDecodeError: 'utf-8' codec can't decode byte 0xe9 in position 0: unexpected end of data",
    ),
    _rows(
        "null-bytes",
        "rows.csv",
        b"\0" * 100,
        "data.train: rows.csv cannot be read: DatasetGenerationCastError: An error occurred while generating the dataset All the data files must have the same columns, but at some point there are 1 new columns ({'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x...",
    ),
    _rows(
        "zip-named-csv",
        "rows.csv",
        b"PK\x03\x04" + bytes(range(256)),
        "data.train: rows.csv cannot be read: BadZipFile: File is not a zip file",
    ),
    _rows(
        "html-named-jsonl",
        "rows.jsonl",
        "<html></html>\n",
        "data.train: rows.jsonl begins with '<html></html>\\n'; JSON rows are objects",
    ),
    _rows(
        "json-cut-off",
        "rows.json",
        '[{"text": "a", "label": 0}, {"te',
        "data.train: rows.json cannot be read: ValueError: Unmatched ''\"' when when decoding 'string' at position 29",
    ),
    _rows(
        "jsonl-cut-off",
        "rows.jsonl",
        '{"text": "a", "label": 0}\n{"te',
        "data.train: rows.jsonl cannot be read: ArrowInvalid: JSON parse error: Missing a closing quotation mark in string. in row 1",
    ),
    _rows(
        "json-of-numbers",
        "rows.json",
        "[1, 2, 3]",
        "task.label: column 'label' is not in the train data; there are: ['text']",
    ),
    _rows("json-of-nothing", "rows.json", "[]", "data.train: rows.json holds no rows"),
    _rows(
        "json-null",
        "rows.json",
        "null",
        "data.train: rows.json begins with 'null'; JSON rows are objects",
    ),
    _rows(
        "json-field-that-is-not-there",
        "rows.json",
        '{"rows": []}',
        "data.train: rows.json cannot be read: KeyError: 'data'",
        "data.options={field: data}",
    ),
    _rows(
        "parquet-cut-off",
        "rows.parquet",
        _column(pa.array([0, 1]))[:-20],
        "data.train: rows.parquet cannot be read: ArrowInvalid: Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file.",
    ),
    _rows(
        "parquet-without-rows",
        "rows.parquet",
        _parquet(pa.table({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())})),
        "data.train: rows.parquet holds no rows",
    ),
    _rows(
        "text-file-without-labels",
        "rows.txt",
        "a\nb\n",
        "task.label: column 'label' is not in the train data; there are: ['text']",
    ),
    _rows(
        "a-folder",
        "folder/rows.csv",
        _csv(0, 1),
        "data.train: folder is not a file",
        "data.train=folder",
    ),
    _rows(
        "one-row",
        "rows.csv",
        _csv(0),
        "data.validation_share: 0.1 of 1 training rows leaves none to train or to validate on; give more rows or a validation split",
    ),
    Case(
        name="files-of-two-kinds",
        files={"a.csv": _csv(0, 1), "b.jsonl": _labelled(0, 1)},
        overrides=("data.train=[a.csv, b.jsonl]",),
        line="data.train: files of one split must end alike, got a.csv, b.jsonl",
    ),
    Case(
        name="validation-of-a-header",
        files={"rows.csv": _csv(0, 1), "dev.csv": "text,label\n"},
        overrides=("data.validation=dev.csv",),
        line="data.validation: dev.csv holds no rows",
    ),
    Case(
        name="validation-without-labels",
        files={"rows.csv": _csv(0, 1), "dev.csv": "text\na\n"},
        overrides=("data.validation=dev.csv",),
        line="task.label: column 'label' is not in the validation data; there are: ['text']",
    ),
]

_TEXT = [
    _rows(
        "null-text",
        "rows.jsonl",
        _lines({"text": "a", "label": 0}, {"text": None, "label": 1}),
        "task.text.0: row 2 of the train data holds no text in column 'text', got None; leave out the rows without one",
    ),
    _rows(
        "number-for-text",
        "rows.jsonl",
        _lines({"text": 7, "label": 0}, {"text": 8, "label": 1}),
        "task.text.0: row 1 of the train data holds no text in column 'text', got 7",
    ),
    _rows(
        "list-for-text",
        "rows.jsonl",
        _lines({"text": ["a", "b"], "label": 0}, {"text": [], "label": 1}),
        "task.text.0: row 1 of the train data holds no text in column 'text', got ['a', 'b']",
    ),
    _rows(
        "mapping-for-text",
        "rows.jsonl",
        _lines({"text": {"en": "a"}, "label": 0}, {"text": {"en": "b"}, "label": 1}),
        "task.text.0: row 1 of the train data holds no text in column 'text', got {'en': 'a'}",
    ),
    _rows(
        "boolean-for-text",
        "rows.jsonl",
        _lines({"text": True, "label": 0}, {"text": False, "label": 1}),
        "task.text.0: row 1 of the train data holds no text in column 'text', got True",
    ),
    _rows(
        "text-and-number",
        "rows.jsonl",
        _lines({"text": "a", "label": 0}, {"text": 3, "label": 1}),
        "task.text.0: row 2 of the train data holds no text in column 'text', got 3",
    ),
    _rows(
        "text-and-list",
        "rows.jsonl",
        _lines({"text": "a", "label": 0}, {"text": ["b"], "label": 1}),
        "task.text.0: row 2 of the train data holds no text in column 'text', got ['b']",
    ),
    _rows(
        "text-and-mapping",
        "rows.jsonl",
        _lines({"text": {"a": "x"}, "label": 0}, {"text": "b", "label": 1}),
        "task.text.0: row 1 of the train data holds no text in column 'text', got {'a': 'x'}",
    ),
    _rows(
        "text-missing-in-a-row",
        "rows.jsonl",
        _lines({"text": "a", "label": 0}, {"label": 1}),
        "task.text.0: row 2 of the train data holds no text in column 'text', got None; leave out the rows without one",
    ),
    _rows(
        "text-nowhere",
        "rows.jsonl",
        _lines({"text": None, "label": 0}, {"text": None, "label": 1}),
        "task.text.0: row 1 of the train data holds no text in column 'text', got None; leave out the rows without one",
    ),
    _rows(
        "bytes-for-text",
        "rows.parquet",
        _parquet(pa.table({"text": [b"a", b"b"], "label": [0, 1]})),
        "task.text.0: row 1 of the train data holds no text in column 'text', got b'a'",
    ),
    _rows(
        "date-for-text",
        "rows.parquet",
        _parquet(pa.table({"text": pa.array([0, 1], pa.timestamp("s")), "label": [0, 1]})),
        "task.text.0: row 1 of the train data holds no text in column 'text', got datetime.datetime(1970, 1, 1, 0, 0)",
    ),
    _rows(
        "null-text-parquet",
        "rows.parquet",
        [{"text": "a", "label": 0}, {"text": "b", "label": 1}, {"text": None, "label": 1}],
        "task.text.0: row 3 of the train data holds no text in column 'text', got None; leave out the rows without one",
    ),
    _pair(
        "null-text-in-validation",
        _labelled(0, 1),
        _lines({"text": None, "label": 1}),
        "task.text.0: row 1 of the validation data holds no text in column 'text', got None; leave out the rows without one",
    ),
    _rows(
        "number-for-a-second-text",
        "rows.jsonl",
        _lines({"text": "a", "more": 1, "label": 0}, {"text": "b", "more": 2, "label": 1}),
        "task.text.1: row 1 of the train data holds no text in column 'more', got 1",
        "task.text=[text, more]",
    ),
    _rows(
        "number-for-a-prompt",
        "rows.jsonl",
        _lines(
            {"question": "a", "more": 1, "answer": "b"}, {"question": "a", "more": 2, "answer": "b"}
        ),
        "task.prompt.1: row 1 of the train data holds no text in column 'more', got 1",
        INSTRUCTION,
    ),
    _rows(
        "list-for-a-prompt",
        "rows.jsonl",
        _lines(
            {"question": "a", "more": ["x"], "answer": "b"},
            {"question": "a", "more": None, "answer": "b"},
        ),
        "task.prompt.1: row 1 of the train data holds no text in column 'more', got ['x']",
        INSTRUCTION,
    ),
    _rows(
        "null-response",
        "rows.jsonl",
        _lines(
            {"question": "a", "more": None, "answer": "b"},
            {"question": "a", "more": "x", "answer": None},
        ),
        "task.response: row 2 of the train data holds no text in column 'answer', got None; leave out the rows without one",
        INSTRUCTION,
    ),
    _rows(
        "blank-response",
        "rows.csv",
        "question,more,answer\na,,b\na,x, \n",
        "task.response: 1 rows of the train data have no text in column 'answer'; leave them out",
        INSTRUCTION,
    ),
    _rows(
        "null-target",
        "rows.jsonl",
        _lines({"text": "a", "label": "b"}, {"text": "b", "label": None}),
        "task.target: row 2 of the train data holds no text in column 'label', got None; leave out the rows without one",
        WRITING,
    ),
    _rows(
        "empty-target",
        "rows.csv",
        "text,label\na,b\nc,\nd, \n",
        "task.target: 1 rows of the train data have no text in column 'label'; leave them out",
        WRITING,
    ),
    _rows(
        "list-for-a-target",
        "rows.jsonl",
        _lines({"text": "a", "label": ["b"]}, {"text": "b", "label": ["c"]}),
        "task.target: row 1 of the train data holds no text in column 'label', got ['b']",
        WRITING,
    ),
    _rows(
        "messages-for-a-text",
        "rows.jsonl",
        _lines(
            {"text": [{"role": "user", "content": "a"}]},
            {"text": [{"role": "user", "content": "b"}]},
        ),
        "task.text: row 1 of the train data holds no text in column 'text', got [{'role': 'user', 'content': 'a'}]",
        LANGUAGE,
    ),
]

_LABELS = [
    _pair(
        "unseen-label",
        _labelled(0, 1),
        _labelled(0, 2),
        "task.label: column 'label' needs at least two labels, all in training; unseen in training: [2]",
    ),
    _pair(
        "many-unseen-labels",
        _labelled(0, 1),
        _labelled(*range(2000)),
        "task.label: column 'label' needs at least two labels, all in training; unseen in training: [2, 3, 4, 5, 6] and 1993 more",
    ),
    _pair(
        "text-against-numbers",
        _labelled(0, 1),
        _labelled("0", "1"),
        "task.label: column 'label' holds whole numbers in the train data and text in the validation data",
    ),
    _pair(
        "numbers-against-text",
        _labelled("bad", "good"),
        _labelled(0, 1),
        "task.label: column 'label' holds text in the train data and whole numbers in the validation data",
    ),
    _pair(
        "booleans-against-numbers",
        _labelled(True, False),
        _labelled(0, 1),
        "task.label: column 'label' holds booleans in the train data and whole numbers in the validation data",
    ),
    _rows(
        "text-and-numbers",
        "rows.jsonl",
        _labelled(0, "1", 0, "1"),
        "task.label: column 'label' of train holds values of several types; classification needs whole numbers or text",
    ),
    _rows(
        "a-class-alone",
        "rows.csv",
        _csv(1, 1, 1),
        "task.label: column 'label' needs at least two labels, all in training; only ['1']",
    ),
    _rows(
        "missing-label",
        "rows.csv",
        _csv(0, 1, ""),
        "task.label: 1 rows of the validation data have no value in column 'label'",
    ),
    _rows(
        "missing-label-json",
        "rows.jsonl",
        _labelled(0, 1, None),
        "task.label: 1 rows of the validation data have no value in column 'label'",
    ),
    _rows(
        "no-label-at-all",
        "rows.csv",
        _csv("", "", ""),
        "task.label: 2 rows of the train data have no value in column 'label'",
    ),
    _rows(
        "minus-one",
        "rows.csv",
        _csv(*[0, 1, -1] * 4),
        "task.label: column 'label' of the train data has -1, which marks rows without a label; leave these rows out, or give the class another number",
    ),
    _pair(
        "minus-one-in-validation",
        _labelled(0, 1),
        _labelled(-1, -1),
        "task.label: column 'label' of the validation data has -1, which marks rows without a label; leave these rows out, or give the class another number",
    ),
    _rows(
        "fractions",
        "rows.parquet",
        _column(pa.array([0.5, 1.0])),
        "task.label: column 'label' of train holds Value('float64'); classification needs whole numbers or text",
    ),
    _rows(
        "nan-label",
        "rows.parquet",
        _column(pa.array([0.0, float("nan")])),
        "task.label: column 'label' of train holds Value('float64'); classification needs whole numbers or text",
    ),
    _rows(
        "list-of-labels",
        "rows.jsonl",
        _labelled([0], [0, 1]),
        "task.label: column 'label' of train holds List(Value('int64')); classification needs whole numbers or text",
    ),
    _rows(
        "date-label",
        "rows.parquet",
        _column(pa.array([0, 1], pa.date32())),
        "task.label: column 'label' of train holds Value('date32'); classification needs whole numbers or text",
    ),
    _rows(
        "zeros-before-a-number",
        "rows.csv",
        _csv("007", "007", "007"),
        "task.label: column 'label' needs at least two labels, all in training; only ['007']",
    ),
    _pair(
        "numbers-written-otherwise",
        _labelled("7", "8"),
        _labelled("07"),
        "task.label: column 'label' needs at least two labels, all in training; unseen in training: ['07']",
    ),
    _rows(
        "nan-number",
        "rows.parquet",
        _column(pa.array([0.5, float("nan"), 1.0])),
        "task.label: column 'label' of train holds numbers that are not finite, got nan",
        REGRESSION,
    ),
    _rows(
        "nan-in-csv",
        "rows.csv",
        _csv("0.5", "nan", "1.0"),
        "task.label: column 'label' of train holds Value('large_string'); regression needs numbers",
        REGRESSION,
    ),
    _rows(
        "infinite-number",
        "rows.csv",
        _csv("0.5", "inf", "1.0"),
        "task.label: column 'label' of train holds numbers that are not finite, got inf",
        REGRESSION,
    ),
    _rows(
        "huge-number",
        "rows.csv",
        _csv("0.5", "1e400", "1.0"),
        "task.label: column 'label' of train holds numbers that are not finite, got inf",
        REGRESSION,
    ),
    _rows(
        "text-for-a-number",
        "rows.csv",
        _csv("0.5", "good", "1.0"),
        "task.label: column 'label' of train holds Value('large_string'); regression needs numbers",
        REGRESSION,
    ),
    _rows(
        "decimal-comma",
        "rows.csv",
        'text,label\na,"0,5"\nb,"1,5"\n',
        "task.label: column 'label' of train holds Value('large_string'); regression needs numbers",
        REGRESSION,
    ),
    _rows(
        "missing-number",
        "rows.csv",
        _csv("0.5", "", "1.0"),
        "task.label: 1 rows of the train data have no value in column 'label'",
        REGRESSION,
    ),
    _rows(
        "boolean-for-a-number",
        "rows.csv",
        _csv(True, False, True),
        "task.label: column 'label' of train holds Value('bool'); regression needs numbers",
        REGRESSION,
    ),
    _rows(
        "answers-that-are-text",
        "rows.jsonl",
        _lines(*[{"question": "who", "context": "me", "answers": "me"}] * 3),
        "task.answers: column 'answers' of train holds Value('string'); question answering needs {\"text\": [...], \"answer_start\": [...]}",
        ANSWERS,
    ),
    _rows(
        "answer-without-a-place",
        "rows.jsonl",
        _answer(text=["me"], answer_start=[]),
        "task.answers: 3 rows of the train data have answers without a text or an answer_start of their own in column 'answers'",
        ANSWERS,
    ),
    _rows(
        "answer-of-a-number",
        "rows.jsonl",
        _answer(text=[6], answer_start=[6]),
        "task.answers: column 'answers' of train holds {'text': List(Value('int64')), 'answer_start': List(Value('int64'))}; question answering needs {\"text\": [...], \"answer_start\": [...]}",
        ANSWERS,
    ),
    _rows(
        "answer-no-list",
        "rows.jsonl",
        _answer(text="me", answer_start=6),
        "task.answers: column 'answers' of train holds {'text': Value('string'), 'answer_start': Value('int64')}; question answering needs {\"text\": [...], \"answer_start\": [...]}",
        ANSWERS,
    ),
    _rows(
        "answer-elsewhere",
        "rows.jsonl",
        _answer(text=["me"], answer_start=[2]),
        "task.answers: 3 rows of the train data have an answer that is not at its answer_start in column 'answers'",
        ANSWERS,
    ),
    _rows(
        "answer-before-the-text",
        "rows.jsonl",
        _answer(text=["me"], answer_start=[-2]),
        "task.answers: 3 rows of the train data have answers without a text or an answer_start of their own in column 'answers'",
        ANSWERS,
    ),
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
    _function(
        "function-raises",
        "def load():\n    raise KeyError('no such table')",
        "data.function: my_rows:load raised KeyError: 'no such table'",
    ),
    _function(
        "function-raises-lines",
        "def load():\n    raise ValueError('one\\ntwo')",
        "data.function: my_rows:load raised ValueError: one two",
    ),
    _function(
        "function-exits",
        "def load():\n    raise SystemExit('bye')",
        "data.function: my_rows:load raised SystemExit: bye",
    ),
    _function(
        "function-exits-well",
        "import sys\ndef load():\n    sys.exit()",
        "data.function: my_rows:load raised SystemExit",
    ),
    _function(
        "function-never-ends",
        "def load():\n    return load()",
        "data.function: my_rows:load raised RecursionError: maximum recursion depth exceeded",
    ),
    _function(
        "module-raises",
        "raise RuntimeError('not here')",
        "data.function: my_rows:load cannot be imported: RuntimeError: not here",
    ),
    _function(
        "module-exits",
        "raise SystemExit(3)",
        "data.function: my_rows:load cannot be imported: SystemExit: 3",
    ),
    _function(
        "module-does-not-parse",
        "def load(:\n    pass",
        "data.function: my_rows:load cannot be imported: SyntaxError: invalid syntax (my_rows.py, line 3)",
    ),
    _function(
        "module-imports-what-is-not-there",
        "import nowhere_at_all\ndef load(): pass",
        "data.function: my_rows:load cannot be imported: ModuleNotFoundError: No module named 'nowhere_at_all'",
    ),
    _function(
        "no-such-function",
        "def other(): pass",
        "data.function: my_rows:load cannot be imported: AttributeError: module 'my_rows' has no attribute 'load'",
    ),
    _function("no-function", "load = 7", "data.function: my_rows:load is no function but 7"),
    _function(
        "arguments-missing",
        "def load(path): pass",
        "data.arguments: my_rows:load(path) does not take them: missing a required argument: 'path'",
    ),
    _function(
        "arguments-too-many",
        "def load(): pass",
        "data.arguments: my_rows:load() does not take them: got an unexpected keyword argument 'seed'",
        "data.arguments={seed: 1}",
    ),
    _function(
        "returns-nothing",
        "def load(): pass",
        "data.function: my_rows:load must return a DatasetDict with a 'train' split, got 'NoneType'",
    ),
    _function(
        "returns-rows",
        "def load(): return [{'text': 'a'}]",
        "data.function: my_rows:load must return a DatasetDict with a 'train' split, got 'list'",
    ),
    _function(
        "returns-one-split",
        "def load(): return Dataset.from_dict({'text': ['a']})",
        "data.function: my_rows:load must return a DatasetDict with a 'train' split, got 'Dataset'",
    ),
    _function(
        "returns-no-train",
        "def load(): return DatasetDict(test=Dataset.from_dict({'text': ['a']}))",
        "data.function: my_rows:load must return a DatasetDict with a 'train' split, got \"DatasetDict of ['test']\"",
    ),
    _function(
        "returns-lists",
        "def load(): return DatasetDict(train=[{'text': 'a'}])",
        "data.function: my_rows:load must return splits of datasets.Dataset, got 'train: list'",
    ),
    _function(
        "returns-a-stream",
        "def load(): return DatasetDict(train=Dataset.from_dict({'text': ['a']}).to_iterable_dataset())",
        "data.function: my_rows:load must return splits of datasets.Dataset, got 'train: IterableDataset'",
    ),
    _function(
        "returns-no-rows",
        "def load(): return DatasetDict(train=Dataset.from_dict({'text': [], 'label': []}))",
        "data: the train data has no rows",
    ),
    _function(
        "returns-other-columns",
        "def load(): return DatasetDict(train=Dataset.from_dict({'words': ['a'] * 4}))",
        "task.text: column 'text' is not in the train data; there are: ['words']",
        LANGUAGE,
    ),
    _function(
        "returns-numbers",
        "def load(): return DatasetDict(train=Dataset.from_dict({'text': [1] * 4, 'label': [0, 1] * 2}))",
        "task.text.0: row 1 of the train data holds no text in column 'text', got 1",
    ),
]

CASES = [*_FILES, *_TEXT, *_LABELS, *_FUNCTIONS]
