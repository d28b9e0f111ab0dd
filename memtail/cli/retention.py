"""Commands that free space in a store: `remove`, `archive` and `gc`. Each shows what it removes, and asks for confirmation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from memtail.cli.arguments import DEFAULT_STORE, Store, open_existing

if TYPE_CHECKING:
    from memtail.storage import Stored

OneName = Annotated[str, typer.Argument(help="The experiment.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")]


def remove(name: OneName, yes: Yes = False, store: Store = DEFAULT_STORE) -> None:
    """Remove an experiment that is not running, with its scores."""
    from memtail.execution import retention

    opened = open_existing(store)
    planned = retention.planned_removal(opened, name)
    _show(planned)
    _confirm(f"remove experiment {name} from {opened.address}?", yes)
    retention.remove(opened, name, planned)
    print(f"{name} is removed; its dataset stays until memtail gc")


def archive(name: OneName, yes: Yes = False, store: Store = DEFAULT_STORE) -> None:
    """Remove the trial batches of a finished experiment. Scores, report and record stay; more trials would train all again."""
    from memtail.execution import retention
    from memtail.experiment_store import record_action

    opened = open_existing(store)
    planned = retention.planned_archival(opened, name)
    _show(planned)
    _confirm(f"archive experiment {name} in {opened.address}? It can then be extended only by training all trials again", yes)
    retention.archive(opened, name, planned)
    record_action(opened, name, "archive", f"{len(planned)} object{'s' if len(planned) != 1 else ''} removed")
    print(f"{name} is archived: scores and report stay")


def gc(
    older_than: Annotated[float, typer.Option(help="Keep what was written in the last hours.", metavar="HOURS", min=0)] = 24.0,
    yes: Yes = False,
    store: Store = DEFAULT_STORE,
) -> None:
    """Remove datasets, masks and weights that no experiment needs, and checkpoints that no shard continues from."""
    from memtail.execution import retention

    opened = open_existing(store)
    planned = retention.planned_collection(opened, 3600 * older_than)
    if not planned:
        print(f"nothing to remove from {opened.address}")
        return
    _show(planned)
    _confirm(f"remove them from {opened.address}?", yes)
    retention.collect(opened, planned)
    print("removed")


def _show(planned: "Sequence[Stored]") -> None:
    """Print number and size of the objects by kind."""
    from rich.filesize import decimal

    from memtail.execution.retention import kind_of

    sizes: dict[str, list[int]] = {}
    for each in planned:
        sizes.setdefault(kind_of(each.key), []).append(each.bytes)
    for kind, of_kind in {**sizes, "total": [each.bytes for each in planned]}.items():
        print(f"{kind:<15} {len(of_kind):>8} object{'s' if len(of_kind) != 1 else ' '} {decimal(sum(of_kind)):>12}")


def _confirm(question: str, yes: bool) -> None:
    if not yes:
        typer.confirm(question, abort=True)


def register(app: typer.Typer) -> None:
    """Add these commands to an application."""
    for command in (remove, archive, gc):
        app.command()(command)
