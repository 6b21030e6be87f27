"""Where an agent is: the named phases of its life, and the few bytes in which it tells them to whoever looks on.

The bytes lie in memory that a watcher outside of the process maps too, so they can be read while the agent is stopped,
holds the interpreter's lock, or is dead.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple


class Patient(enum.Enum):
    """What an agent may do in a phase before it is taken for hung."""

    WORKING = "working"  # it must burn CPU or be about to; idle, it holds up the others
    SLOW = "slow"  # it may wait for things outside (a download, a disk) for a long time
    WAITING = "waiting"  # for other agents or for the driver: never its own fault


class Phase(enum.Enum):
    """A phase of an agent's life. The values are the names that fault plans use."""

    STARTING = "starting"  # its process is there
    BUILDING = "building"  # the user's model and optimizer
    ADMISSION = "admission"  # the job's first contribution
    READY = "ready"  # for the driver to say what is next
    FOLLOWING = "following"  # a member, to have its state before it takes part
    FORMING = "forming"  # connecting to the others of a generation
    COPYING = "copying"  # state, to a newcomer or from a source
    SUPPLY = "supply"  # waiting until it is known which rows a step uses, and where they are
    READING = "reading"  # rows
    COMPUTING = "computing"  # contributions
    EXCHANGE_FIRST = "exchange-first"  # of the exchange: the parts are on their way
    EXCHANGE_MIDDLE = "exchange-middle"  # all parts are here, and folded
    EXCHANGE_LAST = "exchange-last"  # all results are here, but not all of one's own have been sent
    COMBINED = "combined"  # the exchange is complete, nothing is applied
    APPLYING = "applying"  # the update
    EVALUATING = "evaluating"
    SAVING = "saving"  # copying the state for a checkpoint
    RESTORING = "restoring"  # loading a checkpoint
    GATHERING = "gathering"  # results of an evaluation, or parts of a replica that is divided over several agents
    FINISHING = "finishing"  # digests and weights, after the last step

    @property
    def patient(self) -> Patient:
        return _PATIENT.get(self, Patient.WAITING)


_PATIENT = {
    Phase.STARTING: Patient.SLOW,
    Phase.BUILDING: Patient.SLOW,
    Phase.ADMISSION: Patient.SLOW,
    Phase.READING: Patient.SLOW,
    Phase.FINISHING: Patient.SLOW,
    Phase.RESTORING: Patient.SLOW,
    Phase.COMPUTING: Patient.WORKING,
    Phase.COMBINED: Patient.WORKING,
    Phase.APPLYING: Patient.WORKING,
    Phase.EVALUATING: Patient.WORKING,
    Phase.SAVING: Patient.WORKING,
}
UNTIL_READY = (Phase.STARTING, Phase.BUILDING, Phase.ADMISSION)  # before an agent takes part in any step
_PHASES = list(Phase)

_LAYOUT = struct.Struct("<qqqqqq")
STATUS_BYTES = _LAYOUT.size


class Status(NamedTuple):
    """What an agent says about itself.

    Attributes:
        phase: that it is in.
        generation, step: that it is in.
        moves: counts phases entered; unchanged means that it is still where it was.
        moved: counts bytes exchanged with other agents.
        waits: for whom it has waited for over a second: the bit of each rank, of those below 63.
    """

    phase: Phase = Phase.STARTING
    generation: int = 0
    step: int = 0
    moves: int = 0
    moved: int = 0
    waits: int = 0

    def write(self, memory: memoryview) -> None:
        _LAYOUT.pack_into(memory, 0, _PHASES.index(self.phase), *self[1:])

    @classmethod
    def read(cls, memory: memoryview | bytes) -> Status:
        phase, *numbers = _LAYOUT.unpack_from(memory)
        return cls(_PHASES[phase], *numbers)

    def waits_for(self) -> list[int]:
        """The ranks that it has waited for."""
        return [rank for rank in range(self.waits.bit_length()) if self.waits >> rank & 1]

    def text(self) -> str:
        """In plain words."""
        if self.phase in UNTIL_READY:
            return self.phase.value
        return f"{self.phase.value}, step {self.step}"
