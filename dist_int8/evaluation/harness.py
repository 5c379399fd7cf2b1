"""A model for lm-evaluation-harness that does what its own `hf` model does, over a pipeline.

Importing this module registers it as `dist_int8`; `python -m dist_int8.evaluation` is the harness's
command line with it. Texts are tokenized, truncated from the left,
started and stopped as `lm_eval.models.huggingface.HFLM` does with a causal model, so that the same
weights give the same scores. There is no padding, because micro-batches have none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from dist_int8.api.load import load
from dist_int8.api.model import Model
from dist_int8.config import GenerationSettings
from dist_int8.engine import Request
from dist_int8.models import load_config

__all__ = ["PipelineLM", "cli_evaluate"]

SEED = 1234  # of sampled answers; the harness's default
MAX_GEN_TOKS = 256  # where a task does not say; the harness's default
_SAMPLING = ("temperature", "do_sample", "top_k", "top_p", "repetition_penalty", "seed")

Answer = tuple[float, bool]  # log-probability of a continuation, and whether it is the greedy one
_Encoded = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context, continuation


class _Score:
    """Log-probabilities of a continuation, filled in as the logits of its row of inputs arrive.

    Args:
        continuation: token ids that the end of the row predicts.
        num_inputs: length of the row; its last position predicts the last token.
    """

    def __init__(self, continuation: list[int], num_inputs: int) -> None:
        self.targets = torch.tensor(continuation)
        self.first = num_inputs - len(continuation)  # position that predicts the first token
        self.logs = torch.zeros(len(continuation))
        self.greedy = torch.zeros(len(continuation), dtype=torch.bool)

    def add(self, start: int, logits: Tensor) -> None:
        """Adds logits, fp32 [tokens, vocab], of the positions from `start`."""
        begin, end = max(start, self.first), start + len(logits)
        if begin >= end:
            return
        rows = torch.log_softmax(logits[begin - start :], dim=-1)
        where = slice(begin - self.first, end - self.first)
        self.logs[where] = rows.gather(1, self.targets[where, None])[:, 0]
        self.greedy[where] = rows.argmax(-1) == self.targets[where]

    @property
    def answer(self) -> Answer:
        return float(self.logs.sum()), bool(self.greedy.all())


@register_model("dist_int8")
class PipelineLM(TemplateLM):
    """A pipelined model as the harness sees it.

    Args:
        pretrained: handle, or the folder or hub id of a model to load.
        max_length: maximum number of tokens of context and continuation. The default is that of
            `hf`, the length in the model's config (2,048 where it has none), limited to the length
            that the handle was loaded for.
        progress: whether to show progress bars.
        batch_size, max_batch_size: passed by the harness to every model and ignored: the pipeline
            forms its own micro-batches.
        device: the one device of a model to load, where the settings have no `devices`.
        **settings: settings of `dist_int8.load`, for a model to load.

    Raises:
        ValueError: as `dist_int8.load`, or the model has no tokenizer.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: Model | str | Path,
        *,
        max_length: int | None = None,
        progress: bool = True,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if device is not None:
            if "devices" in settings:
                raise ValueError(
                    f"harness: device must not be given beside devices, got {device!r}; "
                    "leave it out"
                )
            settings["devices"] = [device]
        if not isinstance(pretrained, Model):
            pretrained = load(pretrained, progress=progress, **settings)
        elif settings:
            raise ValueError(
                f"harness: settings must not be given with a handle, got {', '.join(settings)}; "
                "give them to dist_int8.load"
            )
        self.handle = pretrained
        self.quiet = not progress
        self.tokenizer = pretrained.tokenizer
        if self.tokenizer is None:
            raise ValueError(
                f"harness: {pretrained.folder} must have a tokenizer, got none; add its files"
            )
        config = load_config(pretrained.folder)
        longest = max_length or resolve_max_length(config, self.tokenizer)
        self.max_length = min(longest, pretrained.max_tokens)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Token that stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encodes a text, without special tokens if it already begins with the first of them."""
        if add_special_tokens is None:
            begun = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
            special = {"add_special_tokens": False} if begun else {}
        else:
            special = {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Computes log-probabilities of continuations, and whether each is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self.quiet)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Computes log-probabilities of whole texts, in windows as long as the context."""
        counts, encoded = [], []
        for request in requests:
            windows = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            counts.append(len(windows))
            encoded += [(None, *window) for window in windows]
        answers = iter(self._loglikelihood_tokens(encoded, disable_tqdm or self.quiet))
        totals = [sum(next(answers)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[_Encoded], disable_tqdm: bool = False, **_: Any
    ) -> list[Answer]:
        """Scores continuations; requests that differ only in their last token share a pass."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, (_texts, context, continuation) in enumerate(requests):
            assert context and 0 < len(continuation) <= self.max_length
            row = (context + continuation)[-(self.max_length + 1) :][:-1]  # truncated from the left
            rows.setdefault(tuple(row), []).append(number)
        scores = [
            [_Score(requests[number][2], len(row)) for number in numbers]
            for row, numbers in rows.items()
        ]
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Continuations") as bar:
            for index, start, logits in self.handle.iter_logits(list(rows)):
                for score in scores[index]:
                    score.add(start, logits)
                bar.update(len(scores[index]) if start == 0 else 0)
        answers: list[Answer] = [(0.0, False)] * len(requests)
        for numbers, found in zip(rows.values(), scores, strict=True):
            for number, score in zip(numbers, found, strict=True):
                answers[number] = score.answer
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates answers, each up to the first of its stop strings or the end of text."""
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stops, running = [], []
        for number, request in enumerate(requests):
            context, given = request.args
            options = normalize_gen_kwargs(given, MAX_GEN_TOKS)
            stops.append(handle_stop_sequences(options.pop("until", None), eos=end))
            running.append(self._request(number, context, options, stops[-1]))
        quiet = disable_tqdm or self.quiet
        with tqdm(total=len(requests), disable=quiet, desc="Answers") as bar:
            for token in self.handle.run(running):
                bar.update(token.finish_reason is not None)
        answers = []
        for request, answered, until in zip(requests, running, stops, strict=True):
            text = self.tokenizer.decode(
                self._until_end(answered.token_ids), skip_special_tokens=True
            )
            answers.append(postprocess_generated_text(text, stop=until, think_end_token=None))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _request(
        self, number: int, context: str, options: dict[str, Any], until: list[str]
    ) -> Request:
        num_new = options.pop("max_gen_toks")
        most = self.max_length - num_new
        if most < 1:
            raise ValueError(
                f"harness: max_gen_toks must be below the context of {self.max_length} tokens, got "
                f"{num_new}; lower it in the task's generation_kwargs"
            )
        if unknown := [name for name in options if name not in _SAMPLING]:
            raise ValueError(
                f"harness: generation_kwargs must be among until, max_gen_toks, "
                f"{', '.join(_SAMPLING)}, got {', '.join(unknown)}; leave it out"
            )
        begun = has_bos_prefix(context, self.tokenizer.bos_token)
        special = {"add_special_tokens": False} if begun else {}
        token_ids = list(self.tokenizer(context, **special).input_ids)[-most:]
        options.setdefault("seed", SEED)
        if not options["do_sample"]:  # the other settings do not change the most likely token
            penalty = options.get("repetition_penalty")
            options = {"do_sample": False, "temperature": 0.0, "repetition_penalty": penalty}
        settings = GenerationSettings.from_generation_config(
            None,  # the handle adds the model's own
            options | {"max_new_tokens": num_new, "stop": [stop for stop in until if stop]},
        )
        return self.handle.request(token_ids or [self.prefix_token_id], settings, number)

    def _until_end(self, token_ids: list[int]) -> list[int]:
        """Drops what follows the end-of-text token, if the model itself ends with another token."""
        if self.eot_token_id in token_ids:
            return token_ids[: token_ids.index(self.eot_token_id)]
        return token_ids
