"""A process with an arena that others read from. Commands are JSON lines on stdin, replies JSON lines on stdout.

It ends when its stdin does, so that it cannot outlive the test that started it.
"""

from __future__ import annotations

import base64
import json
import os
import sys

import msgspec
import torch

from vlcache_dist.kv.layout import KVLayout
from vlcache_dist.transfer.nixl import NixlTransport

REPLIES = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # NIXL logs to stdout


def main() -> None:
    torch.set_num_threads(1)
    worker_id, nbytes, layout = sys.argv[1], int(sys.argv[2]), msgspec.json.decode(sys.argv[3], type=KVLayout)
    arena = torch.zeros(nbytes, dtype=torch.uint8)
    transport = NixlTransport(worker_id, arena, layout)
    reply(base64.b64encode(msgspec.msgpack.encode(transport.info)).decode())
    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "fill":
                generator = torch.Generator().manual_seed(command["seed"])
                part = arena[command["offset"] : command["offset"] + command["nbytes"]]
                part.copy_(torch.randint(0, 256, (command["nbytes"],), dtype=torch.uint8, generator=generator))
            case "attend":
                transport.attend(command["seconds"])
        reply("ok")
    transport.close()


def reply(value: str) -> None:
    print(json.dumps(value), file=REPLIES, flush=True)


if __name__ == "__main__":
    main()
