"""Everything that refalign_ext relies on in a Wan tree, and a check of it by syntax tree. Nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from refalign_ext.upstream.model_source import BLOCK, FORWARD, MODEL
from refalign_ext.upstream.own_wan import is_ours
from refalign_ext.upstream.source import (
    PlaceNotFound,
    SourceTree,
    attributes_set,
    calls_of,
    defaults_of,
    imported_packages,
    names_of,
    parameters_of,
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

ARGUMENTS = (
    *("model_type", "patch_size", "text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "out_dim"),
    *("num_heads", "num_layers", "window_size", "qk_norm", "cross_attn_norm", "eps"),
)
MODEL_ATTRIBUTES = (
    *("blocks", "head", "patch_embedding", "text_embedding", "time_embedding", "time_projection", "freqs"),
    *("patch_size", "num_heads", "dim"),
)
BLOCK_ATTRIBUTES = ("self_attn", "cross_attn", "ffn", "norm1", "norm2", "norm3", "modulation")
T5_ARGUMENTS = ("text_len", "dtype", "device", "checkpoint_path", "tokenizer_path", "shard_fn")


@dataclass(frozen=True)
class ContractEntry:
    """One thing that refalign_ext relies on, whether it is there, and the feature that is lost unless it is."""

    name: str  # with its arguments
    state: str  # PRESENT, CHANGED or MISSING
    cost: str
    detail: str = ""  # what differs


class Contract:
    """The check of one tree; `findings` lists the outcome in the order of the files."""

    def __init__(self, root: Path) -> None:
        self.tree = SourceTree(root)
        self.findings: list[ContractEntry] = []
        by_position = partial(self._function, in_order=True)
        self._function("WanModel.__init__", MODEL, ARGUMENTS, ATTACH)
        self._function("WanModel.forward", MODEL, FORWARD, ATTACH)
        self._attributes("WanModel", MODEL, MODEL_ATTRIBUTES, ATTACH)
        self._check("WanModel.forward takes t [B]", BATCHES, self._takes_batches)

        self._attributes("WanAttentionBlock", MODEL, BLOCK_ATTRIBUTES, ATTACH)
        by_position("WanSelfAttention.forward", MODEL, ("x", "seq_lens", "grid_sizes", "freqs"), ATTACH)
        cross, later = "WanT2VCrossAttention.forward", "WanCrossAttention.forward"
        by_position(cross, MODEL, ("x", "context", "context_lens"), ATTACH, later_name=later)
        self._check("WanAttentionBlock adds what cross_attn returns", ATTACH, self._adds_cross_attention)
        by_position("WanAttentionBlock.forward", MODEL, BLOCK, PARALLEL)
        self._attributes("WanSelfAttention", MODEL, ("core",), PARALLEL)
        self._attributes("WanModel", MODEL, ("_supports_gradient_checkpointing",), RECOMPUTING)

        for name in ("WAN_CONFIGS", "SIZE_CONFIGS", "SUPPORTED_SIZES"):
            self._check(name, TASKS, lambda name=name: self._is_bound("wan/configs/__init__.py", name))

        t5 = "wan/modules/t5.py"
        self._function("T5EncoderModel.__init__", t5, T5_ARGUMENTS, TEXT)
        by_position("T5EncoderModel.__call__", t5, ("texts", "device"), TEXT)
        self._attributes("T5EncoderModel", t5, ("model",), TEXT)
        homes = [("wan/modules/vae.py", "WanVAE", VAE), ("wan/modules/vae2_1.py", "Wan2_1_VAE", VAE)]
        homes = [home for home in homes if home[0] in self.tree.texts][:1] or homes[:1]
        if "wan/modules/vae2_2.py" in self.tree.texts:
            homes.append(("wan/modules/vae2_2.py", "Wan2_2_VAE", TI2V))
        for file, name, cost in homes:
            self._function(f"{name}.__init__", file, ("vae_pth", "device"), cost)
            by_position(f"{name}.encode", file, (None,), cost)
            by_position(f"{name}.decode", file, (None,), cost)
        self._imports()

    def costs(self) -> list[str]:
        """Features that are lost."""
        return list(dict.fromkeys(f.cost for f in self.findings if f.state != PRESENT))

    def _imports(self) -> None:
        """The files that are loaded are Python and import each other relatively, so that the tree can go by another
        name than `wan`; what they import without a guard is installed here.
        """
        modules = {"model": ATTACH, "attention": ATTACH, "t5": TEXT, "tokenizers": TEXT}
        modules |= {"vae": VAE, "vae2_1": VAE, "vae2_2": TI2V}
        for name in self.tree.texts:
            folder, _, stem = name.removesuffix(".py").rpartition("/")
            cost = TASKS if folder == "wan/configs" else modules.get(stem)
            if folder not in ("wan/configs", "wan/modules") or cost is None:
                continue
            try:
                tree = self.tree.file(name).tree
            except PlaceNotFound as error:
                self.findings.append(ContractEntry(name, CHANGED, cost, str(error)))
                continue
            # Ours are imported as `wan` and may say so.
            lines = [node.lineno for node in ast.walk(tree) if "wan" in imported_packages(node)]
            if lines and not is_ours(self.tree.root):
                detail = f"line {lines[0]} imports wan by name"
                self.findings.append(ContractEntry(f"relative imports in {name}", CHANGED, cost, detail))
            # Imports inside `try` are guarded.
            for library in sorted(set().union(*map(imported_packages, tree.body))):
                if library not in ("wan", "__future__") and find_spec(library) is None:
                    what, remedy = f"{library}, which {name} imports", f"pip install {library}"
                    self.findings.append(
                        ContractEntry(what, MISSING, cost, f"it is not installed here: {remedy}")
                    )

    def _function(
        self,
        name: str,
        file: str,
        parameters: tuple[str | None, ...],
        cost: str,
        *,
        in_order: bool = False,
        later_name: str = "",
    ) -> None:
        """A function that is called with these arguments (None: of any name) and no others."""

        def look() -> str:
            try:
                source, node = self.tree.function(file, name)
            except PlaceNotFound:
                source, node = self.tree.function(file, later_name or name)
            have = parameters_of(node)
            given = have[: len(parameters)] if in_order else [each for each in parameters if each in have]
            expected = [mine or other for mine, other in zip(parameters, given)]
            if len(given) < len(parameters) or given != expected:
                return f"line {node.lineno}: it takes ({', '.join(have)})"
            moved = "" if source.name == file else f"it is in {source.name} now; "
            needed = [each for each in have if each not in given and each not in defaults_of(node)]
            return moved + (f"line {node.lineno}: it also demands {', '.join(needed)}" if needed else "")

        shown = ", ".join(parameter or "..." for parameter in parameters)
        self._check(f"{name}({shown})", cost, look)

    def _attributes(self, name: str, file: str, attributes: tuple[str, ...], cost: str) -> None:
        def look() -> str:
            source, node = self.tree.locate(file, name)
            if not isinstance(node, ast.ClassDef):
                return "it is no class"
            have: set[str] = set()
            for child in node.body:
                have |= {*names_of(child), *attributes_set(child)}
            lacking = ", ".join(attribute for attribute in attributes if attribute not in have)
            if have.isdisjoint(attributes):
                raise source.changed(node, f"{name} never sets {lacking}")
            return f"it never sets {lacking}" if lacking else ""

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
            raise source.changed(node, "the block never calls self.cross_attn")
        added = [
            side
            for sum_ in ast.walk(node)
            if isinstance(sum_, ast.BinOp) and isinstance(sum_.op, ast.Add)
            for side in (sum_.left, sum_.right)
        ]
        return "" if all(call in added for call in calls) else "its result goes through something else first"
