"""The command line: ``ray-dnn``, or ``python -m ray_dnn``."""

from __future__ import annotations

import contextlib
import json
import math
import runpy
import sys
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Look at runs of ray_dnn."""


@app.command("replay", context_settings={"allow_interspersed_args": False})
def replay_command(
    step: Annotated[int, typer.Argument(min=0, help="The step, from 0.")],
    script: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The script that trains.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="The script's own, as when it trained.")] = None,
    look: Annotated[
        str | None,
        typer.Option(metavar="FILE:FUNCTION", help="Call this with each contribution, and print what it returns."),
    ] = None,
    activations: Annotated[
        list[str] | None, typer.Option(help="Modules whose activations the function wants; * stands for anything.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run a past step of a run again, from the nearest checkpoint, and look at it.

    The script is run as when it trained, with the storage and the name of the run; where it would train, the step is
    run again instead, and the script ends. Exits with 0 if all is as it is on record, with 1 if it is not.

    Example: ray-dnn replay 412 train.py --storage s3://bucket/runs --name mnist
    """
    from ray_dnn import trainer

    function = _function(look) if look else None
    out = sys.stdout

    def instead(job: trainer.Trainer) -> NoReturn:
        again = job.replay(step, function, activations or ())
        if as_json:
            print(json.dumps(_plain(vars(again))), file=out)
        else:
            _print(again)
        raise SystemExit(1 if again.differences else 0)  # which scripts do not catch

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        _run(script, arguments or [], instead)
    typer.echo(f"{script} has ended, and never called fit() or start() of a Trainer.", err=True)
    raise typer.Exit(2)


def _run(script: Path, arguments: list[str], instead: Callable[[Any], NoReturn]) -> None:
    """Run a script as Python does, but for one thing that is done ``instead`` of training."""
    from ray.train import TrainingFailedError

    from ray_dnn import trainer
    from ray_dnn.errors import RayDnnError

    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    trainer.instead = instead
    try:
        runpy.run_path(str(script), run_name="__main__")
    except (RayDnnError, TrainingFailedError) as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2) from error
    finally:
        trainer.instead = None


def _function(named: str) -> Callable[[Any], Any]:
    """The function that FILE:FUNCTION names. It is sent to the agents by value."""
    file, _, name = named.rpartition(":")
    if not Path(file).is_file():
        raise typer.BadParameter(f"{named!r}: {file!r} is no file. Give FILE.py:FUNCTION.", param_hint="--look")
    function = runpy.run_path(file).get(name)
    if not callable(function):
        raise typer.BadParameter(f"{named!r}: {file} has no function {name!r}.", param_hint="--look")
    return function  # type: ignore[no-any-return]


def _print(again: Any) -> None:
    from ray_dnn.replay import Summary

    print(f"\n{again.text()}\n")
    print(", ".join(f"{name} {value:.6g}" for name, value in again.metrics.items()))
    for seen in again.seen:
        if not isinstance(seen, Summary):
            print(seen)
            continue
        metrics = ", ".join(f"{name} {value:.6g}" for name, value in seen.metrics.items())
        rows = ", ".join(map(str, seen.row_ids[:6])) + (", …" if len(seen.row_ids) > 6 else "")
        print(f"  virtual worker {seen.worker}, {seen.phase}: {metrics}; {len(seen.row_ids)} rows ({rows})")
        print(f"    gradient: norm {seen.norm:.6g}, most of it in {seen.largest}")
    if again.checkpoint is not None:
        print(f"the state after the step: {again.checkpoint.path}")


def _plain(value: Any) -> Any:
    """What JSON has a form for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bool | int | str | None):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(vars(value))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(getattr(value, "path", value))
