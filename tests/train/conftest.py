"""openai-harmony over the same vocabulary, as the tests of our own harmony have it."""

from tests.harmony.conftest import oracle, published_vocabulary

__all__ = ["oracle", "published_vocabulary"]
