"""Each sentence of SECURITY.md has a test that would fail if it were not so."""

import ast
import re

import pytest

from tests.processes import ROOT

CODE = "tests/pipeline/runs/test_foreign_code.py"
VALUES = "tests/launch/cluster/test_rendered_values.py"
RENDER = "tests/launch/cluster/test_render.py"
FILES = "tests/launch/driver/test_files.py"
SHIPPING = "tests/launch/cluster/test_shipping.py"
JOBS = "tests/launch/cluster/test_jobs.py"
HERE = "tests/test_security.py"
# By how a sentence begins: the tests of it.
TESTS = {
    "mgpp is for people who may run code": [f"{CODE}::test_with_permission_it_is_run"],
    "It does not shut in the code": [f"{CODE}::test_with_permission_it_is_run"],
    "Whoever gives a command is trusted": [
        f"{VALUES}::test_a_value_is_refused_by_name_or_stands_there_as_it_is"
    ],
    "--allow-code lets a configuration": [
        f"{CODE}::test_with_permission_it_is_run",
        f"{CODE}::test_code_that_comes_with_a_model_is_not_run_either",
    ],
    "Whoever may write to the store": [f"{HERE}::test_checksums_find_damage_and_no_forger"],
    "A configuration is not: without": [
        f"{CODE}::test_validate_runs_nothing_that_a_configuration_names",
        f"{CODE}::test_every_command_that_would_run_it_says_what_to_do",
    ],
    "A configuration cannot give": [f"{CODE}::test_a_configuration_cannot_give_the_permission"],
    "A configuration refers to its own": [
        "tests/hostile/test_foreign_files.py::test_no_error_prints_a_line_of_a_file_that_is_no_configuration",
        f"{HERE}::test_no_resolver_reads_the_environment",
    ],
    "An error about a file": [
        "tests/hostile/test_foreign_files.py::test_no_error_prints_a_line_of_a_file_that_is_no_configuration"
    ],
    "A model's files are not": [f"{HERE}::test_a_pickle_that_runs_code_is_no_model"],
    "A module of the working folder": [
        f"{FILES}::test_modules_of_the_working_folder_are_not_taken_for_ours"
    ],
    "mgpp submit refuses to ship": [
        f"{SHIPPING}::test_a_module_that_a_job_would_take_for_mgpp_s_is_refused"
    ],
    "A value that a configuration or an option": [
        f"{VALUES}::test_a_value_is_refused_by_name_or_stands_there_as_it_is",
        f"{VALUES}::test_a_path_and_overrides_reach_mgpp_as_they_are_given",
        f"{VALUES}::test_kubernetes_mounts_every_text_of_a_configuration_as_it_is",
    ],
    "Each rendered file is read back": [
        f"{VALUES}::test_a_value_that_changes_its_file_is_found_when_it_is_read_back"
    ],
    "No secret of the environment": [
        f"{FILES}::test_no_secret_of_the_environment_is_written_anywhere"
    ],
    "No rendered file has one either": [f"{RENDER}::test_no_rendered_file_holds_a_secret"],
    "A configuration that holds the hub's": [
        f"{RENDER}::test_a_configuration_with_the_token_in_it_is_refused"
    ],
    "mgpp submit gives a job no variable": [f"{HERE}::test_a_job_gets_no_secret"],
    "Files of a run can be read": [f"{FILES}::test_every_file_of_a_run_is_the_group_s_to_read"],
    "mgpp run without a cluster's": [f"{HERE}::test_a_ray_of_its_own_asks_for_a_token"],
    "mgpp validate and mgpp plan start": [f"{HERE}::test_checking_starts_no_process"],
    "A cluster that is joined runs": [
        f"{FILES}::test_a_function_of_the_working_folder_gives_rows_on_a_cluster_that_is_joined"
    ],
    "Every cluster that mgpp cluster render": [f"{RENDER}::test_every_cluster_asks_for_a_token"],
    "Its dashboard listens on loopback": [f"{RENDER}::test_the_dashboard_is_on_loopback"],
    "A command shows the token": [f"{JOBS}::test_a_cluster_that_asks_for_a_token"],
    "Neither Ray's connections nor": [
        f"{RENDER}::test_every_cluster_asks_for_a_token",
        f"{HERE}::test_collectives_take_whoever_comes",
    ],
    "Collectives ask for no token": [f"{HERE}::test_collectives_take_whoever_comes"],
    "Do not open an issue": [f"{HERE}::test_who_wants_to_open_an_issue_is_shown_the_page"],
    "Say which version": [f"{HERE}::test_who_wants_to_open_an_issue_is_shown_the_page"],
    "Fixes are made for the latest": [f"{HERE}::test_who_wants_to_open_an_issue_is_shown_the_page"],
}


def sentences() -> list[str]:
    """Return the sentences of SECURITY.md, without marks of code."""
    text = re.sub(r"^#.*$", "", (ROOT / "SECURITY.md").read_text(), flags=re.MULTILINE)
    blocks = re.split(r"\n\n|^- ", text, flags=re.MULTILINE)
    plain = [" ".join(block.replace("`", "").split()) for block in blocks]
    return [s for block in plain for s in re.split(r"(?<=\.) (?=[A-Z])", block) if s]


def test_each_sentence_has_its_tests():
    found = sentences()
    assert len(found) > 25
    for sentence in found:
        assert sum(sentence.startswith(begin) for begin in TESTS) == 1, sentence
    for begin in TESTS:
        assert any(sentence.startswith(begin) for sentence in found), begin


@pytest.mark.parametrize("test", sorted({test for tests in TESTS.values() for test in tests}))
def test_the_tests_are_there(test):
    file, name = test.split("::")
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_people_find_it():
    for page in ("README.md", "CONTRIBUTING.md"):
        assert "(SECURITY.md)" in (ROOT / page).read_text()
