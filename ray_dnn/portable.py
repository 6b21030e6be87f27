"""Exceptions that travel between processes."""

from __future__ import annotations

import ray.cloudpickle


def portable(error: Exception) -> Exception:
    """The exception, or where it cannot be pickled and read again, one that says the same."""
    try:
        ray.cloudpickle.loads(ray.cloudpickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
