"""What a run goes on from when it is started again."""

from __future__ import annotations

from collections.abc import Callable

from ray_dnn.agent import Resume
from ray_dnn.checkpoint import Manifest, Place, verify
from ray_dnn.checkpoints import Kept
from ray_dnn.errors import CheckpointError, ConfigError
from ray_dnn.events import CheckpointDamaged
from ray_dnn.identity import Identity, differences
from ray_dnn.storage import RunFolder


def find(
    folder: RunFolder, identity: Identity, say: Callable[[CheckpointDamaged], None]
) -> tuple[Resume | None, list[Kept]]:
    """The newest checkpoint that is what its manifest says, and all that seem to be.

    Args:
        identity: what is known of the job.
        say: told of those that are damaged.

    Raises:
        ConfigError: it is of another job.
        CheckpointError: there are checkpoints, and none can be used.
    """
    found: list[tuple[Place, Manifest]] = []
    damaged: list[str] = []

    def bad(place: Place, error: Exception) -> None:
        damaged.append(str(error))
        say(CheckpointDamaged(place.path, str(error)))

    for name in folder.checkpoints():
        place = folder.place.below(name)
        try:
            found.append((place, Manifest.read(place)))
        except CheckpointError as error:
            if not isinstance(error.__cause__, FileNotFoundError):  # else it was never completed
                bad(place, error)
    found.sort(key=lambda entry: (entry[1].step, entry[1].attempt))
    kept = [Kept.of(place, manifest.step, manifest.history) for place, manifest in found]
    while found:
        place, manifest = found.pop()
        check_same(folder.path, manifest, identity)
        try:
            verify(place, manifest)
        except (CheckpointError, OSError) as error:
            bad(place, error)
            kept.pop()
            continue
        return Resume(place, manifest), kept
    if damaged:
        raise CheckpointError(
            f"No checkpoint of {folder.path} can be used, and nothing was changed there. {' '.join(damaged)} Give the "
            "run another name to begin anew, or bring the files back."
        )
    return None, []


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
