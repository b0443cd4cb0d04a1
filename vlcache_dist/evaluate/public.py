"""Public VQA data as suites: JSON Lines beside their pictures, asked in contexts that the KV was not recorded in.

A line is an object. Read are: ``question`` or ``query``; the picture as ``image``, ``imgname`` or ``image_path``
(relative to the file's folder, or to ``images/`` or ``png/`` in it); ``answers`` (list), ``answer`` or ``label``; and
``metric`` (``scoring.score``). Without the last it follows from the layout: options in ``A``, ``B``, ... are MMBench's
("choice", the answer is a letter), ``imgname`` is ChartQA's ("relaxed"), ``docId`` or ``ucsf_document_id`` DocVQA's
("anls"), ten answers TextVQA's ("vqa"), all else is "exact".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args

from vlcache_dist.errors import ConfigError
from vlcache_dist.evaluate.cases import Case, Dialogue, Donor, Metric, Shown

_UNRELATED = "Keep your answers short. This conversation is about a picture that follows; read it with care.\n"
_CHOICES = "ABCDEFGH"
_DOCUMENT = {"docId", "ucsf_document_id"}


def read_folder(folder: Path, limit: int | None = None) -> list[Case]:
    """Three formats per line: behind other text, with the question first, and as the second of two labelled pictures
    (the line before lends the first); in each the KV was recorded with the picture alone before another question.
    ``limit``: lines per file. Raises ConfigError, which names file and line."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ConfigError(f"{folder}: no *.jsonl file in it")
    cases: list[Case] = []
    for file in files:
        before: Shown | None = None
        for number, (shown, question, answers, metric) in enumerate(_lines(file)):
            if limit is not None and number >= limit:
                break
            alone = Donor(Dialogue.user(shown, "Describe the picture."), 0)
            cases += [
                Case("behind other text", Dialogue.user(_UNRELATED, shown, question), answers, (alone,), metric),
                Case("question first", Dialogue.user(question + "\n", shown), answers, (alone,), metric),
            ]
            if before is not None and before != shown:
                pair = Dialogue.user("Picture 1: ", before, "\nPicture 2: ", shown, f"About picture 2: {question}")
                donors = (Donor(Dialogue.user(before, "Describe the picture."), 0), alone)
                cases.append(Case("second of two", pair, answers, donors, metric))
            before = shown
    return sorted(cases, key=lambda case: case.format)


def _lines(file: Path) -> Iterator[tuple[Shown, str, tuple[str, ...], Metric]]:
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        where = f"{file}:{number}"
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from error
        if not isinstance(line, dict):
            raise ConfigError(f"{where}: an object is wanted")
        name = _first(line, ("image", "imgname", "image_path"), where)
        places = [file.parent / sub / str(name) for sub in ("", "images", "png")]
        path = next((p for p in places if p.is_file()), None)
        if path is None:
            raise ConfigError(f"{where}: no picture {name!r} beside the file, nor in images/ or png/")
        answers = _first(line, ("answers", "answer", "label"), where)
        listed = tuple(str(a) for a in (answers if isinstance(answers, list) else [answers]))
        question = str(_first(line, ("question", "query"), where))
        options = [letter for letter in _CHOICES if line.get(letter) is not None]
        if options:
            question += "".join(f"\n{letter}. {line[letter]}" for letter in options) + "\nAnswer with the letter."
        yield Shown(path=str(path)), question, listed, _metric(line, listed, bool(options), where)


def _metric(line: dict[str, Any], answers: tuple[str, ...], options: bool, where: str) -> Metric:
    given = line.get("metric")
    if given is not None and given not in get_args(Metric):
        raise ConfigError(f"{where}: metric {given!r}: known are {', '.join(get_args(Metric))}")
    layout = "choice" if options else "relaxed" if "imgname" in line else "anls" if _DOCUMENT & line.keys() else ""
    return cast(Metric, given or layout or ("vqa" if len(answers) == 10 else "exact"))


def _first(line: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if line.get(name) is not None:
            return line[name]
    raise ConfigError(f"{where}: none of {', '.join(names)} is there")
