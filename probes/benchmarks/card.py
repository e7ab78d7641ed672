"""The card of the benchmarks, written from their declarations: ``python -m probes.benchmarks.card`` rewrites ``README.md``."""

from __future__ import annotations

from pathlib import Path

from vlm_core.images import FORMATS, MAX_PIXELS
from vlm_core.scoring import SCORERS

from .declaration import Benchmark
from .registry import BENCHMARKS

__all__ = ["PATH", "text", "write"]

PATH = Path(__file__).with_name("README.md")

TEXT = """# Benchmarks

Written by `python -m probes.benchmarks.card` from the declarations beside it.

```python
from probes.benchmarks import load

items = load("pope", n=300)                                    # from the Hub, 300 items by a hash of their ids; kept on disk
items = load("gqa", source="downloads/GQA")                    # the same from files here, no network
items = load("local", source="mine.jsonl", columns={{"image": "file", "prompt": "ask", "answer": "truth"}})
```

An item has `id, scene_id` (the picture), `task, image, prompt, answer, references` (all accepted answers), `scorer` (how free answers are
scored, see below), and `candidates` where there are options: their letters, yes and no, or what may be in the picture. `n` items are those
of the lowest SHA-256 of `(seed, id)`, whatever the order of the set. Rows are streamed, of Parquet only the ids are read to choose; what
was loaded is kept in `$VLM_CLAIMS_CACHE/benchmarks` (default `~/.cache/vlm-claims/benchmarks`). Where an id on the Hub is not there, the
next one is tried.

Nothing of these sets is part of this repository; each has its own licence. Pictures are decoded within limits ({pixels} pixels;
{formats}), and paths in data cannot leave its folder.

| name | on the Hub, next | configuration, split | scorer | options | licence |
|---|---|---|---|---|---|
{table}

`local` reads a folder of pictures (by class, or with `metadata.jsonl`), Parquet, JSON lines or CSV.

## What is verified

Nothing was downloaded to write these declarations: they rest on cards, on loading scripts and on evaluation code that are public.

{verified}

## Scorers

| name | definition |
|---|---|
{scorers}

## Citations

{citations}
"""


def text() -> str:
    """The card."""
    every = BENCHMARKS.values()
    return TEXT.format(
        pixels=f"{MAX_PIXELS:,}",
        formats=", ".join(FORMATS),
        table="\n".join(map(_row, every)),
        verified="\n".join(f"* **{one.name}**: {one.verified}." for one in every),
        scorers="\n".join(f"| {name} | {scorer.source} |" for name, scorer in sorted(SCORERS.items())),
        citations="\n".join(f"* **{one.name}**: {one.citation}." for one in every),
    )


def _row(one: Benchmark) -> str:
    ids = ", ".join(f"`{name}`" for name in one.ids) or "files of COCO"
    where = ", ".join(filter(None, (one.config, one.split)))
    return f"| {one.name} | {ids} | {where} | {one.scorer} | {'yes' if one.candidates else ''} | {one.licence} |"


def write(path: Path = PATH) -> str:
    """Write the card and return its text."""
    path.write_text(text(), encoding="utf-8")
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(write())
