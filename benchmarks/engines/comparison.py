"""All engines with one model, in turn: each stays loaded, one works at a time.

Every answer becomes a record at once, so a run that was interrupted goes on where it stopped.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.catalogue import CELLS, ENGINES
from engines.install import HERE, python_of
from engines.process import EngineProcess, Neighbours
from gpu.records import Records

MOST_FAILURES = 2  # of an engine to load or in a cell, before it is left out of all or of this
NUM_CHECKED = 8  # tokens of an answer that are compared with transformers'


@dataclass(frozen=True)
class Conditions:
    """What a figure was measured under.

    Attributes:
        folder: what `--setup` filled.
        threads: of each engine.
        neighbours: processes that keep a core busy meanwhile.
        pinned: whether a neighbour stays on its core.
        num_tokens: new tokens per sequence of a decode cell.
        limit_s: longest answer of an engine.
    """

    folder: Path
    threads: int
    neighbours: int
    pinned: bool
    num_tokens: int
    limit_s: float

    def key(self) -> list[Any]:
        """What has to be equal for a record to count."""
        return [self.threads, self.neighbours, self.pinned, self.num_tokens]


class Comparison:
    """The engines of one model.

    Args:
        words: token ids of a text, from which all prompts are cut.
    """

    def __init__(
        self, model: str, conditions: Conditions, records: Records, words: list[int]
    ) -> None:
        self.model, self.conditions, self.records, self.words = model, conditions, records, words
        self._processes: dict[str, EngineProcess] = {}
        self._warm: set[tuple[str, str]] = set()
        self._known = self._read("figure")
        self._failures: Counter[tuple[str, str]] = Counter()  # of this call; the next tries again
        self._reference: list[list[int]] | None = None

    def _read(self, kind: str) -> list[dict[str, Any]]:
        key = self.conditions.key()
        return [
            record
            for record in self.records.mine(kind)
            if record["model"] == self.model and record["conditions"] == key
        ]

    def _add(self, kind: str, **fields: Any) -> dict[str, Any]:
        fields = {"model": self.model, "conditions": self.conditions.key(), **fields}
        self.records.add(kind, **fields)
        return fields

    def has(self, engine: str, cell: str, repeat: int) -> bool:
        """Whether there is nothing left to do."""
        if MOST_FAILURES in (self._failures[engine, cell], self._failures[engine, "load"]):
            return True
        return any(
            (one["engine"], one["cell"], one["repeat"]) == (engine, cell, repeat)
            for one in self._known
        )

    def cell(self, name: str) -> dict[str, Any]:
        """What an engine is asked: prompts of 32 tokens to decode, one long one to prefill."""
        kind, size = CELLS[name]
        if kind == "prefill":
            return {"prompts": [self.words[:size]], "num_tokens": 1}
        prompts = [self.words[i : i + 32] for i in range(size)]
        return {"prompts": prompts, "num_tokens": self.conditions.num_tokens}

    def measure(self, engine: str, cell: str, repeat: int) -> dict[str, Any] | None:
        """Asks one engine for one cell; its first call of a cell only warms up.

        Returns:
            The record of a figure or a failure; None if there was one already.
        """
        if self.has(engine, cell, repeat):
            return None
        process, answer = self._process(engine), {}
        if "error" in process.loaded:
            answer = process.loaded
            self._failures[engine, "load"] += 1
        else:
            asked = self.cell(cell)
            if (engine, cell) not in self._warm:
                answer = process.ask(asked, self.conditions.limit_s)
                self._warm.add((engine, cell))
            if "error" not in answer:
                with Neighbours(self.conditions.neighbours, self.conditions.pinned):
                    answer = process.ask(asked, self.conditions.limit_s)
        if "error" in answer:
            self._failures[engine, cell] += 1
            return self._add("failure", engine=engine, cell=cell, error=answer["error"])
        figure = {"tokens_per_s": answer[CELLS[cell][0]], "seconds": answer["seconds"]}
        record = self._add("figure", engine=engine, cell=cell, repeat=repeat, **figure)
        self._known.append(record)
        return record

    def _process(self, name: str) -> EngineProcess:
        """The engine's process, started if there is none."""
        process = self._processes.get(name)
        if process is not None and process.is_alive:
            return process
        self._warm = {pair for pair in self._warm if pair[0] != name}
        process = self._processes[name] = self._start(name)
        if "error" not in process.loaded:
            agreement = self._agreement(process)
            memory = process.resident_bytes()
            self._add("loaded", engine=name, resident_bytes=memory, **agreement, **process.loaded)
        return process

    def _start(self, name: str) -> EngineProcess:
        engine, folder = ENGINES[name], self.conditions.folder
        command = [
            str(python_of(folder, engine.environment)),
            str(HERE / engine.script),
            str(folder / "models" / (self.model + engine.source)),
            f"--threads={self.conditions.threads}",
            f"--variant={engine.variant}",
        ]
        log = folder / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        return EngineProcess(command, log, 2 * self.conditions.limit_s)

    def _answers(self, process: EngineProcess) -> list[list[int]]:
        """What an engine answers to three prompts, each alone."""
        prompts = [self.words[i : i + 32] for i in (0, 11, 29)]
        asked = [{"prompts": [prompt], "num_tokens": NUM_CHECKED} for prompt in prompts]
        answers = [process.ask(cell, self.conditions.limit_s) for cell in asked]
        return [answer["token_ids"][0] if "token_ids" in answer else [] for answer in answers]

    def _agreement(self, process: EngineProcess) -> dict[str, Any]:
        """Compares greedy answers with transformers' in fp32.

        Returns:
            equal_answers: how many of the three are the same throughout; agreement: the mean
            share of their tokens before the first that differs.
        """
        if self._reference is None:
            reference = self._start("transformers-fp32")
            self._reference = self._answers(reference) if reference.is_alive else []
            reference.end()
        shares = []
        for ours, theirs in zip(self._answers(process), self._reference, strict=False):
            pairs = list(zip(ours, theirs, strict=False))
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
            shares.append(same / NUM_CHECKED)
        return {
            "equal_answers": shares.count(1.0),
            "agreement": sum(shares) / len(shares) if shares else None,
        }

    def end(self) -> None:
        """Ends all engines."""
        for process in self._processes.values():
            process.end()
