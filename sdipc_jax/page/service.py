"""What the page and the API do with a request: check it, keep its files, queue it, tell of it."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sdipc_jax.errors import InputError
from sdipc_jax.page.folder import Folder
from sdipc_jax.page.queue import Job, Queue
from sdipc_jax.page.requests import FUNCTIONS, Function
from sdipc_jax.page.settings import PageSettings
from sdipc_jax.page.typed import as_typed
from sdipc_jax.records import Record, Report
from sdipc_jax.settings import SamplingSettings


@dataclass(frozen=True)
class Commands:
    """What stands behind the page.

    Attributes:
        kinds: each function's settings.
        run: does what settings of one of these kinds ask for, and gives what the command would print as JSON.
        check_size: refuses a height and width that are not offered.
        sizes: those that are, (height, width), the checkpoint's own first.
        title: what the checkpoint is called.
        remarks: what a person should know of it.
        steps, guidance_scale: what counts where a request says nothing.
    """

    kinds: Mapping[str, type[SamplingSettings]]
    run: Callable[[str, SamplingSettings, Report], Record]
    check_size: Callable[[int, int], None]
    sizes: Sequence[tuple[int, int]]
    title: str
    remarks: Sequence[str]
    steps: int
    guidance_scale: float


@dataclass(frozen=True, eq=False)
class Ticket:
    """A request that was taken.

    Attributes:
        name: that nobody guesses.
        number: since the page began.
        command: what makes the same pictures on the command line.
        inputs: its pictures' files, in the request's folder.
        failures: the files that cannot be used.
    """

    name: str
    number: int
    function: str
    command: str
    inputs: tuple[str, ...]
    failures: tuple[Record, ...]
    job: Job


class Service:
    """Takes requests from any thread, and tells of them."""

    def __init__(self, commands: Commands, settings: PageSettings, queue: Queue, folder: Folder) -> None:
        self.commands, self.settings, self.queue, self.folder = commands, settings, queue, folder
        self.loaded = False
        self.taken = 0
        self._numbers = count(1)
        self._tickets: OrderedDict[str, Ticket] = OrderedDict()

    @property
    def ready(self) -> bool:
        """Whether a request would be taken and begun."""
        return self.loaded and self.queue.has_room

    def take(
        self,
        put: Callable[[Job], None],
        function: str,
        files: Sequence[tuple[str, bytes]],
        values: Mapping[str, Any],
    ) -> Ticket:
        """Checks a request and puts it into its place in the queue.

        Args:
            put: what the queue's `place` has yielded.
            files: names and bytes.
            values: of `function`'s request.

        Raises:
            InputError: with what is wrong, in the words of the command line.
        """
        row = FUNCTIONS[function]
        asked = row.request(**values)
        if asked.height is not None and asked.width is not None:
            self.commands.check_size(asked.height, asked.width)
        row.check_count(len(files))
        name = self.folder.new()
        try:
            paths, failures = self.folder.receive(name, files)
            _check_failures(row, paths, failures)
            kind, place = self.commands.kinds[function], self.folder.place(name)
            settings = row.settings(kind, self.settings, asked, paths).model_copy(update={"output_dir": place})
        except BaseException:
            self.folder.remove(name)
            raise

        def without_place(text: str) -> str:
            # Where the server keeps things is nobody's business.
            return text.replace(f"{place}/inputs/", "")

        def work(report: Report) -> Record:
            try:
                found = self.commands.run(function, settings, report)
            except InputError as error:
                raise InputError(without_place(str(error))) from None
            return found | {"notes": [without_place(note) for note in found["notes"]]}

        self.taken = number = next(self._numbers)
        job = Job(work)
        inputs = tuple(path.relative_to(place).as_posix() for path in paths)
        ticket = Ticket(name, number, function, as_typed(function, settings), inputs, tuple(failures), job)
        self._tickets[name] = ticket
        while len(self._tickets) > self.folder.kept:
            self._tickets.popitem(last=False)
        put(job)
        return ticket

    def find(self, name: str) -> Ticket | None:
        """A request that is kept."""
        return self._tickets.get(name)

    def picture(self, name: str, file: str) -> Path | None:
        """A file of a request that is kept."""
        return self.folder.find(name, file)

    def tell(self, ticket: Ticket) -> Record:
        """A request as the API has it."""
        job = ticket.job
        state, error = job.state, job.error
        pictures = [
            {"url": f"/api/requests/{ticket.name}/{quote(record['file'])}", "record": record}
            for record in self.folder.records(ticket.name)
        ]
        return {
            "id": ticket.name,
            "function": ticket.function,
            "state": state,
            "ahead": self.queue.ahead(job) if state == "waiting" else 0,
            "done": round(job.done, 3),
            "error": error,
            "command": ticket.command,
            "pictures": pictures,
            "failures": [*ticket.failures, *job.outcome.get("failures", ())],
            "notes": list(job.outcome.get("notes", ())),
        }


def _check_failures(row: Function, paths: Sequence[Path], failures: Sequence[Record]) -> None:
    """Refuses pictures of which none, or not all that are needed, can be used."""
    if failures and (row.whole or not paths):
        raise InputError(failures[0]["error"])
