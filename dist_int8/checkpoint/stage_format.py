"""The form in which a stage holds its parameters."""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from dist_int8.int8.convert import swap_linears
from dist_int8.models.decoder import DecoderStage
from dist_int8.models.spec import ModelSpec
from dist_int8.models.stage_slice import StageSlice


@dataclass(frozen=True)
class StageFormat:
    """The form in which a stage holds its parameters; an int8 checkpoint decides some of it.

    Attributes:
        dtype: dtype of floating parameters and of hidden states. With float32, embedding and head
            keep a 16-bit dtype that they are stored in.
        int8: False: keep every linear in `dtype`, including what is stored in int8.
        outlier_rule: rule of the `Int8Linear` layers.
        outlier_threshold: threshold of that rule.
        rotation: requested block size of the rotation of their inputs. Linears that are stored in
            int8 have their own.
        skip: linears that stay floating, by name component. An int8 checkpoint has its own list.
        embedding_int8: hold the token embedding in int8 (with `int8`). An int8 checkpoint has
            decided this.
        max_tokens: longest sequence to prepare positions for; None: the model's own limit.
    """

    dtype: torch.dtype = torch.float32
    int8: bool = True
    outlier_rule: str = "absolute"
    outlier_threshold: float = 6.0
    rotation: int = 0
    skip: Collection[str] = ("lm_head",)
    embedding_int8: bool = False
    max_tokens: int | None = None

    def make_empty_stage(self, spec: ModelSpec, stage_slice: StageSlice) -> DecoderStage:
        """Makes a stage of this form with every parameter on the meta device.

        Raises:
            ValueError: blocks or max_tokens beyond the model, or an unknown rule.
        """
        stage = DecoderStage.empty(spec, stage_slice, self.dtype, self.max_tokens)
        if self.int8:
            swap_linears(
                stage,
                outlier_threshold=self.outlier_threshold,
                outlier_rule=self.outlier_rule,
                skip=self.skip,
                rotation=self.rotation,
            )
            if self.embedding_int8:
                stage.make_embedding_int8()
        return stage
