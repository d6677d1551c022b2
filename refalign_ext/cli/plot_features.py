"""`python -m refalign_ext plot-features`: how well a model's reference tokens are told apart, in pictures and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from refalign_ext.cli.settings import Numbers
from refalign_ext.tasks import TASKS


class Blocks(Numbers):
    """`all` (None) or numbers of blocks."""

    name = "blocks"

    def __init__(self) -> None:
        super().__init__(int)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value in (None, "all") else super().convert(value, param, ctx)


_EXISTING = click.Path(path_type=Path, exists=True)


@click.command("plot-features", context_settings={"show_default": True})
@click.option("--task", default="r2v-tiny", help="A reference-to-video task.")
@click.option("--ckpt_dir", type=_EXISTING, help="Checkpoint folder; r2v-tiny has its own.")
@click.option("--dit_ckpt", type=_EXISTING, help="Another DiT than the folder's, such as a checkpoint.")
@click.option("--compare", type=_EXISTING, help="A second DiT to show beside it, such as one without RA.")
@click.option("--labels", help="Names of the two (or the one) in pictures: 'with RA,without RA'.")
@click.option(
    "--ref",
    "references",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A picture; give it twice or more. r2v-tiny without pictures: clips of subjects held out from its training.",
)
@click.option("--prompt", default="", help="Goes with --ref.")
@click.option("--timestep", "timesteps", type=Numbers(), default="750", help="Noise levels up to 1000.")
@click.option("--blocks", type=Blocks(), default="all", help="all, or numbers from 0 such as 0,4,8.")
@click.option("--tap", type=click.Choice(["block", "self_attn"]), default="block", help="Where in a block.")
@click.option("--clips", type=click.IntRange(1), default=16, help="Sprite clips; the first one is drawn.")
@click.option("--subjects", type=click.IntRange(2, 3), default=3, help="Subjects of a sprite clip.")
@click.option("--views", type=click.IntRange(1), default=4, help="Views of each sprite subject.")
@click.option("--frame_num", type=click.IntRange(1), help="Frames of --ref's video; fewer are faster.")
@click.option("--most_tokens", type=click.IntRange(2), default=400, help="Of each reference.")
@click.option("--seed", type=click.IntRange(0), default=1000)
@click.option("--device", default="auto", help="cpu, cuda, mps or auto.")
@click.option("--dtype", type=click.Choice(["auto", "bf16", "fp32"]), default="auto")
@click.option("--out", type=click.Path(path_type=Path), default=Path("outputs/features"), help="Folder.")
def plot_features(
    task: str,
    ckpt_dir: Path | None,
    dit_ckpt: Path | None,
    compare: Path | None,
    labels: str | None,
    out: Path,
    **settings: Any,
) -> None:
    """Draw reference tokens by t-SNE and PCA, block by block, and measure how well references are told apart.

    Three figures per block, of tokens' directions: the variance between references over that within them; how often the
    nearest other token is of the same reference; and, for sprites, how often the nearest token in other views is of the
    same subject. Tokens whose patch is white are left out and counted.
    """
    from refalign_ext.evaluation.feature_plots import PlotRequest
    from refalign_ext.evaluation.feature_plots import plot_features as draw
    from refalign_ext.sprites.feature_samples import sprite_samples

    folder = ckpt_dir or TASKS[task].bundled
    if folder is None:
        raise ValueError(
            f"--task {task} needs --ckpt_dir FOLDER with the Wan2.1 checkpoint (docs/real_weights.md)"
        )
    paths = [dit_ckpt, compare] if compare else [dit_ckpt]
    names = labels.split(",") if labels else [(path or folder).name for path in paths]
    if not labels and len(set(names)) < len(names):
        names = ["/".join((path or folder).parts[-2:]) for path in paths]
    if len(names) != len(paths) or len(set(names)) < len(names):
        raise ValueError(f"--labels: {len(paths)} different names are needed, with a comma between them")
    request = PlotRequest(
        task=task, ckpt_dir=folder, checkpoints=dict(zip(names, paths, strict=True)), **settings
    )
    entry = draw(request, out, make_samples=sprite_samples)
    for name, levels in entry["checkpoints"].items():
        for timestep, blocks in levels.items():
            click.echo(f"{name}, noise level {timestep}")
            for block, figures in blocks.items():
                shown = [
                    f"{metric} {figure['mean']:.3f} (chance {figure['chance']:.3f})"
                    for metric, figure in figures.items()
                    if figure is not None
                ]
                click.echo(f"  block {block:>2s}  {'  '.join(shown)}")
    count = entry["tokens"]
    click.echo(
        f"{count['kept']} of {count['total']} tokens; left out: {count['white']} white, {count['thinned']} to thin out"
    )
    click.echo(f"wrote {out / 'features.json'} and a picture for each noise level")
