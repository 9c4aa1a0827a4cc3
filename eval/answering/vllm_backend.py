"""Answers through vLLM, where it is installed: its public API, greedy decoding, the adapter as its version takes it."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.tasks import TASKS
from eval.answering.batching import Batch
from eval.items import Item, TaskItems
from eval.options import Options
from eval.parsing import read_answer
from eval.predictions import Prediction
from eval.protocols import MAX_NEW_TOKENS
from flexlora_ds.base_model.fingerprint import other_base_doubt
from flexlora_ds.base_model.model_folder import model_folder
from flexlora_ds.base_model.source import locate, one_line_errors
from flexlora_ds.errors import UserError
from flexlora_ds.exports.checks import check_update
from flexlora_ds.exports.padding import padded, server_rank
from flexlora_ds.peft_format import require_finite_adapter, write_adapter
from flexlora_ds.peft_reading.plain import read_peft_adapter

_DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_READS_PATTERNS = (0, 33)
"""The first vLLM that goes by `rank_pattern` and `alpha_pattern` (its `lora/peft_helper.py`)."""
_AT_ONCE = 1 << 18  # prompt tokens per call: vLLM makes its own batches of them


@dataclass
class VllmEngine:
    """A running vLLM: its `LLM`, the arguments of every request, and the folder of the adapter it serves."""

    llm: Any
    sampling: Any
    lora: Any
    context: int
    dtype: str
    version: str
    folder: Any = field(default=None, repr=False)
    doubts: tuple[str, ...] = ()
    """What the adapter's configuration says to no effect."""

    def generate(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], stop: list[str]) -> list[str]:
        """The greedy continuation of each prompt, to the first of the `stop` strings (kept in the text)."""
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        params = [
            self.sampling(temperature=0.0, max_tokens=n, stop=stop, include_stop_str_in_output=True)
            for n in limits
        ]
        answers = self.llm.generate(requests, params, lora_request=self.lora, use_tqdm=False)
        return [answer.outputs[0].text for answer in answers]


class VllmAnswerer:
    """Answers batches by the protocol `generate`."""

    def __init__(self, engine: VllmEngine, tasks: dict[str, TaskItems]) -> None:
        self._engine = engine
        self._tasks = tasks

    def fits(self, item: Item) -> bool:
        """Whether the prompt and the longest answer fit the model's context."""
        return self._free_positions(item) >= item.longest_candidate

    def cost(self, item: Item) -> int:
        """Tokens of the prompt."""
        return len(item.prompt)

    def default_tokens(self) -> int:
        """How many tokens a batch may hold."""
        return _AT_ONCE

    def answer(self, batch: Batch) -> list[Prediction]:
        """One prediction per item."""
        stop = TASKS[batch.task].pattern.split("|")
        limits = [min(MAX_NEW_TOKENS, self._free_positions(item)) for item in batch.items]
        texts = self._engine.generate([item.prompt for item in batch.items], limits, stop)
        return [self._prediction(item, text) for item, text in zip(batch.items, texts, strict=True)]

    def _free_positions(self, item: Item) -> int:
        return self._engine.context - len(item.prompt)

    def _prediction(self, item: Item, text: str) -> Prediction:
        question = item.question
        answer = read_answer(self._tasks[question.task].pattern, text)
        return Prediction(question.task, question.index, question.prompt_hash, text, answer, question.answer)


def start_vllm(options: Options) -> VllmEngine:
    """Start vLLM with a model and an adapter. UserError for what it cannot do, or where it is not installed."""
    _require(options)
    source = locate(options.model)
    with one_line_errors(source, "model"):
        model_folder(source, "model")
    import vllm
    from vllm.lora.request import LoRARequest

    arguments: dict[str, Any] = {
        "model": options.model,
        "dtype": _DTYPES[options.dtype],
        "load_format": "safetensors",
        "trust_remote_code": False,
    }
    folder, lora = None, None
    doubts: tuple[str, ...] = ()
    if options.adapter is not None:
        adapter = read_peft_adapter(Path(options.adapter))
        rank = server_rank(max(matrix.rank for matrix in adapter.matrices.values()))
        if rank is None:
            raise UserError(
                f"the ranks of {options.adapter} are above what vLLM allows",
                "--backend vllm",
                "merge it with python -m flexlora_ds.export --to merged",
            )
        require_finite_adapter(adapter, options.adapter)
        doubts = (*adapter.doubts, *other_base_doubt(adapter.base_model, options.model))
        served = Path(options.adapter)
        if not _reads_patterns(vllm.__version__):
            folder = tempfile.TemporaryDirectory(prefix="eval-uniform-")
            served = Path(folder.name) / "adapter"
            write_adapter(served, padded(adapter))
            check_update(adapter, served).require(served)
        arguments |= {"enable_lora": True, "max_lora_rank": rank}
        lora = LoRARequest("adapter", 1, str(served.absolute()))
    llm = vllm.LLM(**arguments, enable_prefix_caching=True)
    config = llm.llm_engine.model_config
    dtype = str(config.dtype).removeprefix("torch.")
    return VllmEngine(
        llm, vllm.SamplingParams, lora, int(config.max_model_len), dtype, vllm.__version__, folder, doubts
    )


def _reads_patterns(version: str) -> bool:
    """Whether this vLLM takes an adapter of mixed ranks as it is; a version without numbers does not."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) >= _READS_PATTERNS


def _require(options: Options) -> None:
    if options.mode != "generate":
        raise UserError(
            f"--backend vllm serves --mode generate, not {options.mode}",
            mend="leave --backend out for the others",
        )
    if options.merge or options.model.endswith(".gguf"):
        what = "--merge" if options.merge else "a .gguf file"
        raise UserError(
            f"--backend vllm does not take {what}",
            mend="make a folder with python -m flexlora_ds.export --to merged",
        )
    if options.adapter is not None and not (Path(options.adapter) / "adapter_config.json").is_file():
        raise UserError(
            f"no adapter folder {options.adapter}", "--adapter", "--backend vllm needs a local one"
        )
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed", "--backend vllm", "pip install vllm, or leave --backend out")
