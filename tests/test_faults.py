"""The fault table of `faults.py`: a part of it in every run, all of it among the slow tests."""

import faults
import pytest


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return faults.Project(tmp_path_factory.mktemp("faults"))


def outcomes(project, every):
    """Of every n-th case, and of one of each class and verb."""
    known = list(faults.all_cases(project))
    kinds = {(case.kind, case.verb): case for case in (*reversed(known), *known[::every])}
    chosen = {id(case): case for case in (*known[::every], *kinds.values())}
    return [project.run(case) for case in chosen.values()]


def unexpected(found):
    """What did not hold."""
    return [f"{o.case.kind}: {o.case.name}: {o.fault}: {o.told[-200:]}" for o in found if o.fault]


def test_a_clean_project_gives_the_same_again_and_a_changed_result_is_noticed(project):
    again = faults.Case("none", "nothing wrong", "attribute", project.flags)
    assert not project.run(again).fault
    wrong = faults.Case(
        "none", "another picture", "attribute", project.flags | {"seed": 5}, lambda _: None
    )
    assert project.run(wrong).fault == "silent change"


def test_a_part_of_the_fault_table_holds(project):
    found = outcomes(project, every=211)
    assert len(found) >= 60 and not unexpected(found)


@pytest.mark.slow
def test_the_whole_fault_table_holds(project):
    found = outcomes(project, every=1)
    assert len(found) >= 500 and not unexpected(found)
