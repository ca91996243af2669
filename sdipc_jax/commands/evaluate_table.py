"""`sdipc evaluate TABLE CONFIG.yaml`: the paper's tables on its data sets, with its numbers beside ours."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdipc_jax.batch.sampler import Sampler
from sdipc_jax.checkpoints.bundle import Config
from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.checkpoints.load import configure
from sdipc_jax.checkpoints.text_tower import load_text_tower
from sdipc_jax.commands.evaluate_pictures import Generation, MakeDevice, delta_of
from sdipc_jax.errors import InputError, printable
from sdipc_jax.evaluate import judges, paper
from sdipc_jax.evaluate.encoding import encode_files
from sdipc_jax.evaluate.layouts import Sample, read_layout
from sdipc_jax.evaluate.retrieval import end_states, joint_vectors, text_projection
from sdipc_jax.evaluate.scores import Cells, classified, in_percent, retrieved
from sdipc_jax.evaluate.settings import EvaluateSettings
from sdipc_jax.evaluate.table_settings import TableSettings, read_table
from sdipc_jax.evaluate.tables import Table
from sdipc_jax.files import check_result, check_writable, write_atomically
from sdipc_jax.prompts.converter import Converter
from sdipc_jax.prompts.plan import plan_conversion
from sdipc_jax.prompts.projection import convert, truncated_pinv
from sdipc_jax.records import Record, Report, digest_of
from sdipc_jax.sampling.request import decide


@dataclass(frozen=True)
class Tables:
    """Tables, and what they belong to.

    Attributes:
        record: every setting, and digests of checkpoint and data.
        files: what was written.
    """

    tables: list[Table]
    record: Record
    files: list[Path]

    def to_json(self) -> Record:
        """What `--json` prints."""
        tables = {table.name: table.to_json() for table in self.tables}
        return self.record | {"tables": tables, "files": [str(path) for path in self.files]}

    def to_markdown(self) -> str:
        """The tables for people."""
        return "\n\n".join(table.to_markdown() for table in self.tables) + "\n"

    def __str__(self) -> str:
        return self.to_markdown() + "\nSee " + ", ".join(map(str, self.files))


def evaluate_table(settings: EvaluateSettings, report: Report, make_device: MakeDevice = Sampler.make) -> Tables:
    """Makes what is missing of a table's pictures, and judges them.

    Args:
        make_device: makes what samples, for `batch`.
    """
    assert settings.table is not None
    assert settings.config is not None
    wanted = read_table(settings.config)
    config = configure(wanted)
    plan_conversion(config, wanted)
    decide(config, wanted)
    samples = thinned(read_layout(wanted.data), wanted.data.count)
    judges.check_weights(clip=wanted.clip_judge, dino=wanted.dino, inception=wanted.inception)
    for name, delta in wanted.methods.items():
        for path in dict.fromkeys(delta_of(delta, sample) for sample in samples):
            if path is not None and not path.is_file():
                raise InputError(
                    f"{printable(path)}: not there, expected the delta of {name!r}, which `sdipc tune` makes: tune "
                    "first, or leave the method out"
                )
    folder = settings.folder
    result, option = settings.result
    check_result(result, option, settings.overwrite)
    check_writable(folder)
    if settings.table == "spaces":
        tables = [spaces(config, wanted, samples, folder, report)]
    else:
        tables = Generation(config, wanted, samples, folder, report, make_device).tables(settings.table)
    record: Record = {
        "table": settings.table,
        "settings": wanted.model_dump(mode="json", by_alias=False),
        "values": decide(config, wanted).model_dump(mode="json"),
        "checkpoint": digests(config, wanted.tuned),
        "data_sha256": digest_of([[str(each.path.name), each.label, *each.texts] for each in samples]),
        "pictures": len(samples),
    }
    files = [result, *(result.with_suffix(ending) for ending in (".md", ".tex"))]
    found = Tables(tables, record, files)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(files[1], found.to_markdown().encode())
    write_atomically(files[2], ("\n\n".join(table.to_latex() for table in tables) + "\n").encode())
    # Last: a run that was stopped leaves nothing that looks whole.
    write_atomically(result, (json.dumps(found.to_json(), indent=2) + "\n").encode())
    report(1.0)
    return found


def thinned(samples: list[Sample], count: int | None) -> list[Sample]:
    """As many of them, evenly over all.

    >>> thinned([1, 2, 3, 4, 5], 2), thinned([1, 2], None)
    ([1, 3], [1, 2])
    """
    if count is None or count >= len(samples):
        return samples
    return [samples[place * len(samples) // count] for place in range(count)]


def spaces(config: Config, settings: TableSettings, samples: list[Sample], folder: Path, report: Report) -> Table:
    """Table 1: nothing is generated."""
    found = None if settings.retrieval is None else read_layout(settings.retrieval)
    pool = None if found is None else thinned(found, settings.retrieval.count if settings.retrieval else None)
    pool = pool if pool is None or settings.pool is None else pool[: settings.pool]
    if pool is not None and not all(each.texts for each in pool):
        raise InputError("found no captions in retrieval, expected a data set with some, such as COCO's: name another")
    converter = Converter(config, settings)
    bundle, projection = converter.bundle, converter.projection
    tower = None if config.inverse_reaches else load_text_tower(config)
    identity = digests(config, settings.tuned)
    share = len(samples) / (len(samples) + len(pool or ()))

    def encode(part: Sequence[Sample], first: float, last: float) -> Any:
        return encode_files(
            bundle,
            [each.path for each in part],
            keep=folder / "features",
            identity=[identity, settings.fit],
            report=lambda done: report(0.99 * (first + (last - first) * done)),
        )

    visual = np.asarray(projection.visual)
    raw = np.asarray(truncated_pinv(text_projection(bundle), 0.0)) if config.inverse_reaches else None

    def by_space(features: Any, texts: list[str]) -> dict[str, tuple[Any, Any]]:
        joint, states = features @ visual, end_states(bundle, texts)
        pairs = {"C-space": (joint, joint_vectors(bundle, texts, tower))}
        pairs["T-space"] = np.asarray(convert(projection, features)), states
        return pairs if raw is None else pairs | {"T-space, raw inverse": (joint @ raw, states)}

    rows: dict[str, Cells] = {}
    classes = sorted({each.label: each.name for each in samples}.items())
    truth = np.searchsorted([label for label, _ in classes], [each.label for each in samples])
    texts = [settings.template.replace("{}", name) for _, name in classes]
    for name, pair in by_space(encode(samples, 0, share), texts).items():
        rows[name] = in_percent([classified(*pair, truth)])
    note = f"{len(samples)} pictures of {len(classes)} classes, each called {settings.template!r}. "
    if pool is not None:
        owner = np.repeat(np.arange(len(pool)), [len(each.texts) for each in pool])
        captions = [text for each in pool for text in each.texts]
        for name, pair in by_space(encode(pool, share, 1), captions).items():
            rows[name] |= in_percent(retrieved(*pair, owner))
        note += f"Retrieval among {len(pool)} pictures with {len(captions)} captions. "
    kept, values = int(projection.rank), len(np.asarray(projection.singular_values))
    note += f"T-space keeps {kept} of {values} directions. Percent, 95% bootstrap intervals over pictures."
    columns = paper.SPACES.columns if pool is not None else paper.SPACES.columns[:2]
    return paper.beside(paper.SPACES, columns, rows, note)
