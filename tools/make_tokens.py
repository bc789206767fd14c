"""Write the tokens of a corpus: the codes that a trained vq-wav2vec gives every frame; alone or under torchrun.

torchrun --nproc_per_node 2 tools/make_tokens.py checkpoint=outputs/vq_wav2vec data.dir=data/speech output=tokens/en

`checkpoint` is a run, an export, or a .pt file of fairseq or s3prl (then method=wav2vec says what it is). The
dictionary lists the pairs of codes in the training split, most frequent first; others become <unk>. In place of
`checkpoint`, `kmeans` takes the k-means on MFCC or log-mel of a label directory, and `tokens` takes tokenizer and
dictionary of another token directory, for more data with the same tokens.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Before torch is loaded: threads that spin while they wait make a busy machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pretrain.config import parse_cli, run_tool
from pretrain.labelling.tokens.generate import TokenOptions, describe, generate_tokens


def main(arguments: list[str]) -> None:
    """Parse, tokenize, print the report's gist on the first rank."""
    options = parse_cli(TokenOptions, arguments, __doc__)
    report = generate_tokens(options)
    if os.environ.get("RANK", "0") == "0":
        print(describe(report))
        print(f"written to {options.output}")


if __name__ == "__main__":
    run_tool(main)
