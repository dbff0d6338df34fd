"""The breaks that `make mutants` makes are breaks, and enough of them."""

import ast

from tests.mutants import PACKAGE, ROOT, TESTS, mutants_of
from tests.survivors import SURVIVORS

MUTANTS = [mutant for file in TESTS for mutant in mutants_of(file)]


def test_every_file_is_broken_in_many_ways() -> None:
    for file in TESTS:
        original = ast.unparse(ast.parse((PACKAGE / file).read_text()))
        sources = [mutant.source for mutant in MUTANTS if mutant.file == file]
        assert len(sources) >= 60
        assert original not in sources


def test_breaks_have_names_of_their_own() -> None:
    keys = [mutant.key for mutant in MUTANTS]
    assert len(keys) == len(set(keys))


def test_explained_survivors_exist() -> None:
    """An explanation must not outlive the code that it is about."""
    assert SURVIVORS.keys() <= {mutant.key for mutant in MUTANTS}
    assert len(SURVIVORS) <= 0.05 * len(MUTANTS)
    assert all(SURVIVORS.values())


def test_tests_that_are_run_on_a_break_exist() -> None:
    for names in TESTS.values():
        for name in names:
            path = f"{name}.py" if "/" in name else f"test_{name}.py"
            assert (ROOT / "tests" / path).is_file()
