"""Fill a page's tables from the results: ``python benchmarks/quality_tables.py docs/reuse.md``."""

from __future__ import annotations

import sys
from pathlib import Path

from vlcache_dist.evaluate.figures import read_json
from vlcache_dist.evaluate.tables import fill

if __name__ == "__main__":
    figures = read_json(Path(__file__).parent / "results" / "quality-tiny.json")
    for name in sys.argv[1:]:
        Path(name).write_text(fill(Path(name).read_text(), figures))
