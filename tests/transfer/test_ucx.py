import os
from pathlib import Path

import pytest

from vlcache_dist.transfer.ucx import configure_ucx, ucx_defaults


def test_transports_follow_the_hosts_abilities(tmp_path: Path) -> None:
    plain = ucx_defaults(cuda=False, rdma_devices=tmp_path / "none")
    assert plain["UCX_TLS"].split(",") == ["sysv", "posix", "cma", "self", "tcp"]
    (tmp_path / "mlx5_0").mkdir()
    assert ucx_defaults(cuda=False, rdma_devices=tmp_path)["UCX_TLS"].split(",")[-1] == "ib"
    assert "UCX_TLS" not in ucx_defaults(cuda=True, rdma_devices=tmp_path)
    assert plain["UCX_TCP_KEEPIDLE"] == "1s"


def test_what_the_user_has_set_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    monkeypatch.delenv("UCX_TCP_KEEPCNT", raising=False)
    configure_ucx(cuda=False)

    assert os.environ["UCX_TLS"] == "tcp,self"
    assert os.environ["UCX_TCP_KEEPCNT"] == "2"
