"""Settings of one generation: how tokens are chosen and when an answer ends."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from dist_int8.config.checked import Checked, Count, NonEmpty, listed

MIN_TEMPERATURE = 1e-3  # logits divided by less overflow


class GenerationSettings(Checked):
    """Describes how tokens are chosen: greedily, unless `temperature` > 0 or `do_sample`."""

    max_new_tokens: Count = Field(
        default=64,
        description="Maximum number of tokens in an answer.",
        examples=[64],
    )
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Divisor of the logits before sampling; 0, the default, is greedy (with "
        "do_sample the default is 1.0).",
        examples=[0.7],
    )
    do_sample: bool | None = Field(
        default=None,
        description="Sample instead of taking the most probable token; by default if temperature "
        "> 0.",
        examples=[True],
    )
    top_k: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="Sample among the k most probable tokens; 0, the default, is all of them.",
        examples=[50],
    )
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Sample among the most probable tokens that together reach this probability.",
        examples=[0.9],
    )
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=1.0,
        description="Divisor of the positive logits of tokens seen before, and factor of the "
        "negative ones.",
        examples=[1.1],
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        default=None,
        description="Seed of the random numbers; the same seed gives the same answer.",
        examples=[0],
    )
    stop: Annotated[list[NonEmpty], BeforeValidator(listed)] = Field(
        default=[],
        description="String that ends an answer and is not part of it; several may be given.",
        examples=[["\n\n"]],
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.do_sample and self.temperature == 0:
            raise ValueError(
                "temperature: temperature must be above 0 when do_sample is true, got 0; "
                "raise it or leave do_sample out"
            )
        if self.temperature and self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature: temperature must be 0 or at least {MIN_TEMPERATURE}, got "
                f"{self.temperature}; 0 takes the most probable token"
            )
        return self

    @property
    def sampling(self) -> bool:
        """Whether tokens are drawn at random instead of taking the most probable one."""
        return self.do_sample if self.do_sample is not None else bool(self.temperature)

    @property
    def sampling_temperature(self) -> float:
        """The divisor of the logits when sampling."""
        return self.temperature or 1.0

    @classmethod
    def from_generation_config(cls, generation_config: Any, overrides: Mapping[str, Any]) -> Self:
        """Reads a transformers GenerationConfig; `overrides` that are not None win over it.

        Settings of other decoding methods (beams, contrastive search, ...) are refused by name.
        """
        source = "generation_config"
        values: dict[str, Any] = {}
        if generation_config is not None:
            given = generation_config.to_dict()
            for name, harmless in _UNSUPPORTED_DECODING.items():
                if given.get(name) not in harmless:
                    raise ValueError(
                        f"{source}:{name}: {name} must be left out, got {given[name]!r}; "
                        "only greedy decoding and sampling are supported"
                    )
            values = {
                name: given[name]
                for name in cls.model_fields
                if name not in ("seed", "stop") and given.get(name) is not None
            }
            if given.get("stop_strings"):
                values["stop"] = given["stop_strings"]
            if not values.get("do_sample", False) and "temperature" not in overrides:
                values.pop("temperature", None)
        chosen = {name: value for name, value in overrides.items() if value is not None}
        if "temperature" in chosen and "do_sample" not in chosen:
            values.pop("do_sample", None)
        return cls.from_values(values | chosen, source if generation_config else "generate()")


_UNSUPPORTED_DECODING: dict[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None,),
    "typical_p": (None, 1.0),
    "min_p": (None,),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1.0),
}
