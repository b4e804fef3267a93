"""``python tests/read_chat.py PAIR NUMBER [LENGTH]``: the first samples of packed conversations, pickled; what it says goes to stderr."""

import os
import pickle
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace


def main(pair: str, number: str, length: str = "64") -> None:
    os.environ["HARNESS_DEVICE"] = "cpu"
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    with redirect_stdout(sys.stderr):
        from harness.entry import rank

        rank.prepare()
        import numpy as np
        from megatron.core.datasets.utils import Split

        from harness.finetune.dataset import ChatDataset

        settings = {
            "sequence_length": int(length),
            "random_seed": 1234,
            "mmap_bin_files": True,
            "tokenizer": SimpleNamespace(unique_identifiers={}),
        }
        config = SimpleNamespace(**dict.fromkeys(ChatDataset._key_config_attributes()) | settings)
        opened = ChatDataset.build_low_level_dataset(pair, config)
        conversations = np.arange(ChatDataset.numel_low_level_dataset(opened))
        chat = ChatDataset(opened, pair, conversations, int(number), Split.train, config)
        samples = [chat[n] for n in range(int(number))]
    sys.stdout.buffer.write(pickle.dumps(samples))


if __name__ == "__main__":
    main(*sys.argv[1:])
