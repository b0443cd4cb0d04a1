"""Everything that is measured on a machine with GPUs, most valuable first (``benchmarks/all.py``).

Names of reports are those that docs/performance.md and docs/kernels.md give. On a CPU the same commands are rehearsed
with the tiny shape, but for those that compile for a GPU or need a package of one.
"""

from __future__ import annotations

from vlcache_dist.bench.campaign import JSON, Part

CLI = ("-m", "vlcache_dist.cli", "bench")
TO_JSON = ("--json", JSON)


def parts(shape: str, gpu: str, gpus: int) -> list[Part]:
    """``gpu``: the short name of the machine's GPUs in file names, such as h200. What needs two comes first where there
    are two, since it cannot run elsewhere."""
    one = _one_gpu(shape, gpu)
    return [*_two_gpus(shape, gpu), *one] if gpus > 1 else [*one, *_two_gpus(shape, gpu)]


def _one_gpu(shape: str, gpu: str) -> list[Part]:
    vllm = ("benchmarks/vllm_ttft.py", "--shape", shape, "--runs", "10", *TO_JSON)
    growth = ("benchmarks/growth.py", *TO_JSON, "--shape")
    return [
        Part("tune", f"tune-{gpu}.json", ("benchmarks/tune.py", "--adopt", *TO_JSON), 60, 300),
        Part("ttft", f"ttft-{shape}-{gpu}.json", ("benchmarks/ttft.py", "--shape", shape, *TO_JSON), 90, 300),
        Part("kernels", f"kernels-{gpu}.json", ("benchmarks/kernels.py", *TO_JSON), 60, 240),
        Part("stalls", f"stalls-{shape}-{gpu}.json", ("benchmarks/stalls.py", "--shape", shape, *TO_JSON), 60, 180),
        Part("gpu-tests", f"gpu-tests-{gpu}.json", ("-m", "vlcache_dist.bench.gpu_tests", *TO_JSON), 60, 420),
        Part(
            "sanitizer", f"sanitizer-{gpu}.json",
            ("-m", "vlcache_dist.bench.gpu_tests", "--sanitize", "--tests", "tests/kernels/test_write_kernels.py",
             "tests/kernels/test_swiglu.py", "tests/kernels/test_pointwise.py", "tests/kernels/test_gemv.py", *TO_JSON),
            90, 300, programs=("compute-sanitizer",),
        ),
        Part("vllm-compiled", f"vllm-{shape}-{gpu}-compiled.json", (*vllm, "--graph"), 120, 420, modules=("vllm",)),
        Part("growth-32b", f"growth-32b-{gpu}.json", (*growth, "32b"), 150, 420),
        Part(
            "end-to-end",
            f"end-to-end-{shape}-{gpu}.json",
            ("benchmarks/end_to_end.py", "--shape", shape, "--folder", "{scratch}/random", *TO_JSON),
            120,
            420,
        ),
        Part("vllm", f"vllm-{shape}-{gpu}.json", vllm, 120, 300, modules=("vllm",)),
        Part("growth", f"growth-{shape}-{gpu}.json", (*growth, shape), 90, 300),
        Part("growth-3b", f"growth-3b-{gpu}.json", (*growth, "3b"), 60, 240),
        Part(
            "stalls-cold-start",
            f"stalls-{shape}-{gpu}-cold-start.json",
            ("benchmarks/stalls.py", "--shape", shape, "--cold-start", "--requests", "60", *TO_JSON),
            60,
            180,
        ),
    ]  # fmt: skip


def _two_gpus(shape: str, gpu: str) -> list[Part]:
    sharded = ("benchmarks/tensor_parallel.py", "--graphs", *TO_JSON, "--shape")
    remote = (*CLI, "ttft", "--remote", "--shape", shape, "--vision-tokens", "1024,1600,4096,16384", "--runs", "15")
    return [
        Part("tensor-parallel", f"tensor-parallel-{shape}-{gpu}.json", (*sharded, shape), 90, 300, 2),
        Part(
            "ttft-remote",
            f"ttft-remote-{shape}-{gpu}.json",
            (*remote, "--picture", "{dir}/remote-prefill-16384.svg", *TO_JSON),
            60,
            240,
            2,
        ),
        Part(
            "tensor-parallel-32b",
            f"tensor-parallel-32b-{gpu}.json",
            (*sharded, "32b", "--ranks", "2"),
            120,
            400,
            2,
        ),
        Part(
            "http-ttft",
            f"http-ttft-{shape}-2x{gpu}.json",
            ("benchmarks/http_ttft.py", "--shape", shape, "--checkpoint", "{scratch}/served", *TO_JSON),
            150,
            420,
            2,
        ),
        Part(
            "transfer", f"transfer-{shape}-{gpu}.json",
            (*CLI, "transfer", "--device", "cuda", "--shape", shape, *TO_JSON), 60, 180, 2,
        ),
        Part(
            "serving", f"serving-{shape}-2x{gpu}.json",
            ("benchmarks/serving.py", "--shape", shape, "--rate", "12", "--duration", "5", "--limit", "300",
             "--checkpoint", "{scratch}/served", *TO_JSON), 240, 480, 2,
        ),
    ]  # fmt: skip


def rehearsal() -> list[Part]:
    """The commands of ``parts`` as far as they run on CPU: tiny shapes, one timed run."""
    tiny, sizes = ("--shape", "tiny", "--device", "cpu"), ("--vision-tokens", "64,144")
    once = ("--runs", "1", *TO_JSON)
    stalls = ("benchmarks/stalls.py", *tiny, "--sizes", "16,64", "--requests", "12", *TO_JSON)
    return [
        Part("ttft", "ttft-tiny-cpu.json", ("benchmarks/ttft.py", *tiny, *sizes, *once), 5, 120),
        Part("stalls", "stalls-tiny-cpu.json", stalls, 5, 120),
        Part("gpu-tests", "gpu-tests-cpu.json", ("-m", "vlcache_dist.bench.gpu_tests", *TO_JSON), 20, 300),
        Part(
            "growth", "growth-tiny-cpu.json",
            ("benchmarks/growth.py", *tiny, "--sizes", "16,64", "--large", "64", "--image", "16", "--max-requests", "2",
             *once), 5, 240,
        ),
        Part(
            "tensor-parallel", "tensor-parallel-tiny-cpu.json",
            ("benchmarks/tensor_parallel.py", *tiny, "--vision-tokens", "64", "--read-bytes", "1048576", *once,
             "--batches"), 20, 300,
        ),
        Part("ttft-remote", "ttft-remote-tiny-cpu.json", (*CLI, "ttft", "--remote", *tiny, *sizes, *once), 20, 300),
        Part(
            "http-ttft", "http-ttft-tiny-2xcpu.json",
            ("benchmarks/http_ttft.py", *tiny, "--vision-tokens", "64", "--pictures", "2", *once), 30, 300,
        ),
        Part(
            "transfer", "transfer-tiny-cpu.json",
            (*CLI, "transfer", "--device", "cpu", "--shape", "tiny", "--seconds", "0", "--largest", "1048576",
             *TO_JSON), 20, 200,
        ),
        Part(
            "serving", "serving-tiny-2xcpu.json",
            ("benchmarks/serving.py", *tiny, "--rate", "2", "--duration", "2", "--share", "50", *TO_JSON), 60, 400,
        ),
    ]  # fmt: skip
