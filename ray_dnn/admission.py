"""Whether a newcomer computes the same bits as the first agent."""

from __future__ import annotations

from ray_dnn.engine.probe import difference
from ray_dnn.errors import AdmissionError
from ray_dnn.events import AgentAdmitted, AgentRefused, EventLog, HiddenStateSuspected
from ray_dnn.fleet import Replica


class Admission:
    """Compares every replica's first contribution with that of the first one.

    Attributes:
        exact: whether all that were admitted computed the same bits.
    """

    def __init__(self, log: EventLog, deterministic: bool):
        self._log = log
        self._deterministic = deterministic
        self._reference: Replica | None = None  # the first replica, once it is ready
        self._waiting: dict[str, Replica] = {}  # ready before it, by name
        self.exact = True

    def examine(self, replica: Replica) -> tuple[list[Replica], dict[str, AdmissionError]]:
        """Examine a replica that has become ready.

        Returns:
            The replicas that are admitted now, and the errors of those that are refused, by name. Both may be empty:
            the first replica computes everything twice, so others may have to wait for it.
        """
        if not replica.first and self._reference is None:
            self._waiting[replica.name] = replica
            return [], {}
        if replica.first:
            self._reference = replica
        candidates, self._waiting = [replica, *self._waiting.values()], {}
        admitted, refused = [], {}
        for candidate in candidates:
            error = self._compare(candidate)
            if error is None:
                admitted.append(candidate)
            else:
                refused[candidate.name] = error
            if candidate is not self._reference:
                candidate.built = []  # what thousands have computed would fill the memory
        return admitted, refused

    def waiting(self, replica: Replica) -> bool:
        """Whether a replica that is ready has not been examined yet."""
        return replica.name in self._waiting

    def _compare(self, replica: Replica) -> AdmissionError | None:
        assert self._reference is not None
        same = True
        for rank, (built, known) in enumerate(zip(replica.built, self._reference.built, strict=True)):
            assert built is not None
            assert known is not None
            if built.first.suspects:
                self._log.add(HiddenStateSuspected(list(built.first.suspects)))
            if (built.first.digest, built.state_digest) != (known.first.digest, known.state_digest):
                if self._deterministic:
                    return self._refuse(replica, rank)
                same = self.exact = False
            if not self._deterministic and built.profile["device"] != "cpu":
                same = self.exact = False  # its kernels may give other bits each time
        for name, built in zip(replica.names, replica.built, strict=True):
            assert built is not None
            self._log.add(AgentAdmitted(name, built.seconds, built.profile, same))
        return None

    def _refuse(self, replica: Replica, rank: int) -> AdmissionError:
        assert self._reference is not None
        built, known, hello = replica.built[rank], self._reference.built[rank], replica.hellos[rank]
        assert built is not None
        assert known is not None
        assert hello is not None
        what = difference(known.first, built.first) or "the weights as built"
        profiles = {k: (v, built.profile[k]) for k, v in known.profile.items() if built.profile[k] != v}
        why = f"; its profile differs: {profiles}" if profiles else ""
        reason = f"it computes other bits than {self._reference.names[rank]} in {what}{why}"
        self._log.add(AgentRefused(replica.names[rank], hello.host, reason))
        return AdmissionError(
            f"{replica.names[rank]} on {hello.host} was refused: {reason}. Use machines and libraries of one kind, "
            "make sure that build_model depends on the seeded global generators alone, or give up equal bits with "
            "TrainConfig(deterministic=False)."
        )
