"""``serve --tensor-parallel 2`` on a real Ray: followers are actors beside their leader, and come and go with it."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest

from vlcache_dist.demo.pictures import draw

pytestmark = pytest.mark.cluster

PICTURE = draw("form", seed=7)


def follower_pids() -> set[int]:
    """Ray names an actor's process after it."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"FollowerActor" in path.read_bytes():
                found.add(int(path.parent.name))
    return found


def ask(url: str, text: str, question: str) -> str:
    data = f"data:image/png;base64,{base64.b64encode(PICTURE.png()).decode()}"
    content = [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "text", "text": question},
    ]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0) as client:
        reply = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=16
        )
    return reply.choices[0].message.content or ""


def test_followers_are_actors_that_answer_and_leave_nothing_behind(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("engine: {store_bytes: 33554432, kv_bytes: 67108864}\nserve: {directory_shards: 1}\n")
    command = [sys.executable, "-m", "vlcache_dist.cli", "serve", "tiny", "--port", "0", "--device", "cpu"]
    command += ["--tensor-parallel", "2", "--prefills", "1", "--decodes", "0", "--config", str(settings)]
    others = follower_pids()
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said, url = "", ""
        try:
            for line in process.stderr:
                said += line
                if found := re.search(r"is served at (http://\S+)/v1", said):
                    url = found[1]
                    break
            assert url, f"the server did not start:\n{said}"
            threading.Thread(target=process.stderr.read, daemon=True).start()
            fact, other = PICTURE.facts[:2]
            assert ask(url, "", fact.question) == fact.answer
            assert ask(url, "The river.\n", other.question) == other.answer
            (follower,) = follower_pids() - others
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
    end = time.monotonic() + 10
    while follower in follower_pids():
        assert time.monotonic() < end, "a follower is left"
        time.sleep(0.1)
