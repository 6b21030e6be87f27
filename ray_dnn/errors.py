"""Every error that ray_dnn raises on purpose, whose fault it is, and what to do next.

::

    RayDnnError
    ├── ConfigError (ValueError)   the job as described cannot run; nothing was started. Change the named value.
    ├── UserCodeError              a function of the job raised. The user's own exception is its ``__cause__``.
    ├── DataError                  rows cannot be read. Says which file, and what is wrong with it.
    ├── HiddenStateError           a contribution computed twice gave other bits: the job has state outside its model.
    ├── NonFiniteError             a contribution holds NaN or infinity, and the job asked to stop there.
    ├── AdmissionError             an agent computes other bits than the rest. Use like machines or deterministic=False.
    ├── AgentLostError             agents are gone and the run may not go on without them. Raise max_failures.
    ├── AuditError                 agents compute differently, and it cannot be told which are wrong. Use three or more.
    ├── CheckpointError            a checkpoint is not what its manifest says, or cannot be written.
    ├── FencedError                the run was started again meanwhile under its name: this attempt is over.
    ├── LedgerError                the ledger contradicts itself: a bug of ray_dnn. Please report it.
    └── ProtocolError              agents disagree about where they are: a bug of ray_dnn. Please report it.

``Trainer.fit()`` raises ``ray.train.TrainingFailedError`` with one of these (or the user's exception) as its cause.
"""

from __future__ import annotations


class RayDnnError(Exception):
    """Base of all errors that ray_dnn raises on purpose."""


class ConfigError(RayDnnError, ValueError):
    """The job as described cannot run. Raised before anything is started wherever that can be known."""


class UserCodeError(RayDnnError):
    """A function that the user gave raised.

    Attributes:
        error: the name of what it raised.
        function: which one, e.g. ``"loss"`` or ``"collate"``.
        where: agent, step, virtual worker and rows, as far as there are any.
        remote_traceback: the traceback as the agent saw it.
    """

    def __init__(self, error: str, function: str, where: str, remote_traceback: str):
        place = f"{function}, {where}" if where else function
        super().__init__(f"{error} in {place}\n\n{remote_traceback}")
        self.error, self.function, self.where = error, function, where
        self.remote_traceback = remote_traceback

    def __reduce__(self) -> tuple[type[UserCodeError], tuple[str, str, str, str]]:
        return (type(self), (self.error, self.function, self.where, self.remote_traceback))


class DataError(RayDnnError):
    """Rows of a dataset cannot be read."""


class HiddenStateError(RayDnnError):
    """The same contribution, computed a second time, had other bits."""


class NonFiniteError(RayDnnError):
    """A contribution holds NaN or infinity and ``TrainConfig(nonfinite="stop")`` is in force."""


class AdmissionError(RayDnnError):
    """An agent computed other bits for a contribution that is known."""


class AgentLostError(RayDnnError):
    """Agents are gone and the run may not go on without them."""


class AuditError(RayDnnError):
    """Agents compute differently, and it cannot be told which of them are wrong."""


class CheckpointError(RayDnnError):
    """A checkpoint is not what its manifest says it is, or cannot be written."""


class FencedError(RayDnnError):
    """A newer attempt of the same run has been started."""


class LedgerError(RayDnnError):
    """The ledger of rows contradicts itself."""


class ProtocolError(RayDnnError):
    """Agents that should be at the same place are not."""
