from collections.abc import Iterator

import pytest
import torch
from transport_sites import Remote, Site, make_site

from vlcache_dist.transfer.base import Transport


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_remote(site: Site) -> Remote:
    """A remote that a test may stop, but resumes."""
    remote = site.remote()
    assert remote.info
    return remote


@pytest.fixture(scope="session", params=["memory", "nixl-shm", "nixl-tcp"])
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    made = make_site(request.param)
    yield made
    made.close()


@pytest.fixture
def reader(site: Site) -> Iterator[tuple[Transport, torch.Tensor]]:
    transport, arena = site.reader()
    yield transport, arena
    transport.close()
