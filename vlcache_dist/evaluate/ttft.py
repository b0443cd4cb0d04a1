"""Time to first token of the engine's own plans, as a ratio to full recompute in the same run."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import Any

from vlcache_dist.config import EngineSettings
from vlcache_dist.errors import InvalidPlan
from vlcache_dist.evaluate.cases import Case, Dialogue, Shown
from vlcache_dist.evaluate.workers import BenchSpec
from vlcache_dist.llm import LLM
from vlcache_dist.model.sampler import SamplingParams
from vlcache_dist.reuse.plan import Plan


def openai_messages(dialogue: Dialogue) -> list[dict[str, Any]]:
    """The dialogue with its pictures inline, as a client sends it."""

    def part(x: str | Shown) -> dict[str, Any]:
        if isinstance(x, str):
            return {"type": "text", "text": x}
        return {"type": "image_url", "image_url": {"url": "data:;base64," + base64.b64encode(x.data()).decode()}}

    return [{"role": role, "content": [part(x) for x in parts]} for role, parts in dialogue.turns]


def served(plans: Mapping[str, str]) -> dict[str, str]:
    """Of policies (spellings by name) those that the engine can run itself, full recompute left out: it is ``off``."""
    found = {}
    for name, spelling in plans.items():
        try:
            plan = Plan.parse(spelling)
        except InvalidPlan:
            continue
        if str(plan) != "full":
            found[name] = spelling
    return found


def time_to_first_token(
    spec: BenchSpec, cases: Sequence[Case], plans: Mapping[str, str], say: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Per plan (spellings by name) the median seconds from the call to the first token, and the median over cases of
    the ratio to ``off``. Every case's donors run first, untimed, in an emptied cache; plans take turns within a case,
    so that a busy machine slows them alike. Pictures are decoded and encoded once, before: what is compared is the
    prefill."""
    sampling = SamplingParams(max_tokens=1)
    engine = EngineSettings(store_bytes=64 << 20, kv_bytes=64 << 20)
    times: dict[str, list[float]] = {plan: [] for plan in ("off", *plans)}  # by name
    with LLM(spec.model, spec.device, spec.dtype, engine=engine) as llm:
        for number, case in enumerate(cases):
            asked = openai_messages(case.dialogue)
            llm.chat(asked, sampling, reuse="off")
            for plan, taken in times.items():
                llm.store.clear()
                llm.engine.pool.drop_contents()
                for donor in case.donors:
                    if donor is not None:
                        llm.chat(openai_messages(donor.dialogue), sampling, plan="full")
                start = perf_counter()
                if plan == "off":
                    llm.chat(asked, sampling, reuse="off")
                else:
                    llm.chat(asked, sampling, plan=plans[plan])
                taken.append(perf_counter() - start)
            say(number + 1, len(cases))
    full = times["off"]
    return [
        {
            "plan": plan,
            "cases": len(taken),
            "ttft_ms": round(1e3 * median(taken), 3),
            "ratio_to_off": round(median(t / f for t, f in zip(taken, full, strict=True)), 4),
        }
        for plan, taken in times.items()
    ]
