"""A browser for all of the report's tests in a process."""

from collections.abc import Iterator

import pytest

from tests.report.browser import Browser, started


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with started(tmp_path_factory.mktemp("profile")) as found:
        yield found
