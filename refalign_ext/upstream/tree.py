"""The tree that the Wan model comes from: this repository's `wan/`, or the official checkout that WAN_ROOT names.

Two packages cannot both be called `wan` in one process, and what a tree lacks (strict loading, solvers, writing files)
keeps coming from ours. So a checkout is imported under another name, `wan_tree`, beside ours: its modules import each
other relatively and do not notice. Its `__init__` files of the package and of `modules` are not run, because they import
every pipeline with all its dependencies; only `configs` and the modules that are asked for are. No file of it changes.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Mapping
from copy import deepcopy
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from refalign_ext.upstream.own_wan import OURS, VARIABLE

MODEL_FILE = Path("wan", "modules", "model.py")
_REMEDY = "python -m refalign_ext doctor --wan_root shows what fits, python -m refalign_ext patch apply mends what can be"

# (module, class) of the autoencoder of Wan2.1, in the order in which releases moved it; then of the one of TI2V-5B.
VAE_HOMES = (("modules.vae", "WanVAE"), ("modules.vae2_1", "Wan2_1_VAE"))
VAE_CHANNELS, NEW_VAE_CHANNELS = 16, 48
NEW_VAE_HOME = ("modules.vae2_2", "Wan2_2_VAE")


class WanTree:
    """An official checkout, imported beside this repository's `wan`.

    Attributes:
        root: its folder, which holds `wan/`.
        package: the name that it is imported under; another one gives another copy of its modules.
    """

    def __init__(self, root: str | os.PathLike[str], package: str = "wan_tree") -> None:
        """Nothing is imported yet; ValueError if there is no Wan model."""
        self.root = Path(root).expanduser().resolve()
        self.package = package
        if not (self.root / MODEL_FILE).is_file():
            raise ValueError(
                f"{VARIABLE}={root}: there is no {MODEL_FILE.as_posix()}; name the folder of a checkout that holds wan/"
            )
        for name in (package, f"{package}.modules"):
            known = sys.modules.get(name)
            folder = str(self.root.joinpath("wan", *name.split(".")[1:]))
            if known is not None and list(known.__path__) == [folder]:
                continue
            if known is not None:
                raise ValueError(
                    f"{known.__path__[0]} is already imported as {package}: one process, one tree"
                )
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [folder]
            sys.modules[name] = module_from_spec(spec)

    def module(self, name: str) -> ModuleType:
        """A module by its name below `wan`, such as "modules.model"; ValueError if it cannot be imported here."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                return importlib.import_module(f"{self.package}.{name}")
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{self.root}: wan.{name} imports {error.name}, which is not installed here: pip install what the tree "
                f"asks for ({self.root / 'requirements.txt'})"
            ) from error
        except Exception as error:  # noqa: BLE001 - foreign code may raise anything
            raise ValueError(
                f"{self.root}: wan.{name} cannot be imported here ({type(error).__name__}: {error}); {_REMEDY}"
            ) from error

    def get(self, module: str, name: str) -> Any:
        """What is called `name` in a module; ValueError if it is not there."""
        found = getattr(self.module(module), name, None)
        if found is None:
            raise ValueError(f"{self.root}: wan.{module} has no {name}; {_REMEDY}")
        return found

    def register(
        self,
        configs: Mapping[str, Any],
        sizes: Mapping[str, tuple[int, int]],
        supported: Mapping[str, tuple[str, ...]],
    ) -> tuple[dict, dict, dict]:
        """The tree's own WAN_CONFIGS, SIZE_CONFIGS and SUPPORTED_SIZES, completed in memory from ours.

        Fields that upstream keeps elsewhere and tasks that a later release dropped are filled in; what the tree says wins.
        """
        own = [self.get("configs", name) for name in ("WAN_CONFIGS", "SIZE_CONFIGS", "SUPPORTED_SIZES")]
        for task, config in configs.items():
            completed = deepcopy(config)
            completed.update(own[0].get(task, {}))
            own[0][task] = completed
        for target, source in zip(own[1:], (sizes, supported), strict=True):
            for name, value in source.items():
                target.setdefault(name, value)
        return own[0], own[1], own[2]

    def refused(self, configs: Mapping[str, Any]) -> dict[str, str]:
        """The tree's own text-to-video tasks, and the names of reference-to-video ones made from them, with the reason why
        there are none; `configs` are our own WAN_CONFIGS.
        """
        reasons = {}
        for name, config in self.get("configs", "WAN_CONFIGS").items():
            reason = refusal(config.get("boundary"), config.get("vae_stride"))
            if reason and name not in configs and name.startswith(("t2v-", "ti2v-")):
                reasons |= dict.fromkeys((name, f"r2v-{name.partition('-')[2]}"), reason)
        return reasons

    def adopt_parameters(self, model: nn.Module) -> nn.Module:
        """The tree's WanModel with the parameters, without copying them, of one of ours."""
        arguments = {name: value for name, value in model.config.items() if not name.startswith("_")}
        with torch.device("meta"):
            adopted = self.get("modules.model", "WanModel")(**arguments)
        shape = getattr(getattr(adopted, "freqs", None), "shape", None)
        if shape != model.freqs.shape:
            raise ValueError(
                f"{self.root}: WanModel.freqs has the shape {shape}, not {list(model.freqs.shape)}; {_REMEDY}"
            )
        # A plain attribute upstream, neither parameter nor buffer, hence lost on the meta device.
        adopted.freqs = model.freqs
        try:
            adopted.load_state_dict(model.state_dict(), strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{self.root}: {' '.join(str(error).split())[:300]}; {_REMEDY}") from None
        for name, parameter in adopted.named_parameters():
            parameter.requires_grad_(model.get_parameter(name).requires_grad)
        return adopted.train(model.training)

    def replacement_for(self, name: str, ours: Any) -> Any:
        """What a checkout puts in the place of a class or function of our `wan`, by its name in `refalign_ext.backbone`.

        Loading a DiT checks and reads with ours and hands the weights over. The text encoder and the autoencoder are the
        tree's in their released sizes; upstream's classes cannot be built in any other, so the tiny ones stay ours.
        """
        if name == "WanModel":
            self.require_attention()
            return self.get("modules.model", "WanModel")
        if name in ("build_dit", "load_dit"):

            def adopted(*args: Any, **options: Any) -> nn.Module:
                self.require_attention()
                return self.adopt_parameters(ours(*args, **options))

            return adopted
        if name == "T5EncoderModel":
            return self._text_encoder(ours)
        if name == "WanVAE":
            return self._autoencoder(ours)
        assert name == "describe_versions", name
        return lambda: {**ours(), "wan": str(self.root)}

    def require_attention(self) -> None:
        """Asks the tree's attention for one number, on CUDA where that is there; ValueError if it cannot answer."""
        attention = getattr(self.module("modules.model"), "flash_attention", None)
        if attention is None:
            return
        device = "cuda" if torch.cuda.is_available() else "cpu"
        q = torch.zeros(1, 1, 1, 32, dtype=torch.bfloat16, device=device)
        try:
            attention(q, q, q)
        except (AssertionError, RuntimeError, NameError) as error:
            raise ValueError(
                f"{self.root}: its attention does not run on {device} without FlashAttention here "
                f"({type(error).__name__}); run python -m refalign_ext patch apply --wan_root {self.root}"
            ) from error

    def _text_encoder(self, ours: Any) -> Any:
        def make(*args: Any, config: Mapping[str, int] | None = None, **options: Any) -> Any:
            if config is not None and config["dim"] != 4096:
                return ours(*args, config=config, **options)
            return self.get("modules.t5", "T5EncoderModel")(*args, **options)

        return make

    def _autoencoder(self, ours: Any) -> Any:
        def make(
            vae_pth: str | Path, device: torch.device | str, config: Mapping[str, Any] | None = None
        ) -> Any:
            channels = VAE_CHANNELS if config is None else config["z_dim"]
            if channels == NEW_VAE_CHANNELS:
                return TreeVAE(self.get(*NEW_VAE_HOME)(vae_pth=str(vae_pth), device=device))
            if config is not None and config["dim"] != 96:
                return ours(vae_pth=vae_pth, device=device, config=config)
            for module, name in VAE_HOMES:
                if self.root.joinpath("wan", *module.split(".")).with_suffix(".py").is_file():
                    return TreeVAE(self.get(module, name)(vae_pth=str(vae_pth), device=device))
            raise ValueError(f"{self.root}: no autoencoder of Wan2.1 under a known name; {_REMEDY}")

        return make


class TreeVAE:
    """A tree's autoencoder as refalign_ext uses it: it follows its `model` to another device and ignores autocast."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.model: nn.Module = vae.model

    @property
    def device(self) -> torch.device:
        """Where the model is now."""
        return next(self.model.parameters()).device

    def encode(self, videos: list[Tensor]) -> list[Tensor]:
        """Normalised latents [z, t, h, w] of videos [3, T, H, W] in [-1, 1]."""
        return self._call(self.vae.encode, videos)

    def decode(self, latents: list[Tensor]) -> list[Tensor]:
        """The inverse of `encode`."""
        return self._call(self.vae.decode, latents)

    def _call(self, function: Any, tensors: list[Tensor]) -> list[Tensor]:
        device = self.device
        # The tree keeps mean and scale as plain tensors where it was built.
        self.vae.scale = [value.to(device) for value in self.vae.scale]
        with torch.autocast(device.type, enabled=False):
            return function([tensor.to(device, torch.float32) for tensor in tensors])


def refusal(boundary: object, vae_stride: object) -> str | None:
    """Why no reference-to-video task is made from a text-to-video one with these fields; None if one is.

    Two experts have a `boundary` (Wan2.2 A14B); another stride belongs to another autoencoder (Wan2.2 TI2V-5B).
    """
    if boundary is not None:
        return (
            "refused as a pair: training and sampling here know one model; either expert alone goes with --task r2v-14B "
            "--dit_ckpt FOLDER/low_noise_model"
        )
    if vae_stride is not None and str(vae_stride) != "(4, 8, 8)":
        return (
            f"refused: stride {vae_stride} belongs to other latents, for which no recipe or model is released"
        )
    return None


def selected_tree() -> WanTree | None:
    """The tree that the environment asks for; None: this repository's own `wan/`."""
    root = os.environ.get(VARIABLE, "").strip()
    if root and Path(root).expanduser().resolve() != OURS:
        return WanTree(root)
    return None
