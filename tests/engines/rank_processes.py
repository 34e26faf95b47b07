"""One sequence of steps for any engine: in this process, or over two ranks."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from wispprof.errors import EngineError
from wispprof.types import Sampling, StepInput

PROMPTS, NEW, VOCAB = 20, 24, 96
KV_TOKENS = 2_000


def drive(engine: Any) -> dict[str, Any]:
    """20 prompts, half of them sampled, ragged steps with wrong and right drafts; then the odd calls."""
    rng = random.Random(11)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randrange(2, 60))] for _ in range(PROMPTS)]
    texts: list[list[int]] = []
    for i, prompt in enumerate(prompts):
        hot = Sampling(0.8, 20 * (i % 3), 0.95, seed=2**70 + i, logprobs=2) if i % 2 else Sampling()
        engine.open(str(i), hot)
        if len(prompt) > 20:
            engine.step([StepInput(str(i), prompt[:20], needs_logits=False)])
            prompt = prompt[20:]
        texts.append(list(engine.step([StepInput(str(i), prompt)])[0].tokens))
    accepted, logprobs = 0, []
    while any(len(text) < NEW for text in texts):
        inputs = []
        for i in rng.sample(range(PROMPTS), 12):
            drafts = [rng.randrange(VOCAB) for _ in range(rng.choice([0, 1, 3]))]
            if texts[i][-1] % 2:  # a repetition is what random models often continue with
                drafts = texts[i][-3:]
            inputs.append(StepInput(str(i), [texts[i][-1], *drafts], len(drafts)))
        for result in engine.step(inputs):
            accepted += result.accepted
            texts[int(result.session)].extend(result.tokens)
            logprobs += [one.logprob for one in result.logprobs]
    engine.fork("0", "child", 2, Sampling(0.5, seed=3))
    engine.rollback("1", 3)
    engine.close("2")
    [forked] = engine.step([StepInput("child", [5, 6, 7], 1)])
    errors = []
    for inputs in (
        [StepInput("nobody", [1])],
        [StepInput("0", [1_000])],
        [StepInput("0", [2**80])],
        [StepInput("0", [1] * KV_TOKENS)],
    ):
        try:
            engine.step(inputs)
        except EngineError as err:
            errors.append(type(err).__name__)
    engine.open("odd", Sampling(1.0, top_k=2**80, seed=-(2**80), min_length=2**70, stop_tokens=(2**80,)))
    engine.check_integrity()
    cached = {name: engine.cached(name) for name in engine.sessions}
    for name in list(engine.sessions):
        engine.close(name)
    engine.check_integrity()
    return {
        "texts": texts,
        "accepted": accepted,
        "forked": list(forked.tokens),
        "errors": errors,
        "cached": cached,
        "kv_free": engine.kv_free,
        "logprobs": logprobs,
    }


def step_alone(engine: Any) -> list[int]:
    """One prompt, one step, on this process's engine only."""
    engine.open("alone")
    [result] = engine.step([StepInput("alone", list(range(40)))])
    engine.close("alone")
    return list(result.tokens)


def _drive_rank(folder: Path, ranks: Any) -> None:
    from wispprof.engines.loading import load_model
    from wispprof.engines.torch.engine import TorchEngine
    from wispprof.engines.torch.multi_rank_engine import MultiRankEngine, follow

    loaded = load_model(folder, ranks=ranks)
    engine = TorchEngine(loaded, kv_tokens=KV_TOKENS)
    engine.warm_up()
    found: dict[str, Any] = {}
    if ranks.rank:
        follow(engine, ranks)
        found = {"sessions": engine.sessions, "kv_free": engine.kv_free}
    else:
        rank0 = MultiRankEngine(engine, ranks)
        found = drive(rank0)
        rank0.shutdown()
    found["held"] = sum(p.numel() for p in loaded.model.parameters())
    found["parameters"] = loaded.info.parameters
    # For the negative control: this rank's share of the weights, taken for the whole.
    engine._ranks = engine._decoder._ranks = None  # type: ignore[attr-defined]
    found["alone"] = step_alone(engine)
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(found))


def drive_ranks(folder: Path, environment: dict[str, str]) -> None:
    """The work of one rank's process: every model of ``folder`` gets its ``rank….json``."""
    from wispprof.engines.tensor_parallel import join

    os.environ.update(environment)
    joined = join(2, "cpu")
    for model in sorted(folder.iterdir()):
        _drive_rank(model, joined)
    joined.leave()
