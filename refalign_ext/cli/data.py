"""`python -m refalign_ext data ...`: from downloads or a folder of clips to what training reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from refalign_ext.cli.data_convert import convert
from refalign_ext.cli.data_options import (
    EXISTING,
    PATH,
    SHOW_DEFAULTS,
    beside,
    is_helper,
    length_options,
    named_png,
    share_option,
    start_together,
    tell,
    workers_option,
)
from refalign_ext.cli.settings import read_settings

if TYPE_CHECKING:
    from refalign_ext.data.length import Length
    from refalign_ext.data.pieces import Share


@click.group()
def data() -> None:
    """Convert, check, cut, cache and describe training data.

    A folder of clips becomes a manifest with `convert`, is looked through with `check` and `stats`, and trained on with
    `train_refalign.py --data MANIFEST`. docs/data.md has the formats and walks through an example.
    """


data.add_command(convert)


@data.command(context_settings=SHOW_DEFAULTS)
@click.argument("clips", type=EXISTING)
@click.option("--out", type=PATH, required=True, help="Folder to write.")
@click.option("--pack", is_flag=True, help="Write tar shards with everything in them (webdataset layout).")
@click.option("--shard_size", type=click.IntRange(1), default=256, help="Clips of a tar shard.")
@click.option("--copy", is_flag=True, help="Copy videos instead of linking them, for another file system.")
@workers_option(2)
@share_option
def materialise(
    clips: Path, out: Path, pack: bool, shard_size: int, copy: bool, workers: int, share: Share
) -> None:
    """Cut the references of the manifest CLIPS once and for all; optionally pack everything into tar shards."""
    from refalign_ext.data.materialise.run import materialise as cut

    report = cut(clips, out, pack=pack, shard_size=shard_size, copy=copy, share=share, workers=workers)
    tell(report, out)


@data.command(context_settings=SHOW_DEFAULTS)
@click.argument("clips", type=EXISTING)
@click.option(
    "--decode", type=click.Choice(["ends", "all", "none"]), default="ends", help="Which frames are decoded."
)
@length_options
@click.option("--max_errors", type=click.IntRange(0), help="Stop once there are more.")
@click.option("--sheet", type=PATH, help="Contact sheet to write; without it CLIPS.check.png.")
@click.option("--samples", type=click.IntRange(0), default=8, help="Clips on the contact sheet; 0: no sheet.")
@click.option("--seed", type=int, default=0, help="Which clips the contact sheet shows.")
@workers_option(2)
@share_option
def check(
    clips: Path,
    decode: str,
    length: Length | None,
    max_errors: int | None,
    sheet: Path | None,
    samples: int,
    seed: int,
    workers: int,
    share: Share,
) -> None:
    """Check every row of the manifest or packed folder CLIPS; exit code 2 if there are errors."""
    from refalign_ext.atomic_io import atomic_open
    from refalign_ext.data.check.run import check as look
    from refalign_ext.data.clip_set import open_clip_set
    from refalign_ext.data.sheets.contact import contact_sheet

    sheet = named_png("--sheet", sheet, beside(clips, ".check.png"))
    finished = start_together()
    result = look(clips, workers=workers, share=share, decode=decode, length=length, max_errors=max_errors)
    click.echo(result.table())
    if samples and not share.index:
        page = contact_sheet(open_clip_set(clips), samples=samples, seed=seed)
        with atomic_open(sheet) as file:
            page.save(file, format="PNG")
        click.echo(f"contact sheet: {sheet}")
    finished()
    if result.errors:
        click.get_current_context().exit(2)


@data.command(context_settings=SHOW_DEFAULTS)
@click.argument("clips", type=EXISTING)
@click.option(
    "--out", type=PATH, help="Plot to write, and the figures beside it as .json; without it CLIPS.stats.png."
)
@length_options
@click.option(
    "--measure/--no_measure", default=True, help="Open videos whose row does not tell length and size."
)
@workers_option(2)
def stats(
    clips: Path,
    out: Path | None,
    length: Length | None,
    measure: bool,
    workers: int,
) -> None:
    """Count clips, lengths, sizes, references and pairs of the manifest or packed folder CLIPS: a table and a plot."""
    from refalign_ext.atomic_io import atomic_open
    from refalign_ext.data.statistics.plot import plot_stats
    from refalign_ext.data.statistics.stats import DEFAULT_LENGTHS, collect_stats
    from refalign_ext.data.statistics.table import stats_table

    if is_helper():
        return
    out = named_png("--out", out, beside(clips, ".stats.png"))
    lengths = DEFAULT_LENGTHS if length is None else (length,)
    found = collect_stats(clips, lengths=lengths, workers=workers, measure=measure)
    click.echo(stats_table(found))
    plot_stats(found, out)
    with atomic_open(out.with_suffix(".json")) as file:
        file.write(found.to_json().encode())
    click.echo(f"wrote {out} and {out.with_suffix('.json').name}")


@data.command(context_settings={**SHOW_DEFAULTS, "ignore_unknown_options": True})
@click.option("--out", type=PATH, help="Folder to write; without it where training looks, beside the data.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="bfloat16 is half the size.",
)
@click.option(
    "--chunk_rows",
    type=click.IntRange(1),
    default=32,
    help="Clips of a file; a killed run loses one at most.",
)
@click.option("--retry_failed", is_flag=True, help="Try clips again that could not be read.")
@click.option("--device", default="auto", help="cpu, cuda, mps or auto; under torchrun one for each rank.")
@workers_option(2)
@share_option
@click.argument("settings", nargs=-1, type=click.UNPROCESSED)
def cache(
    out: Path | None,
    dtype: str,
    chunk_rows: int,
    retry_failed: bool,
    device: str,
    workers: int,
    share: Share,
    settings: tuple[str, ...],
) -> None:
    """Run the VAE, text encoder and teacher over a data set once, so that training does not have to.

    SETTINGS are those of the training that it is for, as train_refalign.py takes them: --data (one set), --recipe,
    --task, --ckpt_dir, --sampling.clip_variants and so on; without the last, one stretch of every clip is kept.
    """
    from refalign_ext.backbone import resolve_device
    from refalign_ext.config import configure
    from refalign_ext.data.cache.build import build_cache
    from refalign_ext.data.cache.files import chunk_path, default_folder, read_header
    from refalign_ext.distributed.process_group import rank_device
    from refalign_ext.encoders import task_config
    from refalign_ext.training.clip_data import sampling_of

    given = read_settings(settings)
    given.setdefault("sampling.clip_variants", 1)
    config = configure(given.pop("recipe", None), given | {"cache": "off"})
    if config.data is None or "," in config.data:
        raise ValueError("--data MANIFEST: name the set to cache (one; several have a cache each)")
    is_found = out is None
    out = out or default_folder(Path(config.data))
    summary = build_cache(
        config,
        config.data,
        out,
        sampling=sampling_of(config, task_config(config)),
        device=resolve_device(rank_device(device)),
        share=share,
        workers=workers,
        dtype=dtype,
        chunk_rows=chunk_rows,
        retry_failed=retry_failed,
    )
    click.echo(
        f"{out}: {summary.rows:,} clips in {summary.made + summary.kept:,} chunks ({summary.made:,} new), "
        f"{summary.bytes / 1e6:,.1f} MB, {summary.failures:,} failures"
    )
    for example in summary.examples:
        click.echo(f"  {example}", err=True)
    chunks = read_header(out).chunks
    missing = sum(not chunk_path(out, number).exists() for number in range(chunks))
    if missing:
        click.echo(f"{missing:,} of {chunks:,} chunks are still to be made")
    else:
        click.echo(
            "training with these settings uses it" if is_found else f"training uses it with --cache {out}"
        )
