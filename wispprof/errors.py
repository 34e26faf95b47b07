"""One exception tree. Every message says what happened and what to do next.

WispprofError
├── SettingsError            a setting has a value that is not allowed
├── ArtifactError            a file of ours cannot be used
│   ├── ArtifactMissing      it is not there
│   ├── ArtifactDamaged      it is torn, edited or not one of ours
│   ├── ArtifactTooNew       a later version of this tool wrote it
│   └── ArtifactTooOld       an earlier version wrote it; make it anew
├── ModelError               a model or tokenizer cannot be used
│   ├── ModelMissing
│   └── ModelUnsupported     its family or state cannot be rolled back
├── ProfileError             measurements that cannot be trusted or fitted
│   └── PhysicsViolation     times do not vary with shape as they must
├── FitError                 rows that no estimator should be fitted on
│   └── TooFewOutcomes       too few accepted or rejected drafts for a predictor
├── PlanError                inputs of a plan contradict each other
├── PluginError              a policy, estimator, drafter or engine that cannot be found by name
├── EngineError              the verifier engine was asked for something impossible
│   ├── InputRefused         one input of a step cannot be computed; ``session`` names it
│   └── OutOfKvMemory        no capacity for these tokens now
└── RuntimeFault             serving
    ├── EngineLost           the engine failed within a step and must be loaded again
    ├── ProtocolError        a frame that breaks the wire contract
    ├── HandshakeRefused     version, model, tokenizer or key do not match
    ├── RequestRefused       the server does not take this request, now or later
    ├── ServerBusy           not now; carries ``retry_ms``
    └── ServerUnreachable    no server answered in the stated time
"""

from __future__ import annotations

from collections.abc import Iterable


class WispprofError(Exception):
    """Base of everything this package raises on purpose.

    ``hint`` says what the user can do; the CLI prints it after the message.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} {self.hint}".rstrip() if self.hint else message


_OTHER_NAMES = {
    "centralized": "server-only",
    "autoregressive": "server-only",
    "slo": "tokens_per_s",
    "ttft": "ttft_ms",
}
"""Names from papers, and of options, for what has another name."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``Did you mean …?`` with the nearest of ``known`` to a mistyped name; empty if none is near."""
    import difflib

    close = difflib.get_close_matches(_OTHER_NAMES.get(name, name), list(known), 1)
    return f"Did you mean {close[0]!r}?" if close else ""


def suggestion(name: str, known: Iterable[str], more: str = "") -> str:
    """A hint for a mistyped name: the nearest of ``known``, and all of them; ``more`` continues the list."""
    options = list(known)
    return f"{nearest(name, options)} Use one of {', '.join(options)}{more}.".lstrip()


class SettingsError(WispprofError, ValueError):
    """A setting has a value that is not allowed, alone or beside the others."""


class ArtifactError(WispprofError):
    """A file of ours cannot be used."""


class ArtifactMissing(ArtifactError):
    """The file is not there."""


class ArtifactDamaged(ArtifactError):
    """The file is torn, was edited, or is not one of ours."""


class ArtifactTooOld(ArtifactError):
    """An earlier version wrote the file in a schema that is no longer read."""


class ArtifactTooNew(ArtifactError):
    """A later version of this tool wrote the file."""


class ModelError(WispprofError):
    """A model or tokenizer cannot be used."""


class ModelMissing(ModelError):
    """There is no model at that place."""


class ModelUnsupported(ModelError):
    """The model's family, or its state, is one this engine cannot serve."""


class ProfileError(WispprofError):
    """Measurements that cannot be trusted or fitted."""


class PhysicsViolation(ProfileError):
    """Measured times do not vary with shape as they must. ``keys``: rows that contradict each other."""

    def __init__(self, message: str, hint: str = "", keys: Iterable[str] = ()) -> None:
        super().__init__(message, hint)
        self.keys = frozenset(keys)


class FitError(WispprofError):
    """Rows that no estimator should be fitted on."""


class TooFewOutcomes(FitError):
    """A trace with too few accepted or too few rejected drafts for a rejection predictor."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            "Take a longer trace, or serve without a predictor: edges then use the draft's own confidence.",
        )


class PlanError(WispprofError):
    """Inputs of a plan contradict each other."""


class PluginError(WispprofError):
    """No policy, controller, estimator, predictor, drafter or engine has this name."""


class EngineError(WispprofError):
    """The verifier engine was asked for something impossible."""


class InputRefused(EngineError):
    """One input of a step cannot be computed, and nothing changed. Without it the step can be repeated."""

    def __init__(self, session: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.session = session


class OutOfKvMemory(EngineError):
    """The KV cache has no capacity left for these tokens."""


class RuntimeFault(WispprofError):
    """Base of what goes wrong while serving."""


class EngineLost(RuntimeFault):
    """The engine failed within a step. It must not be used again; committed tokens can be prefilled anew."""


class ProtocolError(RuntimeFault):
    """A frame that breaks the wire contract."""


class HandshakeRefused(RuntimeFault):
    """Protocol version, model, tokenizer or key do not match. ``code``: see
    :class:`~wispprof.protocol.Problem`."""

    def __init__(self, message: str, hint: str = "", code: str = "hello") -> None:
        super().__init__(message, hint)
        self.code = code


class RequestRefused(RuntimeFault):
    """The server does not take this request; waiting does not help. ``code``: see
    :class:`~wispprof.protocol.Problem`."""

    def __init__(self, message: str, code: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.code = code


class ServerBusy(RuntimeFault):
    """The server takes no more now; ``retry_ms`` says when to ask again. ``code``: see
    :class:`~wispprof.protocol.Problem`. ``nearest_tokens_per_s``: the admitted speed, 0 if speed
    is not the reason."""

    def __init__(
        self,
        message: str,
        retry_ms: float,
        hint: str = "",
        *,
        code: str = "busy",
        nearest_tokens_per_s: float = 0.0,
    ) -> None:
        super().__init__(message, hint)
        self.retry_ms = retry_ms
        self.code = code
        self.nearest_tokens_per_s = nearest_tokens_per_s


class ServerUnreachable(RuntimeFault):
    """No server answered in the stated time."""
