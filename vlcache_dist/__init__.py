"""vlcache_dist: vision-language serving in which an image is paid for once.

``LLM`` and ``SamplingParams`` are the library; they are imported when first used, so that the command line and the
workers do not pay for each other's dependencies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlcache_dist.llm import LLM
    from vlcache_dist.types import SamplingParams

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from vlcache_dist.llm import LLM

        return LLM
    if name == "SamplingParams":
        from vlcache_dist.types import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'vlcache_dist' has no attribute {name!r}")
