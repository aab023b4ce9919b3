import inspect

import pytest

from defensivekv import errors

CLASSES = [item for _, item in inspect.getmembers(errors, inspect.isclass) if item.__module__ == errors.__name__]
ERRORS = [item for item in CLASSES if not issubclass(item, Warning)]


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_is_in_the_one_tree_and_drawn_in_the_docstring(error: type[Exception]) -> None:
    assert issubclass(error, errors.DefensiveKVError)
    assert error.__name__ in (errors.__doc__ or "")


def test_every_error_but_the_base_is_also_what_python_programmers_catch() -> None:
    leaves = set(ERRORS) - {errors.DefensiveKVError}
    assert len(leaves) == 8
    assert all(issubclass(error, ValueError | RuntimeError) for error in leaves)


def test_warnings_are_no_errors() -> None:
    assert issubclass(errors.DefensiveKVWarning, UserWarning)
    assert not issubclass(errors.DefensiveKVWarning, errors.DefensiveKVError)
