"""
Label a folder of images, and print which labels the joint solution changed.

    python examples/label_folder.py                     # the package's digits and small model
    python examples/label_folder.py photos names.txt    # your images, by ViT-B-32
"""

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "out"
    command = [sys.executable, "-m", "transclip_fast.cli"]
    if sys.argv[1:]:
        images, names = sys.argv[1:]
        model = ["--model", "ViT-B-32", "--pretrained", "openai"]
        command += ["run", images, "--classes", names, *model, "--out", out]
        result = out / "result"
    else:
        command += ["demo", "--out", out]
        result = out / "blur" / "result"
    subprocess.run(command, check=True)  # noqa: S603 - our own command
    rows = pq.read_table(result / "predictions.parquet").to_pylist()

changes = Counter(
    (row["zero_shot_label_name"], row["label_name"]) for row in rows if row["changed"]
)
print(f"\n{changes.total()} of {len(rows)} labels changed:")
for (before, after), number in changes.most_common(5):
    print(f"{number:5}  {before} -> {after}")
print("\nleast certain:")
for row in sorted(rows, key=lambda row: row["calibrated_confidence"])[:5]:
    print(f"{row['calibrated_confidence']:5.0%}  {row['label_name']:6} {row['key']}")
