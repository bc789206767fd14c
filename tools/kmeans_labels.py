"""Label every frame of a corpus with the nearest of K centroids; alone or under torchrun.

torchrun --nproc_per_node 2 tools/kmeans_labels.py features=mfcc clusters=100 data.dir=data/speech output=labels/iter1
python tools/kmeans_labels.py features=upstream checkpoint=outputs/iter1 layer=6 clusters=500 data.dir=data/speech \\
    output=labels/iter2

`features` is mfcc, logmel or upstream; `checkpoint` a run, an export, a Hugging Face folder or a .pt file (then
`upstream` names its method); `layer` counts hidden states, 0 being the Transformer's input. `backend` is faiss or
sklearn. `kmeans` takes the centroids of another label directory. `alignments` (a table of utt, start_s, end_s, phone)
adds purity and PNMI to report.json.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Before torch is loaded: threads that spin while they wait make a busy machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pretrain.config import parse_cli, run_tool
from pretrain.labelling.kmeans.generate import LabelOptions, describe, generate_labels


def main(arguments: list[str]) -> None:
    """Parse, label, print the report's gist on the first rank."""
    options = parse_cli(LabelOptions, arguments, __doc__)
    report = generate_labels(options)
    if os.environ.get("RANK", "0") == "0":
        print(describe(report))
        print(f"written to {options.output}")


if __name__ == "__main__":
    run_tool(main)
