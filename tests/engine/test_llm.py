"""The library on the bundled model: real pictures, right answers, whatever was in front of the picture before."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlcache_dist import LLM, SamplingParams
from vlcache_dist.config import EngineSettings
from vlcache_dist.demo.pictures import Picture, draw
from vlcache_dist.errors import BadRequest, InvalidMedia, InvalidPlan, PromptTooLong, StoreFull
from vlcache_dist.llm import Output
from vlcache_dist.model.weights import resolve
from vlcache_dist.types import FinishReason, KVSource

SHORT = SamplingParams(max_tokens=12)
PROSE = "The train left the station at noon and nobody on the platform looked up from the morning paper. " * 3


@pytest.fixture(scope="module")
def shared() -> LLM:
    torch.set_num_threads(1)
    return LLM(model="tiny", device="cpu", dtype="float32")


@pytest.fixture
def llm(shared: LLM) -> LLM:
    """The same weights with empty caches."""
    shared.store.clear()
    shared.engine.pool.drop_contents()
    return shared


@pytest.fixture(autouse=True)
def _nothing_left(request: pytest.FixtureRequest) -> Any:
    yield
    if "shared" in request.fixturenames:
        llm = request.getfixturevalue("shared")
        llm.engine.validate()
        stats, store = llm.engine.stats(), llm.store.stats()
        assert stats.blocks_free == stats.blocks_total
        assert (stats.running, stats.waiting, store.pinned, store.filling) == (0, 0, 0, 0)


def image(picture: Picture | Image.Image) -> dict[str, Any]:
    if isinstance(picture, Picture):
        data = picture.png()
    else:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        data = buffer.getvalue()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def user(*parts: str | Picture) -> list[dict[str, Any]]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else image(part) for part in parts]
    return [{"role": "user", "content": content}]


def report(output: Output) -> tuple[KVSource, int, int]:
    (span,) = output.vlcache
    return span.source, span.reused_tokens, span.recomputed_tokens


@pytest.mark.parametrize("kind", ["form", "table", "shapes"])
@pytest.mark.parametrize("plan", ["none", "uniform:5"])
def test_right_cold_and_warm_in_other_contexts(llm: LLM, kind: Any, plan: str) -> None:
    picture = draw(kind, 11)
    first, second = picture.facts[:2]
    cold = llm.chat(user(picture, first.question), SHORT, plan=plan)
    assert cold.text == first.answer
    assert report(cold) == (KVSource.COMPUTED, 0, 0)
    assert cold.finish_reason is FinishReason.STOP
    recomputed = 4 if plan == "uniform:5" else 0
    for parts in ((PROSE, picture, second.question), ("The code word is apple. ", picture, second.question)):
        warm = llm.chat(user(*parts), SHORT, plan=plan)
        assert warm.text == second.answer
        assert report(warm) == (KVSource.LOCAL, 64 - recomputed, recomputed)
        assert llm.chat(user(*parts), SHORT, reuse="off").text == second.answer


def test_logprobs_and_provenance(llm: LLM) -> None:
    picture = draw("form", 3)
    question = picture.facts[0].question
    sampling = SamplingParams(max_tokens=8, logprobs=20)
    off = llm.chat(user(picture, question), sampling, reuse="off")
    cold = llm.chat(user(picture, question), sampling)
    full = llm.chat(user(PROSE, picture, question), sampling, plan="full")
    full_off = llm.chat(user(PROSE, picture, question), sampling, reuse="off")
    assert len(off.vlcache[0].digest) == 64
    assert cold.vlcache[0].digest == off.vlcache[0].digest
    for a, b in ((off, cold), (full, full_off)):
        assert a.token_ids == b.token_ids
        assert a.logprobs is not None
        assert b.logprobs is not None
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            assert x.token_id == y.token_id
            assert x.logprob == pytest.approx(y.logprob, abs=1e-4)
            assert len(x.top) == 20
            assert x.top[0][1] == pytest.approx(y.top[0][1], abs=1e-4)
    assert llm.chat(user(picture, question), SHORT).logprobs is None
    assert report(full) == (KVSource.COMPUTED, 0, 0)


def test_a_list_is_one_batch(llm: LLM) -> None:
    pictures = [draw("form", seed) for seed in (5, 6)]
    facts = [picture.facts[0] for picture in pictures]
    conversations = [user(pictures[i % 2], facts[i % 2].question) for i in range(6)]
    outputs = llm.chat(conversations, SHORT)
    assert isinstance(outputs, list)
    assert [output.text for output in outputs] == [facts[i % 2].answer for i in range(6)]
    sources = [report(output)[0] for output in outputs]
    assert sources == [KVSource.COMPUTED] * 2 + [KVSource.LOCAL] * 4


def test_several_pictures_and_a_picture_twice(llm: LLM) -> None:
    a, b, c = draw("form", 21), draw("form", 22), draw("form", 23)
    fact = b.facts[0]
    slots = ("Picture 1: ", "\nPicture 2: ", "\nPicture 3: ", f"\nIn picture 2, {_lower(fact.question)}")
    first = llm.chat(user(slots[0], a, slots[1], b, slots[2], c, slots[3]), SHORT)
    assert first.text == fact.answer
    assert [span.source for span in first.vlcache] == [KVSource.COMPUTED] * 3
    again = llm.chat(user(slots[0], c, slots[1], b, slots[2], a, slots[3]), SHORT, plan="full")
    assert again.text == fact.answer
    twice = llm.chat(user(a, "and once more: ", a, a.facts[0].question), SHORT, plan="none")
    assert [span.reused_tokens for span in twice.vlcache] == [64, 64]


def _lower(question: str) -> str:
    return question[0].lower() + question[1:]


def test_the_next_turn_computes_only_new_tokens(llm: LLM) -> None:
    picture = draw("form", 31)
    messages = user(picture, picture.facts[0].question)
    first = llm.chat(messages, SHORT)
    messages = [
        *messages,
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": picture.facts[1].question},
    ]
    second = llm.chat(messages, SHORT)
    assert second.vlcache[0].source is KVSource.PREFIX
    assert second.cached_tokens > first.prompt_tokens - 16
    assert second.text == llm.chat(messages, SHORT, reuse="off").text


def test_a_video(llm: LLM) -> None:
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 255, (112, 112, 3), dtype=np.uint8)) for _ in range(4)]
    urls = [image(frame)["image_url"]["url"] for frame in frames]
    part = {"type": "video_url", "video_url": {"url": urls, "fps": 2.0}}
    ask = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
    moved = [{"role": "user", "content": [{"type": "text", "text": PROSE}, part, {"type": "text", "text": "What?"}]}]
    cold = llm.chat(ask, SHORT)
    warm = llm.chat(moved, SHORT, plan="uniform:10")
    assert cold.vlcache[0].vision_tokens == 32
    assert report(cold) == (KVSource.COMPUTED, 0, 0)
    assert report(warm) == (KVSource.LOCAL, 28, 4)
    full, off = llm.chat(moved, SHORT, plan="full"), llm.chat(moved, SHORT, reuse="off")
    assert full.token_ids == off.token_ids


def test_text_alone_and_stop_strings(llm: LLM) -> None:
    free = llm.chat([{"role": "user", "content": "hello"}], SamplingParams(max_tokens=24, ignore_eos=True, logprobs=0))
    assert free.finish_reason is FinishReason.LENGTH
    assert len(free.token_ids) == 24
    picture = draw("shapes", 2)
    fact = next(fact for fact in picture.facts if " " in fact.answer)
    for stop in (fact.answer[3:6], " ", fact.answer):
        stopped = llm.chat(user(picture, fact.question), SamplingParams(max_tokens=24, ignore_eos=True, stop=(stop,)))
        assert stopped.finish_reason is FinishReason.STOP
        assert stopped.text == fact.answer[: fact.answer.index(stop)]


def test_seeds_repeat(llm: LLM) -> None:
    ask = [{"role": "user", "content": "hello"}]
    params = SamplingParams(max_tokens=12, temperature=1.5, ignore_eos=True, seed=7)
    first = llm.chat(ask, params)
    assert llm.chat([ask, ask], params)[1].token_ids == first.token_ids
    other = SamplingParams(max_tokens=12, temperature=1.5, ignore_eos=True, seed=8)
    assert llm.chat(ask, other).token_ids != first.token_ids


def test_what_cannot_be_answered_is_refused(llm: LLM) -> None:
    picture = draw("form", 1)
    ask = user(picture, "hi")
    with pytest.raises(BadRequest, match="reuse 'yes'"):
        llm.chat(ask, SHORT, reuse="yes")
    with pytest.raises(BadRequest, match="only approx"):
        llm.chat(ask, SHORT, reuse="exact", plan="uniform:7")
    with pytest.raises(InvalidPlan):
        llm.chat(ask, SHORT, plan="uniform:200")
    with pytest.raises(InvalidPlan, match="layers"):
        llm.chat(ask, SHORT, plan="counts:4,3")
    with pytest.raises(PromptTooLong):
        llm.chat(ask, SamplingParams(max_tokens=100_000))
    with pytest.raises(InvalidMedia):
        llm.chat(
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]
        )
    with pytest.raises(BadRequest):
        llm.chat([])
    assert llm.chat(user(picture, picture.facts[0].question), SHORT).text == picture.facts[0].answer


def test_file_urls_and_plan_files(llm: LLM, tmp_path: Path) -> None:
    picture = draw("table", 2)
    path = tmp_path / "table.png"
    path.write_bytes(picture.png())
    plan = tmp_path / "plan.json"
    counts = [8, 8, 4, 4, 2, 2, 1, 1, 0, 0]
    plan.write_text(
        f'{{"format": 1, "model": "{llm.layout.model}", "num_layers": 10, "counts": {counts}}}', encoding="utf-8"
    )
    part = {"type": "image_url", "image_url": {"url": path.as_uri()}}
    for text in ("", PROSE):
        content = [{"type": "text", "text": text}, part, {"type": "text", "text": picture.facts[0].question}]
        output = llm.chat([{"role": "user", "content": content}], SHORT, plan=f"file:{plan}")
        assert output.text == picture.facts[0].answer
    assert report(output) == (KVSource.LOCAL, 56, 8)
    assert output.vlcache[0].recomputed_layer_tokens == sum(counts)


def test_a_small_store_makes_requests_wait_and_evict() -> None:
    """Room for the KV and encoder output of about two pictures; five come at once, twice."""
    llm = LLM("tiny", device="cpu", dtype="float32", engine=EngineSettings(store_bytes=1_600_000, kv_bytes=24 << 20))
    pictures = [draw("form", seed) for seed in range(40, 45)]
    for plan in ("uniform:5", "none"):
        outputs = llm.chat([user(p, p.facts[0].question) for p in pictures], SHORT, plan=plan)
        assert [o.text for o in outputs] == [p.facts[0].answer for p in pictures]
        llm.engine.validate()
        assert llm.store.stats().pinned == 0
    assert llm.store.stats().num_evictions > 0
    tiny_store = LLM("tiny", device="cpu", dtype="float32", engine=EngineSettings(store_bytes=50_000, kv_bytes=9 << 20))
    with pytest.raises(StoreFull):
        tiny_store.chat(user(pictures[0], "hi"), SHORT)
    assert tiny_store.chat([{"role": "user", "content": "hello"}], SHORT).finish_reason
    tiny_store.engine.validate()


def test_bfloat16_answers_too() -> None:
    llm = LLM("tiny", device="cpu", dtype="bfloat16")
    picture = draw("form", 11)
    for parts in ((picture,), (PROSE, picture)):
        assert llm.chat(user(*parts, picture.facts[0].question), SHORT).text == picture.facts[0].answer


def test_neither_ray_nor_zeromq_nor_nixl_is_imported() -> None:
    code = (
        "import sys; import vlcache_dist.llm; print([m for m in ('ray', 'zmq', 'nixl', 'fastapi') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("reuse", ["off", "exact", "approx"])
def test_cold_answers_are_those_of_transformers(llm: LLM, reuse: str) -> None:
    oracle = Qwen2_5_VLForConditionalGeneration.from_pretrained(resolve("tiny"), dtype=torch.float32).eval()
    processor = Qwen2VLImageProcessorPil.from_pretrained(resolve("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny"))
    pictures = [draw("form", 3), draw("shapes", 4, 8, 12)]
    question = "Which number is beside the first label?"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": question}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    pixels = processor(images=[picture.image for picture in pictures], return_tensors="pt")
    for grid in pixels["image_grid_thw"]:
        text = text.replace("<|image_pad|>", "<pad>" * (int(grid.prod()) // 4), 1)
    ids = tokenizer(text.replace("<pad>", "<|image_pad|>"), return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        out = oracle.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels["pixel_values"],
            image_grid_thw=pixels["image_grid_thw"],
            mm_token_type_ids=(ids == llm.config.image_token_id).int(),
            max_new_tokens=16,
            min_new_tokens=16,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    sampling = SamplingParams(max_tokens=16, ignore_eos=True, logprobs=5)
    answer = llm.chat(user(*pictures, question), sampling, reuse=reuse)
    assert answer.prompt_tokens == ids.shape[1]
    assert answer.logprobs is not None
    # The oracle may not stop before 16 tokens and therefore never draws the end token: compare up to it.
    for token, got, logits in zip(out.sequences[0, ids.shape[1] :].tolist(), answer.logprobs, out.logits, strict=True):
        expected = logits[0].log_softmax(-1)
        best = dict(got.top)
        torch.testing.assert_close(torch.tensor(list(best.values())), expected[list(best)], atol=1e-4, rtol=1e-4)
        if got.token_id != token:
            assert got.token_id in llm.config.eos_token_ids
            break
