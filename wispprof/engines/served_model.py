"""What a server tells of its target: identity, where answers end, chat template and sampling defaults."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wispprof.errors import ModelError
from wispprof.sampling.position_noise import NOISE_VERSION
from wispprof.types import GenerationDefaults, Sampling, ServedModel

log = logging.getLogger("wispprof.engines")

_IDENTIFYING = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "hidden_act",
    "tie_word_embeddings",
    "rope_parameters",
)
"""Config fields that change the text and do not show in the shapes of the weights."""

_NOT_APPLIED = ("repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "bad_words_ids", "typical_p")


def describe_model(
    name: str,
    folder: Path | None,
    config: Any,
    tokenizer: Any,
    *,
    weights: str,
    dtype: str,
    vocabulary: str,
    max_context: int,
    generation_config: str = "auto",
) -> ServedModel:
    """The target as edges and endpoints must know it, without its weights.

    ``weights``: :func:`~wispprof.engines.model_weights.weights_digest`. ``vocabulary``: hash of the
    tokenizer. ``generation_config``: ``auto`` takes sampling defaults from the target's
    ``generation_config.json``, ``openai`` those of OpenAI's API, anything else is a folder that holds one.
    """
    own = read_generation_config(folder) if folder else {}
    return ServedModel(
        name,
        vocabulary,
        config.vocab_size,
        max_context,
        identity=model_identity(config, weights, dtype),
        stop_tokens=stop_tokens(own, config, tokenizer),
        chat_template=chat_template(tokenizer),
        defaults=generation_defaults(generation_config, own),
    )


def model_identity(config: Any, weights: str, dtype: str) -> str:
    """Equal for targets that write the same text: weights, dtype, noise, and what the config adds to them."""
    facts = {name: getattr(config, name, None) for name in _IDENTIFYING}
    text = json.dumps([weights, dtype, NOISE_VERSION, facts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_generation_config(folder: Path) -> dict[str, Any]:
    """``generation_config.json`` of a folder, empty without one."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(read, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as err:
        raise ModelError(f"{path} cannot be read: {err}.", "Download it again, or delete it.") from err
    return read


def stop_tokens(generation: Mapping[str, Any], config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: the generation config's, else the config's, and the tokenizer's own."""
    found: set[int] = set()
    named = generation.get("eos_token_id")
    for ids in (
        named if named is not None else getattr(config, "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    ):
        several = ids if isinstance(ids, list | tuple) else [ids]
        found.update(i for i in several if type(i) is int and 0 <= i < config.vocab_size)
    return tuple(sorted(found))


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's template, of several the one named ``default``; empty without one."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) else ""


def generation_defaults(source: str, own: Mapping[str, Any]) -> GenerationDefaults:
    """Sampling of requests that do not say. ``source``: see :func:`describe_model`; ``own``: the target's."""
    if source == "openai":
        return GenerationDefaults()
    where = "generation_config.json"
    read = own
    if source != "auto":
        where = f"{source}/generation_config.json"
        read = read_generation_config(Path(source).expanduser())
        if not read:
            raise ModelError(
                f"There is no {where}.", "Give --generation-config auto, openai or a folder that holds one."
            )
    fallback = GenerationDefaults()
    given = {
        name: read[name] for name in ("temperature", "top_k", "top_p", "min_p") if read.get(name) is not None
    }
    try:
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in given.values()):
            raise ValueError(f"not all of {given} are numbers")
        made = GenerationDefaults(
            float(given.get("temperature", fallback.temperature)),
            max(0, int(given.get("top_k", fallback.top_k))),
            float(given.get("top_p", fallback.top_p)),
            float(given.get("min_p", fallback.min_p)),
        )
        Sampling(made.temperature, made.top_k, made.top_p, 0, made.min_p)
    except (ValueError, OverflowError) as err:
        raise ModelError(
            f"{where} has sampling values that cannot be used: {err}.", "Use --generation-config openai."
        ) from err
    if ignored := [name for name in _NOT_APPLIED if read.get(name) not in (None, [], 0, 1, 1.0)]:
        log.warning("%s asks for %s, which is not supported and ignored", where, ", ".join(ignored))
    if made != fallback:
        log.info("requests that do not say use %s (%s)", made, where)
    return made
