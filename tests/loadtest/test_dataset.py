from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from vlcache_dist.demo.pictures import draw
from vlcache_dist.errors import ConfigError
from vlcache_dist.loadtest import dataset
from vlcache_dist.loadtest.scenario import SCENARIOS, plan
from vlcache_dist.serve.openai import ChatCompletionBody


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_bodies_are_what_the_server_takes_and_answers_are_on_the_pictures(name: str) -> None:
    scenario = SCENARIOS[name]
    planned = plan(scenario, 0.5, 8, seed=2)
    for each, request in zip(planned, dataset.render(scenario, planned, 2), strict=True):
        chat = ChatCompletionBody.parse(request.body("tiny", "off")).to_request("id", "tiny")
        assert len(chat.conversation.media) == len(each.images)
        picture = each.images[each.turns[-1].asked]
        facts = {fact.answer for fact in draw("form", picture.seed, picture.rows, picture.columns).facts}
        assert request.expected in facts
        assert len(request.messages) == 2 * len(each.turns) - 1


def test_pictures_are_real_files_of_the_size_asked_for() -> None:
    planned = plan(SCENARIOS["document-qa"], 0.0, 2, seed=2)
    sizes = []
    for request in dataset.render(SCENARIOS["document-qa"], planned, 2):
        parts = request.messages[0]["content"]
        url = next(part for part in parts if part["type"] == "image_url")["image_url"]["url"]
        image = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
        assert image.format == "PNG"
        sizes.append(image.size)
    assert sizes == [(224, 224), (336, 336)]


def test_the_formats_of_public_generators(tmp_path: Path) -> None:
    scenario = SCENARIOS["multi-image"]
    planned = plan(scenario, 0.5, 6, seed=2)
    written = dataset.write(tmp_path, scenario, planned, 2, dataset.FORMATS)
    assert [path.name for path in written] == ["requests.jsonl", "vllm.jsonl", "aiperf.jsonl", "guidellm.jsonl"]
    ours, vllm, aiperf, guidellm = ([json.loads(line) for line in path.read_text().splitlines()] for path in written)
    assert len(ours) == len(vllm) == len(aiperf) == len(guidellm) == 6
    pictures = {picture for each in planned for picture in each.images}
    assert len(list((tmp_path / "images").glob("*.png"))) == len(pictures)
    for row, other, third in zip(vllm, aiperf, guidellm, strict=True):
        assert set(row) == {"prompt", "image_files"} and len(row["image_files"]) == 3
        assert set(other) == {"text", "images"} and other["images"] == row["image_files"]
        assert third["prompt"] == row["prompt"] and third["image"] == row["image_files"][0]
        assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in row["image_files"])
    assert ours[0]["messages"][0]["content"][2]["image_url"]["url"].startswith("file:///")


def test_an_unknown_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'csv'"):
        dataset.write(tmp_path, SCENARIOS["chat"], plan(SCENARIOS["chat"], 0, 1, 0), 0, ("csv",))


def test_pictures_drawn_ahead_in_processes_are_the_same_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = SCENARIOS["document-qa"]
    planned = plan(scenario, 0.5, 6, seed=77)
    pictures = {picture for each in planned for picture in each.images}
    alone = dataset.render(scenario, planned, 77)
    dataset._gallery.clear()
    monkeypatch.setattr(dataset, "CELLS_PER_PROCESS", 64)
    monkeypatch.setattr(dataset.os, "cpu_count", lambda: 2)
    dataset.prepare(planned)
    assert set(dataset._gallery) == pictures
    assert dataset.render(scenario, planned, 77) == alone


def test_only_so_many_pictures_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "GALLERY", 3)
    scenario = SCENARIOS["document-qa"]
    planned = plan(scenario, 0.0, 5, seed=78)
    dataset.render(scenario, planned, 78)
    assert len(dataset._gallery) == 3
