"""The card of the plain checkpoint: stage by stage, what its training was and came to."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_ROWS = 10
_COLUMNS = {
    "plain": {"loss": "loss", "batch_hit": "hit in the batch", "cosine": "cosine", "gap": "gap", "sharpness": "factor"},
    "unet": {"loss": "loss", "v_error": "error of v", "v_error_noisiest": "of the noisiest quarter", "rate": "rate"},
}


def condensed(metrics: Iterable[str]) -> dict[str, Any]:
    """A few lines of each stage from a training's metrics: the first, the last, and some between them.

    The latest run of a stage counts, if it began anew.

    Args:
        metrics: lines of the training's metrics.jsonl.
    """
    lines = [json.loads(line) for line in metrics]
    found = {}
    for stage in _COLUMNS:
        own = [line for line in lines if line.get("stage") == stage and "loss" in line]
        starts = [n for n, line in enumerate(own) if n == 0 or line["step"] <= own[n - 1]["step"]]
        own = own[starts[-1] :] if starts else []
        found[stage] = [own[round(n * (len(own) - 1) / (_ROWS - 1))] for n in range(_ROWS)] if own else []
    return {"stages": found}


def _stage(lines: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    rows = ["| update | minutes | " + " | ".join(columns.values()) + " |", "|---|---|" + "---|" * len(columns)]
    for line in lines:
        values = (f"{line[name]:.3g}" if name in line else "-" for name in columns)
        rows.append(f"| {line['step']} | {line['minutes']:.1f} | " + " | ".join(values) + " |")
    return "\n".join(rows)


def written(training: Mapping[str, Any], spaces: Mapping[str, Any]) -> str:
    """The card."""
    stages = training["stages"]
    clip, unet = stages["plain"][-1], stages["unet"][-1]
    retrieval = spaces["tables"]["retrieval"]["rows"]["C-space"]["R@1"]["value"]
    return _CARD.format(
        clip=_stage(stages["plain"], _COLUMNS["plain"]),
        clip_updates=clip["step"],
        clip_minutes=clip["minutes"],
        unet=_stage(stages["unet"], _COLUMNS["unet"]),
        unet_updates=unet["step"],
        unet_minutes=unet["minutes"],
        gap=spaces["gap"]["distance of the means"],
        recall=retrieval,
        stopped="" if unet["rate"] < 0.01 * max(line["rate"] for line in stages["unet"]) else _STOPPED,
    )


_STOPPED = """ The rate had
not come down yet when these weights, the average of the last updates, were taken; the same command goes on from
there."""
_CARD = """# The plain checkpoint

A small CLIP and UNet so that the paper's claims can fail on it: `configs/plain.yaml`. Its CLIP's training knows
nothing of the closed form, and its UNet learns from captions alone. It does not ship and lies in no repository; the
commands make it.

```sh
python scripts/build_corpus.py
python scripts/train_embedded.py configs/plain.yaml                  # all stages, each where it stopped
python scripts/train_embedded.py configs/plain.yaml --stage export   # build/plain, at any time
```

The corpus, its splits, the tokenizer and the VAE are those of [the checkpoint that
ships](../../sdipc_jax/embedded/README.md). This page is written by `python scripts/measure_claims.py pages`, from what
`python scripts/measure_claims.py training build/train-plain` took of the training's metrics.

## CLIP

Both towers at once, from ordinary random weights: vision 32 px in patches of 8, three layers of 128; text two layers of
128; projections of normal numbers, so that the text projection's singular values go down to near 0. The loss is the
symmetric contrastive one, in which a picture has one right caption and the end token alone is read: no agreement term,
no loss in T-space, nothing orthogonal. Batches of 64, and a factor of the cosines that begins at 100: with one that
begins at 1 / 0.07 and batches of 128 the gap had closed to 0.28 after 306 updates.

On two cores that other programs shared, {clip_minutes:.0f} minutes by the clock, {clip_updates} updates:

{clip}

The gap is the distance of the means of a batch's pictures and captions. On held-out drawings it is {gap:.3f}
([tables](spaces.md)); OpenAI's CLIP is said to have one of about 0.8. Retrieval is weak (R@1 {recall:.3f}, where the
shipped checkpoint has 0.643): few updates and a plain tower.

## UNet

Captions alone, whole: no end token told alone, nothing moved between captions. From scratch it would take hours on two
cores; so **all of it but the cross-attention's keys and values begins as the UNet that ships**, which had been trained
with both, and these begin as random matrices. Its queries and convolutions are thus not innocent of the method; how
texts are read is learnt anew, from captions, under the plain text tower.

{unet_minutes:.0f} minutes by the clock on the same cores, {unet_updates} updates of 32 captioned drawings.{stopped}

{unet}

CLIP's stage must not be trained further without the UNet's: it reads its text states.
"""
