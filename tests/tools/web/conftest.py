from __future__ import annotations

import pytest
from tests.tools.web.site import Site, add_bad_pages, serving

from ossia.tools.web.parse_child import Parser


@pytest.fixture(scope="session")
def parser():
    parser = Parser(2)
    yield parser
    parser.close()


@pytest.fixture
def site():
    with serving() as site:
        yield site


@pytest.fixture(scope="session")
def bad_site() -> Site:
    with serving() as site:
        add_bad_pages(site)
        yield site
