"""Settings of one generation: how tokens are chosen and when an answer ends."""

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from dist_int8.config.checked import Checked, Count, NonEmpty, listed
from dist_int8.config.generation_fields import lay_over, read_fields

MIN_TEMPERATURE = 1e-3  # logits divided by less overflow


def _list_ids(value: object) -> object:
    return [value] if type(value) is int else listed(value)


def _list_lists(value: object) -> object:
    return [listed(item) for item in value] if isinstance(value, list | tuple) else value


def _list_biases(value: object) -> object:
    """Turns {(5, 6): -1.0} of transformers, or [[[5, 6], -1.0]] of a file, into a list of pairs."""
    pairs: object = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple):
        return value
    return [
        (_list_ids(pair[0]), pair[1]) if isinstance(pair, list | tuple) and len(pair) == 2 else pair
        for pair in pairs
    ]


def _pair(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Size = Annotated[int, Field(ge=0)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], BeforeValidator(_list_ids)]
Sequence = Annotated[list[TokenId], Field(min_length=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Cutoff = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(lt=float("inf"))]  # -inf forbids


class GenerationSettings(Checked):
    """Describes how tokens are chosen: greedily, unless `temperature` > 0 or `do_sample`.

    Names and meanings are those of transformers' GenerationConfig where it has them. Fields that
    are not given come from the model's generation_config.json (`model_defaults`).
    """

    max_new_tokens: Count = Field(
        default=64,
        description="Maximum number of tokens in an answer.",
        examples=[64],
    )
    max_length: Count | None = Field(
        default=None,
        description="Maximum number of tokens of prompt and answer together, instead of "
        "max_new_tokens; if both are given, that counts.",
        examples=[256],
    )
    min_new_tokens: Size | None = Field(
        default=None,
        description="Number of tokens before which no end token (of eos_token_id or "
        "stop_token_ids) is chosen.",
        examples=[8],
    )
    min_length: Size | None = Field(
        default=None,
        description="The same for prompt and answer together; min_new_tokens wins over it.",
        examples=[32],
    )
    max_time: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Seconds after which an answer ends with the token that is being computed.",
        examples=[30.0],
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
    top_k: Size | None = Field(
        default=None,
        description="Sample among the k most probable tokens; 0, the default, is all of them.",
        examples=[50],
    )
    top_p: Share | None = Field(
        default=None,
        description="Sample among the most probable tokens that together reach this probability.",
        examples=[0.9],
    )
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Sample among tokens whose probability is at least this share of the largest.",
        examples=[0.05],
    )
    top_h: Share | None = Field(
        default=None,
        description="Sample among the most probable tokens within this share of the entropy.",
        examples=[0.4],
    )
    typical_p: Share | None = Field(
        default=None,
        description="Sample among the locally typical tokens that together reach this probability.",
        examples=[0.95],
    )
    epsilon_cutoff: Cutoff | None = Field(
        default=None,
        description="Sample among tokens of at least this probability.",
        examples=[0.0003],
    )
    eta_cutoff: Cutoff | None = Field(
        default=None,
        description="Sample among tokens of at least this probability, or less where many are "
        "probable (eta sampling).",
        examples=[0.0003],
    )
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=1.0,
        description="Divisor of the positive logits of tokens seen before, and factor of the "
        "negative ones.",
        examples=[1.1],
    )
    presence_penalty: Penalty = Field(
        default=0.0,
        description="What is subtracted from the logits of tokens that are in the answer already, "
        "-2 to 2.",
        examples=[0.5],
    )
    frequency_penalty: Penalty = Field(
        default=0.0,
        description="What is subtracted from the logit of a token per time that it is in the "
        "answer already, -2 to 2.",
        examples=[0.2],
    )
    no_repeat_ngram_size: Size = Field(
        default=0,
        description="Number of tokens in a row that never come twice; 0 is no limit.",
        examples=[3],
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        default=None,
        description="Seed of the random numbers; the same seed gives the same answer. Of several "
        "prompts each has the seed of the one before it plus 1.",
        examples=[0],
    )
    stop: Annotated[list[NonEmpty], BeforeValidator(listed)] = Field(
        default=[],
        description="String that ends an answer and is not part of it; several may be given.",
        examples=[["\n\n"]],
    )
    stop_token_ids: TokenIds = Field(
        default=[],
        description="Token id that ends an answer, as its last token; several may be given.",
        examples=[[2]],
    )
    eos_token_id: (
        Annotated[list[Annotated[int, Field(ge=-1)]], BeforeValidator(_list_ids)] | None
    ) = Field(
        default=None,
        description="End-of-sequence tokens, one or a list, instead of the model's; -1 is none.",
        examples=[[2]],
    )
    ignore_eos: bool = Field(
        default=False,
        description="Go on after an end-of-sequence token.",
        examples=[True],
    )
    suppress_tokens: TokenIds = Field(
        default=[], description="Token ids that are never chosen.", examples=[[5, 6]]
    )
    begin_suppress_tokens: TokenIds = Field(
        default=[],
        description="Token ids that are not chosen as the first of an answer.",
        examples=[[5]],
    )
    bad_words_ids: Annotated[list[Sequence], BeforeValidator(_list_lists)] = Field(
        default=[],
        description="Sequences of token ids that never appear in an answer as a whole.",
        examples=[[[5, 6], [7]]],
    )
    sequence_bias: Annotated[
        list[tuple[Annotated[Sequence, BeforeValidator(_list_ids)], Bias]],
        BeforeValidator(_list_biases),
    ] = Field(
        default=[],
        description="What is added to the logit of the last token of a sequence where its other "
        "tokens came before: pairs of token ids and bias, or a dict.",
        examples=[[[[5], -1.0], [[6, 7], 2.0]]],
    )
    forced_bos_token_id: TokenId | None = Field(
        default=None,
        description="First token of the answer to a prompt of one token.",
        examples=[1],
    )
    forced_eos_token_id: TokenIds = Field(
        default=[],
        description="Last token of an answer that has no room for another; the most probable of "
        "several.",
        examples=[[2]],
    )
    exponential_decay_length_penalty: (
        Annotated[
            tuple[Size, Annotated[Finite, Field(gt=0)]],
            BeforeValidator(_pair),
        ]
        | None
    ) = Field(
        default=None,
        description="Number of tokens after which end tokens become more probable, and the factor "
        "per token.",
        examples=[[20, 1.05]],
    )
    remove_invalid_values: bool = Field(
        default=False,
        description="Take logits that are NaN as 0 and infinite ones as the largest number, "
        "instead of failing.",
        examples=[True],
    )
    model_defaults: bool = Field(
        default=True,
        description="Take settings that are not given from the model's generation_config.json.",
        examples=[False],
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
        limited = "max_new_tokens" in self.model_fields_set
        if limited and (self.min_new_tokens or 0) > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: min_new_tokens must be at most max_new_tokens "
                f"({self.max_new_tokens}), got {self.min_new_tokens}; lower it or raise "
                "max_new_tokens"
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

    def count_new_tokens(self, num_prompt_tokens: int) -> int:
        """Counts the tokens that the answer to a prompt may have; below 1 where there is no room.

        The context limits it as well.
        """
        if "max_new_tokens" in self.model_fields_set:
            return self.max_new_tokens
        if self.max_length is not None:
            return self.max_length - num_prompt_tokens
        return max(self.max_new_tokens, self.min_new_tokens or 0)

    def over(self, defaults: Mapping[str, Any]) -> Self:
        """These settings, with `defaults` (as `read_fields` gives them) where nothing was given."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return self.from_generation_config(None, given, defaults)

    @classmethod
    def from_generation_config(
        cls,
        generation_config: Any,
        overrides: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        source: str | None = None,
    ) -> Self:
        """Reads a transformers GenerationConfig; `overrides` that are not None win over it.

        Args:
            generation_config: a GenerationConfig of transformers, or None.
            overrides: values by name.
            defaults: of the model's generation_config.json; what neither of the others says.
            source: how errors begin; by default it follows from what is given.

        Raises:
            ValueError: a field that cannot be honoured, by name, or a wrong value.
        """
        source = source or ("generate()" if generation_config is None else "generation_config")
        given = {} if generation_config is None else read_fields(generation_config, source)
        chosen = {name: value for name, value in overrides.items() if value is not None}
        below = {} if chosen.get("model_defaults") is False else dict(defaults or {})
        return cls.from_values(lay_over(below | given, chosen), source)
