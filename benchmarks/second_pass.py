"""The engine itself under a watched plan, on the evaluation's formats: what is released, rechecked, computed in full.

    python benchmarks/second_pass.py --cases 4 --json benchmarks/results/second-pass-tiny.json
    python benchmarks/second_pass.py --cases 16 --engine-only --changed-roles --seed 22 \
        --json benchmarks/results/escalation-third-tiny.json
    python benchmarks/second_pass.py --cases 16 --engine-only --changed-roles --seed 22 \
        --plan 'none+canary:0,3,9<0.19,again:4@8<0.005,left:6<0.33' \
        --json benchmarks/results/escalation-second-tiny.json

Every case: empty caches, the donors' prompts, the question under the plan, and once with nothing reused. KL is a lower
bound over 20 alternatives (``reuse.drift``). ``computed_share``: vision token-layers that the engine computed for the
answer, passes that were thrown away included, of those of the full run (mean over cases). ``same_verdict`` and
``same_answer`` count the cases in which the evaluation's dense engine (``evaluate.run``) comes to the same.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from vlcache_dist import LLM, SamplingParams
from vlcache_dist.config import EngineSettings
from vlcache_dist.evaluate.cases import Case, by_format
from vlcache_dist.evaluate.generated import generate
from vlcache_dist.evaluate.policies import parse_policy
from vlcache_dist.evaluate.report import HARMFUL_KL
from vlcache_dist.evaluate.run import under
from vlcache_dist.evaluate.scoring import is_right
from vlcache_dist.evaluate.trial import Trial
from vlcache_dist.evaluate.ttft import openai_messages
from vlcache_dist.evaluate.workbench import Workbench
from vlcache_dist.llm import Output
from vlcache_dist.reuse.drift import first_token_drift
from vlcache_dist.reuse.guarded import spelled_out

CHANGED_ROLES = (
    "alone, then one of three",
    "unlabelled, another order",
    "sliding window",
    "same picture twice",
    "second picture in a later turn",
    "question first, pictures swapped",
    "color across two pictures",
    "recorded with rows from the bottom",
)


def dense(bench: Workbench, case: Case, plan: str) -> tuple[str, bool, bool]:
    """The dense engine's answer, and whether it was rechecked, and whether everything was computed."""
    done = under(Trial(bench, [case]), parse_policy(plan))
    verdict = done.settled
    said = bench.text(done.answers.token_ids[0])
    return said, verdict is not None and bool(verdict.rechecked[0]), verdict is not None and bool(verdict.escalated[0])


def counted(llm: LLM, prompt: list[dict[str, Any]], sampling: SamplingParams, **options: Any) -> tuple[Output, int]:
    """The answer, and the vision token-layers that it took."""
    before = llm.engine.stats().vision_layer_rows
    answer = llm.chat(prompt, sampling, **options)
    return answer, llm.engine.stats().vision_layer_rows - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="held-out")
    parser.add_argument("--cases", type=int, default=16, help="per format")
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--plan", default="guarded")
    parser.add_argument(
        "--changed-roles", action="store_true", help="only the formats in which a picture's role changes"
    )
    parser.add_argument(
        "--engine-only", action="store_true", help="without the dense engine, which makes one more pass"
    )
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    llm = LLM("tiny", "cpu", "float32", engine=EngineSettings(store_bytes=64 << 20, kv_bytes=32 << 20))
    bench = Workbench("tiny", device="cpu", dtype="float32")
    plan = spelled_out(options.plan, llm.layout.num_layers)
    sampling, short = SamplingParams(max_tokens=12, logprobs=20), SamplingParams(max_tokens=1)
    rows = []
    for name, cases in by_format(generate(options.suite, options.cases, options.seed)).items():
        if options.changed_roles and name not in CHANGED_ROLES:
            continue
        counts: Counter[str] = Counter()
        final = computed = 0.0
        for case in cases:
            llm.store.clear()
            llm.engine.pool.drop_contents()
            for donor in dict.fromkeys(d for d in case.donors if d is not None):
                llm.chat(openai_messages(donor.dialogue), short, plan="full")
            llm.engine.pool.drop_contents()
            prompt = openai_messages(case.dialogue)
            answer, spent = counted(llm, prompt, sampling, plan=plan)
            full, whole = counted(llm, prompt, sampling, reuse="off")
            computed += spent / whole
            assert answer.logprobs is not None and full.logprobs is not None
            kl, agrees = first_token_drift(full.logprobs[0], answer.logprobs[0])
            right = is_right(answer.text, case.answers, case.metric)
            full_right = is_right(full.text, case.answers, case.metric)
            watched = [r for r in answer.vlcache if r.deviation is not None]
            counts["right"] += right
            counts["full_right"] += full_right
            counts["agrees"] += agrees
            counts["harmful"] += kl > HARMFUL_KL or (full_right and not right)
            counts["alarmed"] += any(r.deviation > 1 for r in watched if r.deviation is not None)
            counts["rechecked"] += any(r.why == "rechecked" for r in watched)
            counts["escalated"] += any(r.escalated for r in watched)
            if not options.engine_only:
                said, rechecked, escalated = dense(bench, case, plan)
                counts["same_answer"] += said == answer.text.strip()
                counts["same_verdict"] += rechecked == any(r.why == "rechecked" for r in watched) and (
                    escalated == any(r.escalated for r in watched)
                )
            final += sum(r.recomputed_layer_tokens for r in watched) / max(
                sum(r.vision_tokens for r in watched) * llm.layout.num_layers, 1
            )
        rows.append(
            {
                "format": name,
                "cases": len(cases),
                **counts,
                "final_pass_share": round(final / len(cases), 4),
                "computed_share": round(computed / len(cases), 4),
            }
        )
        print(rows[-1], flush=True)
        options.json.write_text(
            json.dumps(
                {"suite": options.suite, "seed": options.seed, "plan": plan, "rows": rows}
                | {"machine": f"{platform.machine()} CPU, fp32, torch {torch.__version__}"},
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
