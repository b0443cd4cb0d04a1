"""Plans as real PNG files and chat messages, also in the formats of public load generators."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from vlcache_dist.demo import pictures
from vlcache_dist.demo.questions import WORDS
from vlcache_dist.errors import ConfigError
from vlcache_dist.leftovers import end_with_parent
from vlcache_dist.loadtest.scenario import Picture, Planned, Scenario, Turn

FORMATS = ("vlcache", "vllm", "aiperf", "guidellm")
GALLERY = 4096  #: pictures that are kept
CELLS_PER_PROCESS = 4096  #: of drawing; fewer are drawn sooner than a process starts


class Request(msgspec.Struct, frozen=True):
    """A request as it is sent. ``body`` is JSON; ``reuse`` is put in by whoever sends it."""

    index: int
    tenant: int
    messages: list[dict[str, Any]]
    expected: str
    max_tokens: int
    repeated: tuple[bool, ...]

    def body(self, model: str, reuse: str) -> bytes:
        """The body of a streaming chat completion."""
        return json.dumps(
            {
                "model": model,
                "messages": self.messages,
                "max_tokens": self.max_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
                "vlcache": {"reuse": reuse},
            }
        ).encode()


class _Drawn(NamedTuple):
    png: bytes
    facts: tuple[pictures.Fact, ...]


_gallery: dict[Picture, _Drawn] = {}  #: in the order of drawing; the oldest go first


def png(picture: Picture) -> bytes:
    """The picture as a file."""
    return _drawn(picture).png


def prepare(planned: Iterable[Planned]) -> None:
    """Draw what requests show ahead of time, in several processes if there is much of it: a large picture takes a
    good part of a second."""
    missing = [p for p in dict.fromkeys(p for each in planned for p in each.images) if p not in _gallery]
    processes = min(os.cpu_count() or 1, sum(p.rows * p.columns for p in missing) // CELLS_PER_PROCESS)
    if processes < 2:
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=end_with_parent) as pool:
        for picture, drawn in zip(missing, pool.map(_draw, missing), strict=True):
            _keep(picture, drawn)


def _drawn(picture: Picture) -> _Drawn:
    drawn = _gallery.get(picture)
    if drawn is None:
        drawn = _draw(picture)
        _keep(picture, drawn)
    return drawn


def _keep(picture: Picture, drawn: _Drawn) -> None:
    while len(_gallery) >= GALLERY:
        del _gallery[next(iter(_gallery))]
    _gallery[picture] = drawn


def _draw(picture: Picture) -> _Drawn:
    made = pictures.draw("form", picture.seed, picture.rows, picture.columns)
    return _Drawn(made.png(), made.facts)


def render(scenario: Scenario, planned: Sequence[Planned], seed: int) -> list[Request]:
    """Messages with pictures as data URLs, and the answers that are right."""

    def url(picture: Picture) -> str:
        return f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"

    return [_request(scenario, each, seed, url) for each in planned]


def write(
    folder: Path, scenario: Scenario, planned: Sequence[Planned], seed: int, formats: Sequence[str]
) -> list[Path]:
    """The data set as files: ``images/*.png``, ``requests.jsonl`` (messages with file URLs, expected answers), and

    ``vllm.jsonl``      ``vllm bench serve --dataset-name custom_image``: ``prompt`` and ``image_files``
    ``aiperf.jsonl``    ``aiperf profile --custom-dataset-type single_turn``: ``text`` and ``images``; the folder
                        ``images`` alone is an image directory in its sense
    ``guidellm.jsonl``  columns ``prompt``, ``image`` (the first picture) and ``output_tokens_count``

    The public formats know neither turns nor text between pictures: history and question become one prompt. Returns
    the files written. Raises ConfigError for an unknown format.
    """
    unknown = set(formats) - set(FORMATS)
    if unknown:
        raise ConfigError(f"format {sorted(unknown)[0]!r} is unknown; known: {', '.join(FORMATS)}")
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    paths: dict[Picture, Path] = {}
    for picture in dict.fromkeys(picture for each in planned for picture in each.images):
        paths[picture] = images / f"{picture.seed}-{picture.rows}x{picture.columns}.png"
        paths[picture].write_bytes(png(picture))
    requests = [_request(scenario, each, seed, lambda picture: paths[picture].resolve().as_uri()) for each in planned]
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in FORMATS if name in formats}
    for each, request in zip(planned, requests, strict=True):
        files = [str(paths[picture].resolve()) for picture in each.images]
        prompt = _flat(request.messages)
        shown = {
            "vlcache": msgspec.to_builtins(request),
            "vllm": {"prompt": prompt, "image_files": files},
            "aiperf": {"text": prompt, "images": files},
            "guidellm": {"prompt": prompt, "image": files[0], "output_tokens_count": request.max_tokens},
        }
        for name in rows:
            rows[name].append(shown[name])
    written = []
    for name, lines in rows.items():
        path = folder / ("requests.jsonl" if name == "vlcache" else f"{name}.jsonl")
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        written.append(path)
    return written


def _request(scenario: Scenario, planned: Planned, seed: int, url: Callable[[Picture], str]) -> Request:
    messages: list[dict[str, Any]] = []
    shown: list[Picture] = []
    truth = ""
    for number, turn in enumerate(planned.turns):
        parts: list[dict[str, Any]] = []
        if number == 0:
            parts.append(_text(_preamble(scenario, planned, seed)))
        else:
            messages.append({"role": "assistant", "content": truth})
        labelled = scenario.images > 1
        for picture in turn.images:
            shown.append(picture)
            if labelled:
                parts.append(_text(f"{'' if len(shown) == 1 else chr(10)}Picture {len(shown)}: "))
            parts.append({"type": "image_url", "image_url": {"url": url(picture)}})
        question, truth = _question(turn, shown, labelled)
        parts.append(_text(question))
        messages.append({"role": "user", "content": parts})
    return Request(planned.index, planned.tenant, messages, truth, scenario.max_tokens, planned.repeated)


def _question(turn: Turn, shown: Sequence[Picture], labelled: bool) -> tuple[str, str]:
    facts = _drawn(shown[turn.asked]).facts
    fact = facts[turn.fact % len(facts)]
    if labelled:
        return f"In picture {turn.asked + 1}, {fact.question[0].lower()}{fact.question[1:]}", fact.answer
    return fact.question, fact.answer


def _preamble(scenario: Scenario, planned: Planned, seed: int) -> str:
    """Text in front of the first picture: the tenant's usual one, or one that nobody has sent before."""
    rng = random.Random(f"preamble {seed} {planned.tenant} {planned.preamble}")
    words, text = scenario.preamble_words, "Look at the picture."
    while words > 0:
        length = min(words, rng.randint(4, 10))
        text += "".join(f" {rng.choice(WORDS)}" for _ in range(length)) + "."
        words -= length
    return text + "\n"


def _flat(messages: Sequence[dict[str, Any]]) -> str:
    texts = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts.append("".join(part["text"] for part in parts if part["type"] == "text"))
    return "\n".join(texts)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
