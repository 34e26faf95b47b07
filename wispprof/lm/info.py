"""What the rest of the system may know of a model. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["ModelInfo"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Identity and sizes of a loaded model.

    ``id``: folder name, hub id or preset. ``family``: the config's ``model_type``. ``parameters``
    counts tied weights once. ``config_hash`` and ``weights_hash`` identify what was measured
    (``random:<seed>`` for random weights); ``tokenizer_hash`` is empty where there is no tokenizer.
    ``max_context``: most tokens a session may cache. ``kv_bytes_per_token``: K and V of all layers.
    """

    id: str
    family: str
    parameters: int
    dtype: str
    config_hash: str
    weights_hash: str
    tokenizer_hash: str
    max_context: int
    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    kv_bytes_per_token: int

    def as_dict(self) -> dict[str, object]:
        """Plain values, as they go into a manifest."""
        return asdict(self)
