"""HuBERT checkpoints of other projects; see `pretrain/weights/interop/hubert_layout.py`."""

from pretrain.weights.interop.hubert_layout import (
    HF_MODEL_TYPES,
    from_huggingface,
    from_pt,
    to_huggingface,
    to_s3prl,
)

__all__ = ["HF_MODEL_TYPES", "from_huggingface", "from_pt", "to_huggingface", "to_s3prl"]
