"""Typed errors of CausalRT.

Subclasses of `ValueError` are about what a caller passed; subclasses of `RuntimeError` are about what failed. Every message
names the object, the value that was found, the value that was expected, and what to do about it.
"""

from collections.abc import Sequence


class CausalRTError(Exception):
    """Base of every error that CausalRT raises on purpose."""


class ConfigError(CausalRTError, ValueError):
    """A configuration field, or a combination of fields, cannot work."""


class CombinedConfigError(ConfigError):
    """Several things are wrong with a request; the message has a line for each.

    Attributes:
        found: the errors, in the order in which they were found.
    """

    def __init__(self, found: Sequence[CausalRTError]) -> None:
        super().__init__(f"{len(found)} things are wrong:\n" + "\n".join(f"- {error}" for error in found))
        self.found = found


class CheckpointError(CausalRTError, ValueError):
    """A checkpoint cannot be read, or does not hold the model that the recipe describes."""


class BundleError(CausalRTError, ValueError):
    """A bundle is damaged, incomplete, or built for something other than what is requested."""


class BuildError(CausalRTError, RuntimeError):
    """An offline build failed; nothing was left at the target."""


class PromptError(CausalRTError, ValueError):
    """A prompt, or the embeddings of one, cannot be used: wrong type, shape, length, or values."""


class RequestError(CausalRTError, ValueError):
    """A session asks for what the loaded engine cannot do, such as frames past its horizon."""


class RecordingError(CausalRTError, ValueError):
    """A recorded rollout cannot be replayed: malformed, or of a kind that this version does not know."""


class ExecutorError(CausalRTError, RuntimeError):
    """An executor cannot run here: a library, a device or a precision is missing."""


class OperandError(CausalRTError, ValueError):
    """A fused kernel was given tensors whose shapes, types or strides do not fit together."""


class KernelError(CausalRTError, RuntimeError):
    """A fused kernel cannot be compiled or run: Triton or a device is missing, or it does not take such shapes or types."""


class OutOfMemoryError(CausalRTError, RuntimeError):
    """The predicted memory does not fit, found before anything was allocated."""


class CapacityError(CausalRTError, RuntimeError):
    """The memory of the engine holds no further session; one of those that are open must end first."""


class VideoError(CausalRTError, RuntimeError):
    """A video cannot be encoded or written, for example because the disk is full; nothing was left at the target."""


class RankError(CausalRTError, RuntimeError):
    """A rank process died, hung, or raised; the engine is closed and can be loaded again.

    Attributes:
        rank: the first rank that failed, or None if none of them answered.
        log_tail: the last lines that this rank logged.
    """

    def __init__(self, message: str, *, rank: int | None = None, log_tail: str = "") -> None:
        super().__init__(message + (f"\nlast log lines of rank {rank}:\n{log_tail}" if log_tail else ""))
        self.rank = rank
        self.log_tail = log_tail


class MeasurementError(CausalRTError, RuntimeError):
    """The executors that a benchmark compares did not do the same work, so its figures would mean nothing."""


class EngineClosedError(CausalRTError, RuntimeError):
    """A call on an engine or session that was closed, or whose ranks have failed."""


class ForkError(CausalRTError, RuntimeError):
    """A call on an engine or session in a process that was forked from the one that loaded the engine."""


class Faults:
    """Collects the errors of several checks, so that one message names everything that is wrong with a request.

    Each check runs in a `with` block of its own, which keeps the error that the check raises; `report` raises them.
    """

    def __init__(self) -> None:
        self._found: list[CausalRTError] = []

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, CausalRTError):
            return False
        self._found += error.found if isinstance(error, CombinedConfigError) else [error]
        return True

    def report(self) -> None:
        """Raise what was found: a single error as it is, several as one `CombinedConfigError`."""
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            raise CombinedConfigError(self._found)
