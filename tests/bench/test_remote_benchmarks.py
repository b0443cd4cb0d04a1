"""Benchmarks between Ray actors run anywhere and report what they say."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from vlcache_dist.bench.remote import hidden_share, write_picture
from vlcache_dist.cli import app

pytestmark = pytest.mark.cluster


def test_transfer_between_actors(tmp_path: Path) -> None:
    file = tmp_path / "transfer.json"
    options = ["--device", "cpu", "--shape", "tiny", "--seconds", "0", "--largest", str(1 << 20)]
    done = CliRunner().invoke(app, ["bench", "transfer", *options, "--json", str(file)])
    assert done.exit_code == 0, done.output
    report = json.loads(file.read_text())
    assert report["actors"] == "ray" and report["peer_copy_gbps"] > 0
    assert [(row["bytes"], row["descriptors"]) for row in report["rows"]] == [
        (64 << 10, 1),
        (256 << 10, 1),
        (1 << 20, 1),
        (1600 * 2 * 10 * 2 * 64 * 2, 1),
        (1600 * 2 * 10 * 2 * 64 * 2, 8),
    ]
    assert all(row["gbps"] > 0 and row["copy_gbps"] > 0 for row in report["rows"])
    assert report["image"]["bytes"] == 1600 * 2 * 10 * 2 * 64 * 2
    assert all(row["us"] > 0 for row in report["checksum"])


def test_remote_warm_ttft(tmp_path: Path) -> None:
    file, picture = tmp_path / "remote.json", tmp_path / "overlap.svg"
    options = ["--remote", "--device", "cpu", "--shape", "tiny", "--vision-tokens", "64,256", "--runs", "1"]
    done = CliRunner().invoke(app, ["bench", "ttft", *options, "--json", str(file), "--picture", str(picture)])
    assert done.exit_code == 0, done.output
    report = json.loads(file.read_text())
    assert report["link"]["read_gbps"] > 0 and report["link"]["curve"]
    assert [row["vision_tokens"] for row in report["rows"]] == [64, 256]
    for row in report["rows"]:
        assert row["local_ms"] > 0 and row["remote_ms"] > 0 and row["fetch_ms"] > 0
        assert row["kv_bytes"] == row["vision_tokens"] * 2 * 10 * 2 * 64 * 4
        assert row["same_token"] and row["trace"]["landings_ms"]
        # On a busy machine all bytes may be there before the engine looks: then nothing is left to stream.
        assert bool(row["trace"]["computed_ms"]) == row["streamed"]
        assert {"Lookup", "Acquire", "Release", "Admitted", "TokenEvent"} <= {
            step[0] for step in row["trace"]["steps_ms"]
        }
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_what_is_hidden() -> None:
    trace = {"landings_ms": [[1.0, 2.0], [1.0, 3.0], [1.0, 5.0]], "computed_ms": [[2.5, 3.5], [3.0, 4.0], [4.5, 9.0]]}
    assert hidden_share(trace) == pytest.approx((1.5 + 0.5) / 4.0)
    assert hidden_share({"landings_ms": [[1.0, 2.0]], "computed_ms": []}) is None
    assert hidden_share({"landings_ms": [[1.0, 2.0]], "computed_ms": [[3.0, 4.0]]}) == 0.0


def test_the_picture(tmp_path: Path) -> None:
    file = tmp_path / "x.svg"
    trace = {"landings_ms": [[1.0, 2.0], [1.0, 3.0]], "computed_ms": [[2.5, 3.5], [3.6, 4.0]], "token_ms": 4.5}
    write_picture(trace, file, "a title")
    text = file.read_text()
    assert text.count("<rect") == 4 and "a title" in text and "first token" in text
    ElementTree.fromstring(text)
