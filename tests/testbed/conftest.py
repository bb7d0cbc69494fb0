import pytest

from gambeson.testbed.recipes import networks


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory, digits):
    """Networks are trained for the tests alone, and kept between them."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr("gambeson.testbed.recipes.data_root", lambda _: folder)
        patch.setattr("gambeson.testbed.truth.data_root", lambda _: folder)
        networks.cache_clear()
        yield folder
        networks.cache_clear()
