"""transformers' model in fp32, whose linears are replaced by those of one method at a time."""

import contextlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from dist_int8.checkpoint import is_int8
from dist_int8.evaluation.floating import load_floating_model
from dist_int8.evaluation.linears import Matrix
from dist_int8.evaluation.methods import METHODS
from dist_int8.int8.convert import is_skipped

SKIPPED = ("lm_head", "embed_out")


def refuse_int8(folder: str | Path, advice: str) -> None:
    """Raises ValueError for an int8 checkpoint, whose scales transformers does not know."""
    if is_int8(folder):
        raise ValueError(
            f"{folder}: must be a floating-point checkpoint for what transformers computes, got "
            f"int8 weights; take the model that they were made from: {advice}"
        )


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Hides transformers' progress bars: ours already show what there is to wait for."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


class Host:
    """A floating-point model on the CPU.

    Attributes:
        model: transformers' model, fp32.
        linears: linears that methods replace, by qualified name.
    """

    def __init__(
        self,
        folder: str | Path,
        calibration: Tensor | None = None,
        *,
        allow_pickle: bool = False,
    ) -> None:
        """Loads the model.

        Args:
            folder: folder of the model.
            calibration: token ids, int64 [tokens], for the methods that need activations.
            allow_pickle: whether to take `pytorch_model.bin` where there is no safetensors file.

        Raises:
            ValueError: transformers cannot load the folder in floating point.
        """
        refuse_int8(folder, "name it, or --methods ours --layer-tokens 0")
        try:
            with without_bars():
                self.model: Any = load_floating_model(
                    folder, torch.float32, allow_pickle=allow_pickle
                ).eval()
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{folder}: must be a model that transformers loads in floating point, got: "
                f"{reason}; name another, or --methods ours --reference none --layer-tokens 0"
            ) from None
        self.linears: dict[str, nn.Linear] = {
            name: child
            for name, child in self.model.named_modules()
            if type(child) is nn.Linear and not is_skipped(name, SKIPPED)
        }
        self._calibration = calibration
        self._layers: dict[str, dict[str, nn.Module]] = {}

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """Weights and their int8 forms, shared by the methods, by name of the linear."""
        return {name: Matrix(linear) for name, linear in self.linears.items()}

    def layers(self, method: str) -> dict[str, nn.Module]:
        """Returns the layers of a method by name of the linear; they are made once."""
        made = METHODS[method]
        assert made.linear is not None, "a method in transformers"
        if method not in self._layers:
            if made.calibrated:
                self._calibrate()
            self._layers[method] = {
                name: made.linear(matrix) for name, matrix in self.matrices.items()
            }
        return self._layers[method]

    def forget(self, methods: Iterable[str]) -> None:
        """Frees the layers of methods that are finished."""
        for method in methods:
            self._layers.pop(method, None)

    @contextlib.contextmanager
    def computing(self, method: str) -> Iterator[None]:
        """Makes `model` compute with the method within the context."""
        self._put(self.layers(method))
        try:
            yield
        finally:
            self._put(self.linears)

    @torch.inference_mode()
    def logits(self, token_ids: Tensor) -> Tensor:
        """Computes logits, fp32 [batch, tokens, vocab], of token ids [batch, tokens]."""
        return self.model(token_ids, use_cache=False).logits

    def _put(self, layers: dict[str, Any]) -> None:
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer)

    @torch.inference_mode()
    def _calibrate(self) -> None:
        """Records the largest magnitude of every input feature over the calibration text."""
        if all(matrix.absmax is not None for matrix in self.matrices.values()):
            return
        assert self._calibration is not None and len(self._calibration)

        def note(matrix: Matrix, x: Tensor) -> None:
            absmax = x.reshape(-1, x.shape[-1]).abs().amax(0)
            matrix.absmax = (
                absmax if matrix.absmax is None else torch.maximum(matrix.absmax, absmax)
            )

        hooks = [
            linear.register_forward_pre_hook(
                lambda module, arguments, matrix=self.matrices[name]: note(matrix, arguments[0])
            )
            for name, linear in self.linears.items()
        ]
        for ids in self._calibration.split(self._calibration_window):
            self.logits(ids[None])
        for hook in hooks:
            hook.remove()

    @property
    def _calibration_window(self) -> int:
        return min(512, getattr(self.model.config, "max_position_embeddings", None) or 512)
