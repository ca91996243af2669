"""The command `evaluate`: how good a checkpoint is, as tables and sheets."""

import json

import numpy as np

from sdipc_jax.checkpoints.digests import digests
from sdipc_jax.checkpoints.load import configure
from sdipc_jax.checkpoints.text_tower import load_text_tower
from sdipc_jax.commands.evaluate_table import Tables, evaluate_table
from sdipc_jax.errors import InputError
from sdipc_jax.evaluate import editing, pictures, retrieval
from sdipc_jax.evaluate.backbone import load_backbone
from sdipc_jax.evaluate.corpus import load_corpus
from sdipc_jax.evaluate.sampling import Sampler
from sdipc_jax.evaluate.settings import EvaluateSettings
from sdipc_jax.files import check_result, write_atomically
from sdipc_jax.pictures.sheets import contact_sheet, save_png
from sdipc_jax.prompts.contexts import image_prompt
from sdipc_jax.prompts.converter import Converter
from sdipc_jax.prompts.plan import plan_conversion
from sdipc_jax.prompts.projection import convert
from sdipc_jax.records import Report
from sdipc_jax.samplers import SAMPLERS, chosen_sampler

_SHEET_PICTURES, _SHEET_VARIATIONS = 10, 6
_FULL_COUNT, _FULL_SEEDS = 256, 3
# One edited picture of each kind for so many pictures under test, but enough for an interval.
_PICTURES_PER_EDITED, _FEWEST_EDITED = 16, 4


def evaluate(settings: EvaluateSettings, report: Report) -> Tables:
    """Measures a checkpoint, and writes tables, sheets and a plot; or one of the paper's tables on real data."""
    return measure(settings, report) if settings.config is None else evaluate_table(settings, report)


def measure(settings: EvaluateSettings, report: Report) -> Tables:
    """Measures a checkpoint on the drawings of a corpus."""
    config = configure(settings)
    plan_conversion(config, settings)
    defaults = config.defaults
    name = chosen_sampler(config.scheduler, settings.sampler or defaults.sampler)
    SAMPLERS[name].schedule(config.scheduler, settings.steps or defaults.steps)
    result, option = settings.result
    check_result(result, option, settings.overwrite)
    corpus = load_corpus(settings.corpus)

    known, held = corpus.known, corpus.held_out(settings.split)
    if len(held) < 4:
        raise InputError(
            f"{settings.corpus} has {len(held)} pictures of the split {settings.split!r}, expected at least 4: "
            "build the corpus again with scripts/build_corpus.py"
        )
    count = min(max(settings.count, _FULL_COUNT) if settings.full else settings.count, len(held))
    repeats = max(settings.seeds, _FULL_SEEDS) if settings.full else settings.seeds
    seeds = [(settings.seed + n) % 2**32 for n in range(repeats)]
    chosen = pictures.choose(held, count)
    edited = max(_FEWEST_EDITED, count // _PICTURES_PER_EDITED)
    edits = [(edit, editing.choose_for(edit, held, edited)) for edit in editing.EDITS]
    edits = [(edit, rows) for edit, rows in edits if len(rows) > 1]
    _, first = np.unique(held.base[chosen], return_index=True)
    on_sheet = chosen[np.sort(first)][:_SHEET_PICTURES]

    expected = count * len(pictures.kinds_of_prompt(settings.full)) * repeats
    expected += sum(len(rows) for _, rows in edits) * len(editing.ALPHAS) * repeats + len(on_sheet) * _SHEET_VARIATIONS
    converter = Converter(config, settings)
    bundle, projection = converter.bundle, converter.projection
    options = {name: getattr(settings, name) for name in ("steps", "guidance_scale", "sampler")}
    sampler = Sampler(bundle, options, settings.batch_size, expected, report)
    backbones = pictures.Backbones(bundle, load_backbone())

    # Captions are compared in the joint space: as images of the states that the UNet reads, if these lead there.
    tower = None if config.inverse_reaches else load_text_tower(config)
    captions = retrieval.encode_captions(bundle, known, tower)
    measured = pictures.measure_pictures(
        bundle, projection, backbones, sampler, held, chosen, seeds, styled=settings.full
    )
    sweeps = [editing.sweep(bundle, projection, sampler, held, rows, edit, seeds, tower) for edit, rows in edits]
    tables = [
        retrieval.retrieval_table(bundle, projection, captions, held, measured.held[pictures.OWN]),
        pictures.recognition_table(projection, captions, held, measured),
        pictures.similarity_table(backbones, measured),
        *([editing.editing_table(sweeps, repeats)] if sweeps else []),
    ]

    context = image_prompt(bundle, convert(projection, measured.held[pictures.OWN][on_sheet]))
    variations = sampler(
        context[np.repeat(np.arange(len(on_sheet)), _SHEET_VARIATIONS)],
        settings.seed,
        np.tile(np.arange(_SHEET_VARIATIONS), len(on_sheet)),
    )
    rows = [
        [held.pictures[place], *variations[n * _SHEET_VARIATIONS : (n + 1) * _SHEET_VARIATIONS]]
        for n, place in enumerate(on_sheet)
    ]
    folder = settings.folder
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "evaluation.md", folder / "variations.png"]
    save_png(files[1], np.asarray(contact_sheet(rows, held.caption[on_sheet].tolist(), cell=128)), {})
    if sweeps:
        files += [folder / "editing-sheet.png", folder / "editing.png"]
        shown = [row for each in sweeps for row in each.rows], [label for each in sweeps for label in each.labels]
        save_png(files[2], np.asarray(contact_sheet(*shown, cell=128)), {})
        editing.plot_editing(sweeps, files[3])
    left_out = {"json_", "quiet", "overwrite", "output_dir"}
    record = {
        "settings": settings.model_dump(mode="json", by_alias=False, exclude=left_out)
        | {"count": count, "seeds": repeats}
        | {name: getattr(defaults, name) for name, value in options.items() if value is None}
        | {name: getattr(defaults, name) for name in ("guidance_interval", "cache_interval")},
        "checkpoint": digests(config, settings.tuned),
        "corpus": corpus.manifest.get("sha256"),
        "backbones": list(backbones.names),
    }
    evaluation = Tables(tables, record, [result, *files])
    write_atomically(files[0], evaluation.to_markdown().encode())
    # Last: a run that was stopped leaves nothing that looks whole.
    write_atomically(result, (json.dumps(evaluation.to_json(), indent=2) + "\n").encode())
    report(1.0)
    return evaluation
