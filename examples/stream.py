"""
Label more rows than memory should hold: features in a file, read block by block.

    python examples/stream.py            # 20,000 made rows
    python examples/stream.py 1000000    # a million: minutes, 2.6 GB of memory, 0.5 GB of disk
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from transclip_fast import TransCLIP

n_rows, n_classes, dim, block = int(sys.argv[1] if sys.argv[1:] else 20_000), 200, 256, 10_000
draw = np.random.default_rng(0)
means = draw.normal(size=(n_classes, dim))
texts = means + 3 * draw.normal(size=means.shape)
texts /= np.linalg.norm(texts, axis=1, keepdims=True)
labels = draw.integers(n_classes, size=n_rows)


def memory_of(rows):
    """Bytes for the libraries, and for what a solve keeps of each row beside its features."""
    return 2**30 + 1500 * rows


with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "features.npy"
    rows = np.lib.format.open_memmap(file, "w+", np.float16, (n_rows, dim))
    for start in range(0, n_rows, block):
        some = means[labels[start : start + block]]
        some = some + 1.2 * draw.normal(size=some.shape)
        rows[start : start + block] = some / np.linalg.norm(some, axis=1, keepdims=True)
    rows.flush()
    began = time.perf_counter()
    model = TransCLIP(memory=memory_of(n_rows), verbose=True)
    model.fit(np.load(file, mmap_mode="r"), text_features=texts)
    seconds = time.perf_counter() - began

peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(f"{n_rows:,} rows in {seconds:.1f} s, peak of the process {peak / 1e9:.2f} GB")
print(f"features held in memory: {model.layout_.held}; recall {model.graph_.info['recall']:.4f}")
before, after = ((x == labels).mean() for x in (model.zero_shot_labels_, model.transduction_))
print(f"accuracy: zero-shot {before:.1%}, jointly {after:.1%}")
