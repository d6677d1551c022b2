"""Everything that refalign_ext relies on in a Wan tree, and a check of it by syntax tree. Nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from refalign_ext.upstream.own_wan import is_ours
from refalign_ext.upstream.source import (
    Function,
    PlaceNotFound,
    SourceTree,
    absolute_imports,
    attributes_set,
    calls_of,
    names_of,
    outer_imports,
    parameters_of,
    required_parameters,
)

PRESENT, CHANGED, MISSING = "present", "changed", "missing"
ATTACH = "references (generation and training)"
PARALLEL = "several GPUs on one video (ulysses, ring)"
BATCHES = "batches: training, guidance in one pass"
TASKS = "the tree's own tasks and sizes"
TEXT = "its text encoder (the embedded tiny one stays ours)"
VAE = "its autoencoder (the embedded tiny one stays ours)"
TI2V = "the autoencoder of TI2V-5B"
RECOMPUTING = "--activation_checkpointing"
OPTIONAL = (PARALLEL, TI2V, RECOMPUTING)

MODEL = "wan/modules/model.py"
ARGUMENTS = (
    *("model_type", "patch_size", "text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "out_dim"),
    *("num_heads", "num_layers", "window_size", "qk_norm", "cross_attn_norm", "eps"),
)
MODEL_ATTRIBUTES = (
    *("blocks", "head", "patch_embedding", "text_embedding", "time_embedding", "time_projection", "freqs"),
    *("patch_size", "num_heads", "dim"),
)
BLOCK_ATTRIBUTES = ("self_attn", "cross_attn", "ffn", "norm1", "norm2", "norm3", "modulation")
BLOCK_FORWARD = ("x", "e", "seq_lens", "grid_sizes", "freqs", "context", "context_lens")
T5_ARGUMENTS = ("text_len", "dtype", "device", "checkpoint_path", "tokenizer_path", "shard_fn")


@dataclass(frozen=True)
class ContractEntry:
    """One thing that refalign_ext relies on.

    Attributes:
        name: what it is, with its arguments.
        state: "present", "changed" or "missing".
        cost: the feature that is lost unless it is present.
        detail: what differs.
    """

    name: str
    state: str
    cost: str
    detail: str = ""


class Contract:
    """The check of one tree; `findings` lists the outcome in the order of the files."""

    def __init__(self, root: Path) -> None:
        """Reads the tree.

        Raises:
            ValueError: if there is no `wan/`.
        """
        self.tree = SourceTree(root)
        self.findings: list[ContractEntry] = []
        self._model()
        self._blocks()
        self._parallel()
        self._configs()
        self._parts()
        self._imports()

    def costs(self) -> list[str]:
        """Features that are lost."""
        return list(dict.fromkeys(f.cost for f in self.findings if f.state != PRESENT))

    def _model(self) -> None:
        self._function("WanModel.__init__", MODEL, ARGUMENTS, ATTACH, by_name=True)
        self._function("WanModel.forward", MODEL, ("x", "t", "context", "seq_len"), ATTACH, by_name=True)
        self._attributes("WanModel", MODEL_ATTRIBUTES, ATTACH)
        self._check("WanModel.forward takes t [B]", BATCHES, self._takes_batches)

    def _blocks(self) -> None:
        self._attributes("WanAttentionBlock", BLOCK_ATTRIBUTES, ATTACH)
        self._function(
            "WanSelfAttention.forward", MODEL, ("x", "seq_lens", "grid_sizes", "freqs"), ATTACH, in_order=True
        )
        cross = "WanT2VCrossAttention.forward", "WanCrossAttention.forward"
        self._function(cross, MODEL, ("x", "context", "context_lens"), ATTACH, in_order=True)
        self._check("WanAttentionBlock adds what cross_attn returns", ATTACH, self._adds_cross_attention)

    def _parallel(self) -> None:
        self._function("WanAttentionBlock.forward", MODEL, BLOCK_FORWARD, PARALLEL, in_order=True)
        self._attributes("WanSelfAttention", ("core",), PARALLEL)
        self._attributes("WanModel", ("_supports_gradient_checkpointing",), RECOMPUTING)

    def _configs(self) -> None:
        for name in ("WAN_CONFIGS", "SIZE_CONFIGS", "SUPPORTED_SIZES"):
            self._check(name, TASKS, lambda name=name: self._is_bound("wan/configs/__init__.py", name))

    def _parts(self) -> None:
        t5 = "wan/modules/t5.py"
        self._function("T5EncoderModel.__init__", t5, T5_ARGUMENTS, TEXT, by_name=True)
        self._function("T5EncoderModel.__call__", t5, ("texts", "device"), TEXT, in_order=True)
        self._attributes("T5EncoderModel", ("model",), TEXT, file=t5)
        files = ("wan/modules/vae.py", "WanVAE"), ("wan/modules/vae2_1.py", "Wan2_1_VAE")
        self._autoencoder([pair for pair in files if pair[0] in self.tree.texts] or [files[0]], VAE)
        if "wan/modules/vae2_2.py" in self.tree.texts:
            self._autoencoder([("wan/modules/vae2_2.py", "Wan2_2_VAE")], TI2V)

    def _autoencoder(self, places: list[tuple[str, str]], cost: str) -> None:
        file, name = places[0]
        self._function(f"{name}.__init__", file, ("vae_pth", "device"), cost, by_name=True)
        self._function(f"{name}.encode", file, (None,), cost, in_order=True)
        self._function(f"{name}.decode", file, (None,), cost, in_order=True)

    def _imports(self) -> None:
        """The files that are loaded are Python and import each other relatively, so that the tree can go by another
        name than `wan`; what they import without a guard is installed here.
        """
        costs = {
            "model": ATTACH,
            "attention": ATTACH,
            "t5": TEXT,
            "tokenizers": TEXT,
            "vae": VAE,
            "vae2_1": VAE,
        }
        for name in self.tree.texts:
            folder, _, stem = name.removesuffix(".py").rpartition("/")
            cost = TASKS if folder == "wan/configs" else TI2V if stem == "vae2_2" else costs.get(stem)
            if folder not in ("wan/configs", "wan/modules") or cost is None:
                continue
            try:
                tree = self.tree.file(name).tree
            except PlaceNotFound as error:
                self.findings.append(ContractEntry(name, CHANGED, cost, str(error)))
                continue
            # Ours are imported as `wan` and may say so.
            if (lines := absolute_imports(tree)) and not is_ours(self.tree.root):
                detail = f"line {lines[0]} imports wan by name"
                self.findings.append(ContractEntry(f"relative imports in {name}", CHANGED, cost, detail))
            for library in outer_imports(tree):
                if library not in ("wan", "__future__") and find_spec(library) is None:
                    remedy = f"it is not installed here: pip install {library}"
                    self.findings.append(
                        ContractEntry(f"{library}, which {name} imports", MISSING, cost, remedy)
                    )

    def _function(
        self,
        names: str | tuple[str, ...],
        file: str,
        parameters: tuple[str | None, ...],
        cost: str,
        *,
        by_name: bool = False,
        in_order: bool = False,
    ) -> None:
        """A function that is called with these arguments and no others.

        Args:
            names: its name, or several of which one is there.
            parameters: None stands for any name.
            by_name: they are passed by name, in any order; the first of a forward too.
            in_order: they are the first ones, passed by position.
        """
        choices = (names,) if isinstance(names, str) else names
        shown = f"{choices[0]}({', '.join(parameter or '...' for parameter in parameters)})"

        def look() -> str:
            for name in choices:
                try:
                    source, node = self.tree.function(file, name)
                except PlaceNotFound:
                    if name == choices[-1]:
                        raise
                else:
                    break
            moved = "" if source.name == file else f"it is in {source.name} now; "
            return moved + _difference(node, parameters, in_order=in_order and not by_name)

        self._check(shown, cost, look)

    def _attributes(self, name: str, attributes: tuple[str, ...], cost: str, *, file: str = MODEL) -> None:
        def look() -> str:
            source, node = self.tree.locate(file, name)
            if not isinstance(node, ast.ClassDef):
                return "it is no class"
            have: set[str] = set()
            for child in node.body:
                have |= set(names_of(child))
                if isinstance(child, ast.FunctionDef):
                    have |= attributes_set(child)
            lacking = [attribute for attribute in attributes if attribute not in have]
            if len(lacking) == len(attributes):
                raise PlaceNotFound(
                    f"{source.name}, line {node.lineno}: {name} never sets {', '.join(lacking)}"
                )
            return f"it never sets {', '.join(lacking)}" if lacking else ""

        self._check(f"{name}: {', '.join(attributes)}", cost, look)

    def _check(self, name: str, cost: str, look: Callable[[], str]) -> None:
        """Runs a look, which answers with what differs, if anything."""
        try:
            detail = look()
        except PlaceNotFound as error:
            self.findings.append(ContractEntry(name, MISSING, cost, str(error)))
        else:
            self.findings.append(ContractEntry(name, CHANGED if detail else PRESENT, cost, detail))

    def _is_bound(self, file: str, name: str) -> str:
        source = self.tree.file(file)
        loaded_late = source.find("__getattr__") is not None and f'"{name}"' in source.text
        if source.find(name) is None and not loaded_late:
            raise PlaceNotFound(f"{file}: {name} is not there")
        return ""

    def _takes_batches(self) -> str:
        """Timesteps [B] of several samples are not expanded as if they were those of the tokens."""
        _, node = self.tree.function(MODEL, "WanModel.forward", ("t",))
        spread = [call for call in calls_of(node, "t.expand") if len(call.args) == 2]
        return f"line {spread[0].lineno}: it expands t as that of one sample" if spread else ""

    def _adds_cross_attention(self) -> str:
        """The block adds the result of cross_attn to the tokens, so that zeros there skip the text."""
        source, node = self.tree.function(MODEL, "WanAttentionBlock.forward")
        calls = calls_of(node, "self.cross_attn")
        if not calls:
            raise PlaceNotFound(f"{source.name}, line {node.lineno}: the block never calls self.cross_attn")
        added = [
            side
            for sum_ in ast.walk(node)
            if isinstance(sum_, ast.BinOp) and isinstance(sum_.op, ast.Add)
            for side in (sum_.left, sum_.right)
        ]
        return "" if all(call in added for call in calls) else "its result goes through something else first"


def _difference(node: Function, wanted: tuple[str | None, ...], *, in_order: bool) -> str:
    have = parameters_of(node)
    needed = [name for name in required_parameters(node) if name not in wanted]
    if in_order:
        first = have[: len(wanted)]
        fits = len(first) == len(wanted) and all(
            mine is None or mine == name for mine, name in zip(wanted, first)
        )
        needed = [name for name in needed if name not in first]
        if not fits:
            return f"line {node.lineno}: it takes ({', '.join(have)})"
    elif lacking := [name for name in wanted if name not in have]:
        return f"line {node.lineno}: it has no {', '.join(map(str, lacking))}, it takes ({', '.join(have)})"
    return f"line {node.lineno}: it also demands {', '.join(needed)}" if needed else ""
