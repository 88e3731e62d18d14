"""One thread for these tests."""

import pytest

from tests.runs import single_thread


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield
