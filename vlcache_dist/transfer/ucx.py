"""UCX reads its settings from the environment when an agent is made; what the user has set wins.

================== ==================================================================================================
``UCX_TLS``        Arena in CPU memory: ``sysv,posix,cma,self,tcp`` (shared memory alone fails: wire-up needs tcp), and
                   ``ib`` where the host has RDMA devices. Arena in CUDA memory: left to UCX, which takes
                   ``cuda_copy,cuda_ipc`` and RDMA where they are. ``tcp,self`` keeps two processes of one host to the
                   network, as tests of partitions need it.
``UCX_TCP_KEEP*``  Idle 1 s, interval 1 s, 2 probes: a cut link is noticed in about 3 s instead of 19. A *stopped*
                   peer is never noticed: its kernel answers.
``UCX_LOG_LEVEL``  ``error``: a peer's death is reported by exceptions, not by log lines.
================== ==================================================================================================
"""

from __future__ import annotations

import os
from pathlib import Path

CPU_TRANSPORTS = "sysv,posix,cma,self,tcp"
RDMA_DEVICES = Path("/sys/class/infiniband")


def ucx_defaults(*, cuda: bool, rdma_devices: Path = RDMA_DEVICES) -> dict[str, str]:
    """Settings for an arena in CUDA memory, or in CPU memory."""
    defaults = {"UCX_TCP_KEEPIDLE": "1s", "UCX_TCP_KEEPINTVL": "1s", "UCX_TCP_KEEPCNT": "2", "UCX_LOG_LEVEL": "error"}
    if not cuda:
        rdma = rdma_devices.is_dir() and any(rdma_devices.iterdir())
        defaults["UCX_TLS"] = CPU_TRANSPORTS + (",ib" if rdma else "")
    return defaults


def configure_ucx(*, cuda: bool) -> None:
    """Set what the user has not set. Must run before the process makes its agent."""
    for name, value in ucx_defaults(cuda=cuda).items():
        os.environ.setdefault(name, value)
