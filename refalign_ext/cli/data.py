"""`python -m refalign_ext data ...`: from downloads or a folder of clips to what training reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refalign_ext.cli.data_convert import convert
from refalign_ext.cli.data_options import (
    EXISTING,
    PATH,
    SHOW_DEFAULTS,
    is_helper,
    join_ranks,
    length_options,
    png_path,
    share_option,
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


@data.command("materialise", context_settings=SHOW_DEFAULTS)
@click.argument("clips", type=EXISTING)
@click.option("--out", type=PATH, required=True, help="Folder to write.")
@click.option("--pack", is_flag=True, help="Write tar shards with everything in them (webdataset layout).")
@click.option("--shard_size", type=click.IntRange(1), default=256, help="Clips of a tar shard.")
@click.option("--copy", is_flag=True, help="Copy videos instead of linking them, for another file system.")
@workers_option(2)
@share_option
def materialise_command(clips: Path, out: Path, **options: Any) -> None:
    """Cut the references of the manifest CLIPS once and for all; optionally pack everything into tar shards."""
    from refalign_ext.data.materialise.run import materialise

    tell(materialise(clips, out, **options), out)


@data.command("check", context_settings=SHOW_DEFAULTS)
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
def check_command(
    clips: Path, sheet: Path | None, samples: int, seed: int, share: Share, **options: Any
) -> None:
    """Check every row of the manifest or packed folder CLIPS; exit code 2 if there are errors."""
    from refalign_ext.atomic_io import atomic_open
    from refalign_ext.data.check.run import check
    from refalign_ext.data.sheets.contact import contact_sheet

    sheet = png_path("--sheet", sheet, clips, ".check.png")
    wait_for_ranks = join_ranks()
    result = check(clips, share=share, **options)
    click.echo(result.table())
    if samples and not share.index:
        with atomic_open(sheet) as file:
            contact_sheet(clips, samples=samples, seed=seed).save(file, format="PNG")
        click.echo(f"contact sheet: {sheet}")
    wait_for_ranks()
    if result.errors:
        click.get_current_context().exit(2)


@data.command("stats", context_settings=SHOW_DEFAULTS)
@click.argument("clips", type=EXISTING)
@click.option(
    "--out", type=PATH, help="Plot to write, and the figures beside it as .json; without it CLIPS.stats.png."
)
@length_options
@click.option(
    "--measure/--no_measure", default=True, help="Open videos whose row does not tell length and size."
)
@workers_option(2)
def stats_command(clips: Path, out: Path | None, length: Length | None, **options: Any) -> None:
    """Count clips, lengths, sizes, references and pairs of the manifest or packed folder CLIPS: a table and a plot."""
    from refalign_ext.atomic_io import write_text
    from refalign_ext.data.statistics.plot import plot_stats
    from refalign_ext.data.statistics.stats import DEFAULT_LENGTHS, collect_stats
    from refalign_ext.data.statistics.table import stats_table

    if is_helper():
        return
    out = png_path("--out", out, clips, ".stats.png")
    stats = collect_stats(clips, lengths=[length] if length else DEFAULT_LENGTHS, **options)
    click.echo(stats_table(stats))
    plot_stats(stats, out)
    write_text(out.with_suffix(".json"), stats.to_json())
    click.echo(f"wrote {out} and {out.with_suffix('.json').name}")


@data.command("cache", context_settings={**SHOW_DEFAULTS, "ignore_unknown_options": True})
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
def cache_command(out: Path | None, device: str, settings: tuple[str, ...], **options: Any) -> None:
    """Run the VAE, text encoder and teacher over a data set once, so that training does not have to.

    SETTINGS are those of the training that it is for, as train_refalign.py takes them: --data (one set), --recipe,
    --task, --ckpt_dir, --sampling.clip_variants and so on; without the last, one span of every clip is kept.
    """
    from refalign_ext.backbone import resolve_device
    from refalign_ext.config import configure
    from refalign_ext.data.cache.build import build_cache
    from refalign_ext.data.cache.files import chunk_path, default_folder, read_header
    from refalign_ext.distributed.process_group import rank_device
    from refalign_ext.encoders import task_config
    from refalign_ext.training.clip_data import sampling_of

    given = {"sampling.clip_variants": 1} | read_settings(settings)
    config = configure(given.pop("recipe", None), given | {"cache": "off"})
    if config.data is None or "," in config.data:
        raise ValueError("--data MANIFEST: name the set to cache (one; several have a cache each)")
    folder = out or default_folder(Path(config.data))
    summary = build_cache(
        config,
        config.data,
        folder,
        sampling=sampling_of(config, task_config(config)),
        device=resolve_device(rank_device(device)),
        **options,
    )
    click.echo(
        f"{folder}: {summary.rows:,} clips in {summary.made + summary.kept:,} chunks ({summary.made:,} new), "
        f"{summary.bytes / 1e6:,.1f} MB, {summary.failures:,} failures"
    )
    for example in summary.examples:
        click.echo(f"  {example}", err=True)
    chunks = read_header(folder).chunks
    missing = sum(not chunk_path(folder, number).exists() for number in range(chunks))
    if missing:
        click.echo(f"{missing:,} of {chunks:,} chunks are still to be made")
    else:
        click.echo(f"training uses it with --cache {out}" if out else "training with these settings uses it")
