"""What a run goes on from when it is started again."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ray_dnn.agent import Resume
from ray_dnn.checkpoint import Manifest, Place, verify
from ray_dnn.checkpoints import Kept
from ray_dnn.errors import CheckpointError, ConfigError
from ray_dnn.events import CheckpointDamaged
from ray_dnn.identity import Identity, differences
from ray_dnn.storage import RunFolder

Say = Callable[[CheckpointDamaged], None]


def find(folder: RunFolder, identity: Identity, say: Say) -> tuple[Resume | None, list[Kept]]:
    """The newest checkpoint that is what its manifest says, and all that seem to be.

    Args:
        identity: what is known of the job.
        say: told of those that are damaged.

    Raises:
        ConfigError: it is of another job.
        CheckpointError: there are checkpoints, and none can be used.
    """
    damaged: dict[str, str] = {}

    def bad(event: CheckpointDamaged) -> None:
        damaged[event.path] = event.reason
        say(event)

    whole = complete(folder, bad)
    if whole:
        check_same(folder.path, whole[-1][1], identity)
    resume = newest(whole, bad)
    if resume is None and damaged:
        raise CheckpointError(
            f"No checkpoint of {folder.path} can be used, and nothing was changed there. {' '.join(damaged.values())} "
            "Give the run another name to begin anew, or bring the files back."
        )
    return resume, [Kept.of(at, found.step, found.history) for at, found in whole if at.path not in damaged]


def complete(folder: RunFolder, say: Say) -> list[tuple[Place, Manifest]]:
    """The checkpoints of a run that were completed, in the order of their steps. ``say``: told of those damaged."""
    found: list[tuple[Place, Manifest]] = []
    for name in folder.checkpoints():
        place = folder.place.below(name)
        try:
            found.append((place, Manifest.read(place)))
        except CheckpointError as error:
            if not isinstance(error.__cause__, FileNotFoundError):  # else it was never completed
                say(CheckpointDamaged(place.path, str(error)))
    return sorted(found, key=lambda entry: (entry[1].step, entry[1].attempt))


def newest(found: Iterable[tuple[Place, Manifest]], say: Say) -> Resume | None:
    """The last one whose files are what its manifest says. ``say``: told of those that are not."""
    for place, manifest in reversed(list(found)):
        try:
            verify(place, manifest)
        except (CheckpointError, OSError) as error:
            say(CheckpointDamaged(place.path, str(error)))
            continue
        return Resume(place, manifest)
    return None


def check_same(path: str, manifest: Manifest, identity: Identity) -> None:
    """Refuse to go on with another job.

    Raises:
        ConfigError: names all that is not the same.
    """
    changed = differences(manifest.job, identity)
    if changed:
        raise ConfigError(
            f"{path} holds another job, which stopped after step {manifest.step}. What differs: "
            f"{'; '.join(changed)}. Give this one another name, or make them the same. More epochs or steps are no "
            "change. To begin a new run with old weights, use Trainer(start_from=…)."
        )
