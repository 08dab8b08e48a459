"""Configurations that cannot be meant: no numbers, lists for sections, files without end."""

from typing import Any

from pipeline.errors import ConfigError
from pipeline.runs.config import parse_config, read_config
from tests.hostile.case import Case

BASE = """\
name: base
model: {path: nowhere}
task: {type: classification, text: [text], label: label}
data: {source: files, train: rows.csv}
prune: {sparsity: 0.5}
"""


def read(case: Case) -> Any:
    """Read and parse the configuration; `run.yaml` is BASE unless the case brings one."""
    values, problems = read_config("run.yaml", case.overrides)
    if problems:
        raise ConfigError(problems)
    return parse_config(values)


def _set(name: str, override: str, line: str) -> Case:
    return Case(name=name, overrides=(override,), line=line)


def _file(name: str, text: str | bytes, line: str) -> Case:
    return Case(name=name, files={"run.yaml": text}, line=line)


_NUMBERS = [
    _set("boolean-lr", "train.lr=true", "train.lr: input should be a valid number, got True"),
    _set(
        "boolean-lr-yaml-1.1", "train.lr=on", "train.lr: input should be a valid number, got True"
    ),
    _set(
        "boolean-batch-size",
        "train.batch_size=true",
        "train.batch_size: input should be a valid integer, got True",
    ),
    _set(
        "boolean-seed", "train.seed=false", "train.seed: input should be a valid integer, got False"
    ),
    _set("boolean-stage", "zero.stage=true", "zero.stage: must not be a boolean, got True"),
    _set("boolean-no-stage", "zero.stage=no", "zero.stage: must not be a boolean, got False"),
    _set(
        "boolean-sparsity",
        "prune.sparsity=false",
        "prune.sparsity: input should be a valid number, got False",
    ),
    _set(
        "boolean-length",
        "train.length=true",
        "train.length: not a length; allowed are steps (500), epochs ('2ep') or a share of all steps ('10%'), got True",
    ),
    _set(
        "boolean-beta",
        "train.betas=[true,0.9]",
        "train.betas.0: input should be a valid number, got True",
    ),
    _set(
        "boolean-budget",
        "prune.budgets={'*.query.*': false}",
        "prune.budgets.*.query.*: input should be a valid number, got False",
    ),
    _set(
        "boolean-interval",
        "prune.interval=yes",
        "prune.interval: input should be a valid integer, got True",
    ),
    _set(
        "boolean-spike-var",
        "prune.method={name: mgpp, spike_var: true}",
        "prune.method.spike_var: input should be a valid number, got True",
    ),
    _set(
        "boolean-replace-share",
        "task={type: masked-lm, replace_share: true}",
        "task.replace_share: input should be a valid number, got True",
    ),
    _set("boolean-name", "name=yes", "name: input should be a valid string, got True"),
    _set(
        "boolean-label", "task.label=off", "task.label: input should be a valid string, got False"
    ),
    _set("boolean-path", "data.train=no", "data.train: must be a list, got False"),
    _set(
        "boolean-path-in-list",
        "data.train=[a.csv,no]",
        "data.train.1: input should be a valid string, got False",
    ),
    _set(
        "boolean-teacher",
        "distill={teacher: true}",
        "distill.teacher: input should be a valid string, got True",
    ),
    _set(
        "quoted-lr",
        "train.lr='1e-4'",
        "train.lr: input should be a valid number, got '1e-4'; a number in quotes is text",
    ),
    _set(
        "quoted-batch-size",
        "train.batch_size='32'",
        "train.batch_size: input should be a valid integer, got '32'; a number in quotes is text",
    ),
    _set(
        "quoted-rows",
        'data.max_train_rows="100"',
        "data.max_train_rows: input should be a valid integer, got '100'; a number in quotes is text",
    ),
    _set(
        "quoted-sparsity",
        "prune.sparsity='0.9'",
        "prune.sparsity: input should be a valid number, got '0.9'; a number in quotes is text",
    ),
    _set("quoted-stage", "zero.stage='2'", "zero.stage: input should be 0, 1, 2 or 3, got '2'"),
    _set(
        "quoted-boolean",
        "dense.enabled='false'",
        "dense.enabled: input should be a valid boolean, got 'false'",
    ),
    _set(
        "quoted-beta",
        "train.betas=[0.9,'0.99']",
        "train.betas.1: input should be a valid number, got '0.99'; a number in quotes is text",
    ),
    _set(
        "quoted-damping",
        "prune.method={name: sparsegpt, damping: '0.1'}",
        "prune.method.damping: input should be a valid number, got '0.1'; a number in quotes is text",
    ),
    _set(
        "number-for-boolean",
        "dense.enabled=0",
        "dense.enabled: input should be a valid boolean, got 0",
    ),
    _set(
        "one-for-boolean",
        "model.trust_remote_code=1",
        "model.trust_remote_code: input should be a valid boolean, got 1",
    ),
    _set("number-for-text", "task.label=7", "task.label: input should be a valid string, got 7"),
    _set(
        "number-for-column", "task.text=[7]", "task.text.0: input should be a valid string, got 7"
    ),
    _set("number-for-name", "name=7", "name: input should be a valid string, got 7"),
    _set(
        "number-for-revision",
        "model.revision=1e5",
        "model.revision: input should be a valid string, got 100000.0",
    ),
    _set(
        "number-for-rename",
        "data.rename={a: 7}",
        "data.rename.a: input should be a valid string, got 7",
    ),
    _set(
        "number-key-of-rename",
        "data.rename={7: a}",
        "data.rename: a key of it: input should be a valid string, got 7",
    ),
    _set(
        "number-key-of-budgets",
        "prune.budgets={7: 0.5}",
        "prune.budgets: a key of it: input should be a valid string, got 7",
    ),
    _set(
        "number-for-address",
        "cluster.address=6379",
        "cluster.address: input should be a valid string, got 6379",
    ),
    _set(
        "full-width-batch-size",
        "train.batch_size=３２",
        "train.batch_size: input should be a valid integer, got '３２'",
    ),
    _set(
        "full-width-length",
        "train.length=３２",
        "train.length: not a length; allowed are steps (500), epochs ('2ep') or a share of all steps ('10%'), got '３２'",
    ),
    _set(
        "full-width-epochs",
        "train.length=３ep",
        "train.length: not a length; allowed are steps (500), epochs ('2ep') or a share of all steps ('10%'), got '３ep'",
    ),
    _set(
        "arabic-digits-share",
        "prune.start_after=١٠%",
        "prune.start_after: not a length; allowed are steps (500), epochs ('2ep') or a share of all steps ('10%'), got '١٠%'",
    ),
    _set(
        "full-width-pattern",
        "prune.pattern='２:４'",
        'prune.pattern: got \'２:４\'; allowed are N:M ("2:4": 2 of every 4 inputs stay) and blocks of ROWSxCOLUMNS ("32x1")',
    ),
    _set(
        "full-width-blocks",
        "prune.pattern=３２x１",
        'prune.pattern: got \'３２x１\'; allowed are N:M ("2:4": 2 of every 4 inputs stay) and blocks of ROWSxCOLUMNS ("32x1")',
    ),
    _set(
        "full-width-lr", "train.lr=１e-4", "train.lr: input should be a valid number, got '１e-4'"
    ),
    _set(
        "roman-superscript-seed",
        "train.seed=²",
        "train.seed: input should be a valid integer, got '²'",
    ),
    _set(
        "base-60-length",
        "train.length=1:30",
        "'train.length=1:30': line 1: 1:30 without quotes is a number in base 60; write text as '1:30', and a number in base 10",
    ),
    _set(
        "base-60-batch-size",
        "train.batch_size=1:30",
        "'train.batch_size=1:30': line 1: 1:30 without quotes is a number in base 60; write text as '1:30', and a number in base 10",
    ),
    _set(
        "base-60-pattern",
        "prune.pattern=2:4",
        "'prune.pattern=2:4': line 1: 2:4 without quotes is a number in base 60; write text as '2:4', and a number in base 10",
    ),
    _set(
        "base-60-negative",
        "train.seed=-1:30",
        "'train.seed=-1:30': line 1: -1:30 without quotes is a number in base 60; write text as '-1:30', and a number in base 10",
    ),
    _set(
        "base-60-float",
        "train.lr=1:30.5",
        "'train.lr=1:30.5': line 1: 1:30.5 without quotes is a number in base 60; write text as '1:30.5', and a number in base 10",
    ),
    _set(
        "base-60-deep",
        "data={source: files, train: a.csv, max_train_rows: 1:00:00}",
        "'data={source: files, train: a.csv, max_train_rows: 1:00:00}': line 1: 1:00:00 without quotes is a number in base 60; write text as '1:00:00', and a number in base 10",
    ),
    _set(
        "octal-batch-size",
        "train.batch_size=010",
        "'train.batch_size=010': line 1: 010 without quotes is a number in base 8; write text as '010', and a number in base 10",
    ),
    _set(
        "octal-seed",
        "train.seed=007",
        "'train.seed=007': line 1: 007 without quotes is a number in base 8; write text as '007', and a number in base 10",
    ),
    _set(
        "octal-label",
        "task.label=007",
        "'task.label=007': line 1: 007 without quotes is a number in base 8; write text as '007', and a number in base 10",
    ),
    _set(
        "huge-lr",
        "train.lr=1e300",
        "train.lr: must be 0 or a number that float32 holds, 1.2e-38 to 3.4e38, got 1e+300",
    ),
    _set(
        "huge-batch-size",
        "train.batch_size=1e300",
        "train.batch_size: input should be a valid integer, got 1e+300",
    ),
    _set(
        "huge-seed",
        "train.seed=100000000000000000000",
        "train.seed: input should be less than 4294967296, got 100000000000000000000",
    ),
    _set(
        "huge-length",
        "train.length=1e300",
        "train.length: not a length; allowed are steps (500), epochs ('2ep') or a share of all steps ('10%'), got 1e+300",
    ),
    _set(
        "huge-epochs",
        "train.length=99999999999999999999ep",
        "train.length: longer than 9007199254740992; allowed are steps (500), epochs ('2ep') or a share of all steps ('10%'), got '99999999999999999999ep'",
    ),
    _set(
        "huge-weight-decay",
        "train.weight_decay=1e39",
        "train.weight_decay: must be 0 or a number that float32 holds, 1.2e-38 to 3.4e38, got 1e+39",
    ),
    _set(
        "huge-rows",
        "data.max_train_rows=1e300",
        "data.max_train_rows: input should be a valid integer, got 1e+300",
    ),
    _set(
        "huge-interval",
        "prune.interval=1e300",
        "prune.interval: input should be a valid integer, got 1e+300",
    ),
    _set(
        "huge-slab",
        "prune.method={name: mgpp, slab_var: 1e300}",
        "prune.method.slab_var: must be 0 or a number that float32 holds, 1.2e-38 to 3.4e38, got 1e+300",
    ),
    _set(
        "huge-penalty",
        "prune.method={name: soft-movement, penalty: 1e200}",
        "prune.method.penalty: must be 0 or a number that float32 holds, 1.2e-38 to 3.4e38, got 1e+200",
    ),
    _set(
        "huge-temperature",
        "distill={teacher: t, temperature: 1e308}",
        "distill.temperature: must be 0 or a number that float32 holds, 1.2e-38 to 3.4e38, got 1e+308",
    ),
    _set(
        "tiny-lr",
        "train.lr=1e-300",
        "train.lr: must be 0 or a number that float32 holds, 1.2e-38 to 3.4e38, got 1e-300",
    ),
    _set(
        "tiny-eps",
        "train.eps=1e-320",
        "train.eps: must be 0 or a number that float32 holds, 1.2e-38 to 3.4e38, got 1e-320",
    ),
    _set("infinite-lr", "train.lr=.inf", "train.lr: input should be a finite number, got inf"),
    _set("overflowing-lr", "train.lr=1e400", "train.lr: input should be a finite number, got inf"),
    _set(
        "nan-sparsity",
        "prune.sparsity=.nan",
        "prune.sparsity: input should be a finite number, got nan",
    ),
    _set(
        "negative-zero-batch",
        "train.batch_size=-0",
        "train.batch_size: input should be greater than or equal to 1, got 0",
    ),
    _set(
        "fraction-batch",
        "train.batch_size=32.5",
        "train.batch_size: input should be a valid integer, got 32.5",
    ),
    _set(
        "fraction-seed", "train.seed=1e-1", "train.seed: input should be a valid integer, got 0.1"
    ),
    _set("fraction-stage", "zero.stage=2.5", "zero.stage: input should be 0, 1, 2 or 3, got 2.5"),
    _set(
        "percent-sparsity",
        "prune.sparsity=90%",
        "prune.sparsity: input should be a valid number, got '90%'; 90% is 0.9",
    ),
    _set(
        "percent-as-a-number",
        "prune.sparsity=90",
        "prune.sparsity: input should be less than 1, got 90; it is a share: 90% is 0.9",
    ),
    _set(
        "percent-of-initial-sparsity",
        "prune.initial_sparsity=30.5",
        "prune.initial_sparsity: input should be less than 1, got 30.5; it is a share: 30.5% is 0.305",
    ),
    _set(
        "percent-of-the-rate",
        "train.lr_final_factor=10",
        "train.lr_final_factor: input should be less than or equal to 1, got 10; it is a share: 10% is 0.1",
    ),
    _set(
        "percent-held-out",
        "data.validation_share=10 %",
        "data.validation_share: input should be a valid number, got '10 %'; 10 % is 0.1",
    ),
    _set(
        "far-beyond-percent",
        "prune.sparsity=900",
        "prune.sparsity: input should be less than 1, got 900",
    ),
    _set(
        "a-name-too-long",
        f"name={'a' * 101}",
        f"name: must have at most 100 characters, got '{'a' * 101}'",
    ),
    _set(
        "boolean-pattern",
        "prune.pattern=true",
        'prune.pattern: got True; allowed are N:M ("2:4": 2 of every 4 inputs stay) and blocks of '
        'ROWSxCOLUMNS ("32x1")',
    ),
    _set("comma-lr", "train.lr='1,5'", "train.lr: input should be a valid number, got '1,5'"),
    _set(
        "unit-batch",
        "train.batch_size=1k",
        "train.batch_size: input should be a valid integer, got '1k'",
    ),
    _set(
        "hexadecimal-float",
        "train.lr=0x1p-3",
        "train.lr: input should be a valid number, got '0x1p-3'",
    ),
    _set(
        "date-for-length",
        "train.length=2024-01-01",
        "train.length: not a length; allowed are steps (500), epochs ('2ep') or a share of all steps ('10%'), got '2024-01-01'",
    ),
    _set(
        "list-for-number",
        "train.lr=[1e-4]",
        "train.lr: input should be a valid number, got [0.0001]",
    ),
    _set("mapping-for-number", "train.lr={a: 1}", "train.lr: input should be a valid number"),
    _set(
        "null-for-number",
        "train.batch_size=null",
        "train.batch_size: input should be a valid integer, got None",
    ),
    _set(
        "nothing-for-number",
        "train.batch_size=",
        "train.batch_size: input should be a valid integer, got None",
    ),
    _set("nothing-for-text", "task.label=", "task.label: input should be a valid string, got None"),
]

_SECTIONS = [
    _set("list-for-model", "model=[]", "model: must be a mapping of settings, got []"),
    _set("list-for-task", "task=[]", "task: must be a mapping of settings, got []"),
    _set("list-for-data", "data=[]", "data: must be a mapping of settings, got []"),
    _set("list-for-train", "train=[]", "train: must be a mapping of settings, got []"),
    _set("list-for-prune", "prune=[0.5]", "prune: must be a mapping of settings, got [0.5]"),
    _set(
        "list-for-method",
        "prune.method=[mgpp]",
        "prune.method: must be a mapping of settings, got ['mgpp']",
    ),
    _set(
        "text-for-method",
        "prune.method=mgpp",
        "prune.method: must be a mapping of settings, got 'mgpp'",
    ),
    _set("list-for-zero", "zero=[2]", "zero: must be a mapping of settings, got [2]"),
    _set("list-for-export", "export=[]", "export: must be a mapping of settings, got []"),
    _set("list-for-evaluate", "evaluate=[]", "evaluate: must be a mapping of settings, got []"),
    _set("list-for-distill", "distill=[]", "distill: must be a mapping of settings, got []"),
    _set("list-for-cluster", "cluster=[]", "cluster: must be a mapping of settings, got []"),
    _set("text-for-cluster", "cluster=auto", "cluster: must be a mapping of settings, got 'auto'"),
    _set("null-for-data", "data=null", "data: must be a mapping of settings, got None"),
    _set(
        "list-for-overrides", "model.overrides=[a]", "model.overrides: must be a mapping, got ['a']"
    ),
    _set("list-for-options", "data.options=[]", "data.options: must be a mapping, got []"),
    _set("list-for-rename", "data.rename=[a,b]", "data.rename: must be a mapping, got ['a', 'b']"),
    _set("list-for-budgets", "prune.budgets=[0.5]", "prune.budgets: must be a mapping, got [0.5]"),
    _set("list-for-extra", "zero.extra=[]", "zero.extra: must be a mapping, got []"),
    _set("list-for-name", "name=[]", "name: input should be a valid string, got []"),
    _set(
        "list-for-tag",
        "task.type=[classification]",
        "task.type: got ['classification']; allowed are 'classification', 'regression', 'causal-lm', 'instruction', 'masked-lm', 'question-answering', 'text-to-text'",
    ),
    _set(
        "mapping-for-tag",
        "data.source={files: 1}",
        "data.source: got {'files': 1}; allowed are 'files', 'hub', 'function', 'joined'",
    ),
    _set(
        "list-for-method-name",
        "prune.method={name: [gmp]}",
        "prune.method.name: got ['gmp']; allowed are 'mgpp', 'mgpp-saliency', 'gmp', 'platon', 'movement', 'soft-movement', 'pins', 'sparse-transfer', 'wanda', 'sparsegpt'",
    ),
    _set(
        "null-method-name",
        "prune.method={name: null}",
        "prune.method.name: got None; allowed are 'mgpp', 'mgpp-saliency', 'gmp', 'platon', 'movement', 'soft-movement', 'pins', 'sparse-transfer', 'wanda', 'sparsegpt'",
    ),
    _set("no-train-files", "data.train=[]", "data.train: must have 1 or more entries, got []"),
    _set(
        "no-validation-files",
        "data.validation=[]",
        "data.validation: must have 1 or more entries, got []",
    ),
    _set(
        "no-further-files",
        "data.extra_validation={other: []}",
        "data.extra_validation.other: must have 1 or more entries, got []",
    ),
    _set("no-text-columns", "task.text=[]", "task.text: must have 1 or more entries, got []"),
    _set("mapping-for-list", "task.text={a: b}", "task.text: must be a list"),
    _set("text-for-list", "task.text=text", "task.text: must be a list, got 'text'"),
    _set("index-into-list", "task.text.0=other", "task.text: must be a list"),
    _set("mapping-for-files", "data.train={a: b}", "data.train: must be a list"),
    _set(
        "nested-list-of-files",
        "data.train=[[a.csv]]",
        "data.train.0: input should be a valid string, got ['a.csv']",
    ),
    _set(
        "null-file", "data.train=[null]", "data.train.0: input should be a valid string, got None"
    ),
    _set(
        "list-for-patterns",
        "prune.include=[[a]]",
        "prune.include.0: input should be a valid string, got ['a']",
    ),
    _set("text-for-patterns", "prune.include=a", "prune.include: must be a list, got 'a'"),
    _set(
        "null-part",
        "data={source: joined, parts: [null]}",
        "data.parts.0: must be a mapping of settings, got None",
    ),
    _set(
        "list-as-part",
        "data={source: joined, parts: [[]]}",
        "data.parts.0: must be a mapping of settings, got []",
    ),
    _set(
        "text-as-part",
        "data={source: joined, parts: [a.csv]}",
        "data.parts.0: must be a mapping of settings, got 'a.csv'",
    ),
    _set("mapping-for-parts", "data={source: joined, parts: {a: b}}", "data.parts: must be a list"),
    _set(
        "no-parts",
        "data={source: joined, parts: []}",
        "data.parts: must have 1 or more entries, got []",
    ),
    _set(
        "joined-in-joined",
        "data={source: joined, parts: [{source: joined, parts: []}]}",
        "data.parts.0.source: got 'joined'; allowed are 'files', 'hub', 'function'",
    ),
    _set(
        "set-of-no-name",
        "data.extra_validation={'': a.csv}",
        "data.extra_validation: a key of it: string should match pattern '^\\w[\\w.-]*$', got ''",
    ),
    _set(
        "set-with-a-slash",
        "data.extra_validation={a/b: a.csv}",
        "data.extra_validation: a key of it: string should match pattern '^\\w[\\w.-]*$', got 'a/b'",
    ),
    _set(
        "set-named-train",
        "data.extra_validation={train: a.csv}",
        "data.extra_validation: a key of it: 'train' is the name of a split there is already; choose another, got 'train'",
    ),
    _set(
        "three-betas",
        "train.betas=[0.9,0.9,0.9]",
        "train.betas: must have at most 2 entries, got (0.9, 0.9, 0.9)",
    ),
    _set("one-beta", "train.betas=[0.9]", "train.betas.1: missing"),
    _set(
        "function-of-no-module",
        "data={source: function, function: 'a b'}",
        "data.function: string should match pattern '^[\\w.]+:\\w+$', got 'a b'",
    ),
]

_WRITING = [
    _set(
        "override-open-list",
        "train.freeze=[",
        "'train.freeze=[': not valid YAML: while parsing a flow node expected the node content, but found '<stream end>' in \"<unicode string>\", line 1, column 2: [ ^",
    ),
    _set(
        "override-open-mapping",
        "train={",
        "'train={': not valid YAML: while parsing a flow node expected the node content, but found '<stream end>' in \"<unicode string>\", line 1, column 2: { ^",
    ),
    _set(
        "override-open-quote",
        "name='a",
        '"name=\'a": not valid YAML: while scanning a quoted scalar in "<unicode string>", line 1, column 1: \'a ^ found unexpected end of stream in "<unicode string>", line 1, column 3: \'a ^',
    ),
    _set(
        "override-open-double-quote",
        'name="a',
        '\'name="a\': not valid YAML: while scanning a quoted scalar in "<unicode string>", line 1, column 1: "a ^ found unexpected end of stream in "<unicode string>", line 1, column 3: "a ^',
    ),
    _set(
        "override-no-value",
        "train.lr",
        "'train.lr': an override is key=value, such as train.lr=1e-4",
    ),
    _set("override-no-key", "=3", "'=3': an override is key=value, such as train.lr=1e-4"),
    _set("override-empty", "", "'': an override is key=value, such as train.lr=1e-4"),
    _set("override-only-dots", "..=3", "'..=3': an override is key=value, such as train.lr=1e-4"),
    _set(
        "override-bracket-key",
        "train[lr=1",
        "'train[lr=1': an override is key=value, such as train.lr=1e-4",
    ),
    _set(
        "override-index-key",
        "task.text[0]=1",
        "'task.text[0]=1': an override is key=value, such as train.lr=1e-4",
    ),
    _set(
        "override-index-beyond",
        "task.text[9]=a",
        "'task.text[9]=a': an override is key=value, such as train.lr=1e-4",
    ),
    _set(
        "override-bare-index", "[0]=1", "'[0]=1': an override is key=value, such as train.lr=1e-4"
    ),
    _set("override-through-a-scalar", "name.inner=1", "name: input should be a valid string"),
    _set(
        "override-alias",
        "name=*a",
        "'name=*a': not valid YAML: found undefined alias 'a' in \"<unicode string>\", line 1, column 1: *a ^",
    ),
    _set(
        "override-tag",
        "name=!!python/object/apply:os.system ['true']",
        "\"name=!!python/object/apply:os.system ['true']\": line 1: the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed",
    ),
    _set(
        "override-two-documents",
        "name=a\n---\nb",
        '\'name=a\\n---\\nb\': not valid YAML: expected a single document in the stream in "<unicode string>", line 1, column 1: a ^ but found another document in "<unicode string>", line 2, column 1: --- ^',
    ),
    _set(
        "override-interpolation-nowhere",
        "name=${nowhere}",
        "run.yaml: name: Interpolation key 'nowhere' not found",
    ),
    _set(
        "override-interpolation-itself",
        "name=${name}",
        "'name=${name}': refers to a value that itself refers to one; write it out",
    ),
    _set(
        "override-interpolation-broken", "name=${", "'name=${': no viable alternative at input '${'"
    ),
    _set(
        "override-interpolation-resolver",
        "name=${no.such:1}",
        "'name=${no.such:1}': the resolver 'no.such' is not allowed; ${...} refers to other values of the configuration alone",
    ),
    _set(
        "override-environment-unset",
        "name=${oc.env:MGPP_NO_SUCH_VARIABLE}",
        "'name=${oc.env:MGPP_NO_SUCH_VARIABLE}': the resolver 'oc.env' is not allowed; ${...} refers to other values of the configuration alone",
    ),
    _set("override-mandatory", "name=???", "run.yaml: name: Missing mandatory value: name"),
    _set(
        "override-mandatory-storage",
        "storage=???",
        "run.yaml: storage: Missing mandatory value: storage",
    ),
    _set(
        "override-control-character",
        "name=a\x00b",
        "'name=a\\x00b': not valid YAML: unacceptable character #x0000: special characters are not allowed in \"<unicode string>\", position 1",
    ),
    _set(
        "override-newline-in-key",
        "tr\nain=1",
        "tr\\nain: unknown key; allowed are name, storage, model, task, data, train, dense, prune, distill, zero, evaluate, export, cluster",
    ),
    _set(
        "override-newline-in-value",
        'name="a\\nb"',
        "name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$', got 'a\\nb'",
    ),
    _set(
        "override-escape-in-value",
        'name="a\\e[31mb"',
        "name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$', got 'a\\x1b[31mb'",
    ),
    _set(
        "override-surrogate",
        'name="\\ud800"',
        '\'name="\\\\ud800"\': not valid YAML: while parsing a quoted scalar in "<unicode string>", line 1, column 1 found invalid Unicode character escape code in "<unicode string>", line 1, column 4',
    ),
    _set(
        "override-space-around-key",
        "train .lr=1",
        "train : unknown key; allowed are name, storage, model, task, data, train, dense, prune, distill, zero, evaluate, export, cluster",
    ),
    _set(
        "override-long-key",
        "k" * 5000 + "=1",
        "kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk...: unknown key; allowed are name, storage, model, task, data, train, dense, prune, distill, zero, evaluate, export, cluster",
    ),
    _set(
        "override-long-value",
        "name=" + "a b" * 5000,
        "name: must have at most 100 characters, got 'a ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ba ...",
    ),
    _set(
        "override-deep-key",
        ".".join(["a"] * 500) + "=1",
        "'a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a.a....: an override is key=value, such as train.lr=1e-4",
    ),
    _set(
        "override-deep-list",
        "name=" + "[" * 500 + "]" * 500,
        "'name=[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[...: nested more than 32 levels deep",
    ),
    _set(
        "override-very-deep-list",
        "name=" + "[" * 20000 + "]" * 20000,
        "'name=[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[...: nested more than 32 levels deep",
    ),
    _file(
        "file-open-list",
        "train: [1\n",
        "run.yaml: no configuration of mgpp: line 2, column 1: not valid YAML: while parsing a flow sequence: expected ',' or ']', but got '<stream end>'",
    ),
    _file(
        "file-twice-a-key",
        BASE + "name: other\n",
        "run.yaml: no configuration of mgpp: line 6, column 1: not valid YAML: while constructing a mapping: found duplicate key",
    ),
    _file(
        "file-twice-a-key-within",
        BASE + "train: {lr: 1.0, lr: 2.0}\n",
        "run.yaml: no configuration of mgpp: line 6, column 18: not valid YAML: while constructing a mapping: found duplicate key",
    ),
    _file(
        "file-tab",
        BASE + "train:\n\tlr: 1\n",
        "run.yaml: no configuration of mgpp: line 7, column 1: not valid YAML: while scanning for the next token: found character that cannot start any token",
    ),
    _file(
        "file-no-text",
        b"\x80\xff\x00",
        "run.yaml: no configuration of mgpp: it is no text in UTF-8, from byte 0 on",
    ),
    _file(
        "file-utf-16",
        BASE.encode("utf-16"),
        "run.yaml: no configuration of mgpp: it is no text in UTF-8, from byte 0 on",
    ),
    _file(
        "file-latin-1",
        BASE.replace("base", "b\xe4se").encode("latin-1"),
        "run.yaml: no configuration of mgpp: it is no text in UTF-8, from byte 7 on",
    ),
    _file(
        "file-null-byte",
        BASE + "train: {a: \x00}\n",
        "run.yaml: no configuration of mgpp: character 165: not valid YAML: special characters are not allowed",
    ),
    _file(
        "file-is-a-list",
        "- a\n",
        "run.yaml: no configuration of mgpp: must be a mapping of sections, got a list",
    ),
    _file(
        "file-is-a-word",
        "hello\n",
        "run.yaml: no configuration of mgpp: line 1, column 1: must be a mapping of sections, got text",
    ),
    _file(
        "file-is-a-number",
        "3\n",
        "run.yaml: no configuration of mgpp: line 1, column 1: must be a mapping of sections, got a number",
    ),
    _file(
        "file-two-documents",
        BASE + "---\n" + BASE,
        "run.yaml: no configuration of mgpp: line 6, column 1: not valid YAML: expected a single document in the stream: but found another document",
    ),
    _file(
        "file-json-cut",
        '{"name": "a',
        "run.yaml: no configuration of mgpp: line 1, column 12: not valid YAML: while scanning a quoted scalar: found unexpected end of stream",
    ),
    _file(
        "file-html",
        "<!doctype html><html></html>\n",
        "run.yaml: no configuration of mgpp: line 1, column 1: must be a mapping of sections, got text",
    ),
    _file(
        "file-python-object",
        BASE + "train: !!python/object:os.x {}\n",
        "run.yaml: no configuration of mgpp: line 6, column 8: this tag is not allowed",
    ),
    _file(
        "file-binary",
        BASE + "storage: !!binary aGVsbG8=\n",
        "run.yaml: no configuration of mgpp: line 6, column 10: this tag is not allowed",
    ),
    _file(
        "file-set",
        BASE + "train: !!set {lr}\n",
        "run.yaml: no configuration of mgpp: line 6, column 8: this tag is not allowed",
    ),
    _file(
        "file-own-tag",
        BASE + "train: !mine {lr: 1}\n",
        "run.yaml: no configuration of mgpp: line 6, column 8: this tag is not allowed",
    ),
    _file(
        "file-unknown-alias",
        BASE + "train: *other\n",
        "run.yaml: no configuration of mgpp: line 6, column 8: not valid YAML: found undefined alias",
    ),
    _file(
        "file-alias-to-itself",
        BASE + "train: &a {lr: *a}\n",
        "run.yaml: no configuration of mgpp: line 6, column 8: not valid YAML: YAML recursive aliases are not supported.",
    ),
    _file(
        "file-many-aliases",
        BASE
        + "a: &a [1,1,1,1,1,1,1,1,1]\n"
        + "".join(
            f"{n}: &{n} [{','.join(['*' + m] * 9)}]\n"
            for m, n in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "run.yaml: no configuration of mgpp: line 1, column 1: not valid YAML: its aliases stand for too many values",
    ),
    _file(
        "file-deep",
        BASE + "train: " + "{a: " * 40 + "1" + "}" * 40 + "\n",
        "run.yaml: no configuration of mgpp: nested more than 32 levels deep",
    ),
    _file(
        "file-very-deep",
        BASE + "train: " + "[" * 20000 + "]" * 20000 + "\n",
        "run.yaml: no configuration of mgpp: nested more than 32 levels deep",
    ),
    _file(
        "file-base-60",
        BASE + "train: {length: 1:30}\n",
        "run.yaml: no configuration of mgpp: line 6, column 17: without quotes this is a number in base 60; write text in quotes, and a number in base 10",
    ),
    _file(
        "file-octal",
        BASE + "train: {seed: 0777}\n",
        "run.yaml: no configuration of mgpp: line 6, column 15: without quotes this is a number in base 8; write text in quotes, and a number in base 10",
    ),
    _file(
        "file-circle",
        BASE + "storage: ${train.x}\ntrain: {x: '${storage}'}\n",
        "run.yaml: storage: refers to a value that itself refers to one; write it out",
    ),
    _file(
        "file-mandatory",
        BASE + "storage: ???\n",
        "run.yaml: storage: Missing mandatory value: storage",
    ),
    _file(
        "file-number-key",
        BASE + "7: a\n",
        "7: unknown key; allowed are name, storage, model, task, data, train, dense, prune, distill, zero, evaluate, export, cluster",
    ),
    _file(
        "file-null-key",
        BASE + "null: a\n",
        "run.yaml: no configuration of mgpp: it holds a value or a key of a kind that no setting has",
    ),
    _file(
        "file-list-key",
        BASE + "[a]: b\n",
        "run.yaml: no configuration of mgpp: line 6, column 1: not valid YAML: while constructing a mapping: found unhashable key",
    ),
    _file(
        "file-long-key",
        BASE + "k" * 1000 + ": 1\n",
        "kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk...: unknown key; allowed are name, storage, model, task, data, train, dense, prune, distill, zero, evaluate, export, cluster",
    ),
    _file(
        "file-line-break-key",
        BASE + '"a\\nb": 1\n',
        "a\\nb: unknown key; allowed are name, storage, model, task, data, train, dense, prune, distill, zero, evaluate, export, cluster",
    ),
    _file(
        "extends-a-list",
        "extends: [a.yaml]\n",
        "run.yaml: extends: must be the path of one file",
    ),
    _file("extends-a-number", "extends: 7\n", "run.yaml: extends: must be the path of one file"),
    _file(
        "extends-null",
        "extends: null\n",
        "run.yaml: extends: must be the path of one file",
    ),
    _file("extends-nothing", "extends: ''\n", "run.yaml: extends: .: no such file"),
    _file(
        "extends-itself",
        "extends: run.yaml\n",
        "run.yaml: extends: run.yaml: extends itself (run.yaml -> run.yaml)",
    ),
    _file("extends-a-folder", "extends: .\n", "run.yaml: extends: .: no such file"),
    _file(
        "extends-nowhere",
        "extends: nowhere.yaml\n",
        "run.yaml: extends: nowhere.yaml: no such file",
    ),
    _file(
        "extends-a-long-name",
        "extends: " + "a" * 5000 + "\n",
        "run.yaml: extends: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...: no such file",
    ),
    _file("extends-a-null-byte", 'extends: "a\\0b"\n', "run.yaml: extends: a\\x00b: no such file"),
    _file(
        "extends-a-url",
        "extends: https://example.org/a.yaml\n",
        "run.yaml: extends: https:/example.org/a.yaml: no such file",
    ),
    _file(
        "extends-an-interpolation",
        "extends: ${name}.yaml\nname: a\n",
        "run.yaml: extends: must be the path of one file",
    ),
    Case(
        name="extends-no-yaml",
        files={"run.yaml": "extends: a.yaml\n", "a.yaml": "[1"},
        line="a.yaml: no configuration of mgpp: line 1, column 3: not valid YAML: while parsing a flow sequence: expected ',' or ']', but got '<stream end>'",
    ),
    Case(
        name="extends-a-word",
        files={"run.yaml": "extends: a.yaml\n", "a.yaml": "word"},
        line="a.yaml: no configuration of mgpp: line 1, column 1: must be a mapping of sections, got text",
    ),
    Case(
        name="extends-a-circle",
        files={"run.yaml": "extends: a.yaml\n", "a.yaml": "extends: run.yaml\n"},
        line="a.yaml: extends: run.yaml: extends itself (run.yaml -> a.yaml -> run.yaml)",
    ),
    Case(
        name="extends-a-long-chain",
        files={"run.yaml": "extends: 0.yaml\n"}
        | {f"{i}.yaml": f"extends: {i + 1}.yaml\n" for i in range(400)},
        line="30.yaml: extends: 31.yaml: more than 32 files extend each other",
    ),
]

CASES = [*_NUMBERS, *_SECTIONS, *_WRITING]
