"""Plan and run a configuration in a separate process, and print what it took: `python FILE OUT`.

glibc keeps what is freed; the caller sets MALLOC_MMAP_THRESHOLD_ so that it gives memory back.
"""

import json
import re
import sys
import threading
import time
from pathlib import Path

import peft  # noqa: F401
import torch.distributed  # noqa: F401
import transformers.masking_utils  # noqa: F401

from fedmomentum import FederatedTrainer, load_config


def own_bytes() -> int:
    """What this process alone holds; pages of mapped files are the system's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


def mapped_bytes(model) -> int:
    """The weights that are read from the mapped checkpoint in every step."""
    maps = Path("/proc/self/maps").read_text()
    lines = re.findall(r"^(\w+)-(\w+) .*\.safetensors$", maps, flags=re.MULTILINE)
    spans = [(int(start, 16), int(end, 16)) for start, end in lines]
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in model.parameters()
        if any(start <= tensor.data_ptr() < end for start, end in spans)
    )


class Watch(threading.Thread):
    """Looks at the process every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, own_bytes())
            time.sleep(0.001)


def main(file: str, out: str) -> None:
    trainer = FederatedTrainer(load_config(file), out)
    plan, _ = trainer.plan()
    before = own_bytes()
    watch = Watch()
    watch.start()
    run = trainer.prepare()
    # What is shared with a file is the model's too.
    shared = mapped_bytes(run.local.peft)
    trainer.train()
    measured = watch.peak - before + shared
    print(json.dumps({"planned": plan.host_memory.peak, "measured": measured}))


if __name__ == "__main__":
    main(*sys.argv[1:])
