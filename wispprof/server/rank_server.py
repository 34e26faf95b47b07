"""A server whose target is shared by several processes: rank 0 serves, the others follow it.

``wispprof serve --tensor-parallel N`` is torchrun with N processes of the same command line, unless
torchrun started it already (which is how ranks on several hosts are started).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from wispprof.errors import EngineError
from wispprof.openai_api import ChatTokenizer
from wispprof.server.process import serve
from wispprof.server.verification_server import VerificationServer
from wispprof.settings.server_settings import ServerSettings

__all__ = ["is_rank0", "launch", "serve_ranks", "started_by_torchrun"]


def started_by_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ


def is_rank0() -> bool:
    """Whether this rank answers for its group."""
    return os.environ.get("RANK") == "0"


def launch(size: int) -> None:
    """Run ``size`` copies of this command line on this machine under torchrun, until they have ended.

    Raises :class:`EngineError` where one of them failed; torchrun has stopped the others by then.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    # Unset, torchrun takes one compute thread per rank and says so.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    # From a checkout argv[0] is a script, installed it is the console script: both are python files.
    program = str(Path(sys.argv[0]).absolute())
    try:
        torchrun(["--standalone", "--nproc-per-node", str(size), program, *sys.argv[1:]])
    except SignalException:
        return  # we were told to end; the ranks were told, and have drained
    except ChildFailedError as err:
        rank, failure = err.get_first_failure()
        raise EngineError(
            f"Rank {rank} of {size} ended with code {failure.exitcode}; the others were stopped.",
            "Its own message stands above.",
        ) from None


def serve_ranks(
    settings: ServerSettings, announce: Callable[[VerificationServer, int], None]
) -> None:
    """Join the ranks, load this one's share, and serve (rank 0) or follow (the others). Blocks.

    Raises :class:`EngineError` where the ranks fell apart while serving.
    """
    from wispprof.engines.tensor_parallel import join
    from wispprof.engines.torch import load_torch_engine
    from wispprof.engines.torch.multi_rank_engine import MultiRankEngine, follow
    from wispprof.server.startup import engine_options, served_model

    ranks = join(settings.tensor_parallel, settings.device)
    try:
        engine, model, tokenizer = load_torch_engine(engine_options(settings), ranks)
        if ranks.rank:
            # Signals reach every process; the leader drains, and says when it is over.
            for one in (signal.SIGINT, signal.SIGTERM):
                signal.signal(one, signal.SIG_IGN)
            follow(engine, ranks)
            return
        leader = MultiRankEngine(engine, ranks, on_broken=_ask_to_end)
        try:
            chat = ChatTokenizer(tokenizer) if tokenizer is not None else None
            serve(
                settings,
                announce,
                engine=leader,
                model=served_model(settings, model),
                tokenizer=chat,
            )
        finally:
            leader.shutdown()
        if leader.broken:
            raise EngineError(f"The server ended: {leader.broken}.", "See the ranks' logs.")
    finally:
        ranks.leave()


def _ask_to_end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
