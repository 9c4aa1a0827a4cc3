"""The gradient that a start looks at, by plain transformers and autograd, record by record."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from launch.data.order import DataOrder
from launch.data.prepare import load_tokenizer_of, prepare_data
from launch.options.train_options import parse_options
from tests.helpers.training import Place


def mean_gradients(place: Place, *, steps: int, targets: list[str]) -> dict[str, Tensor]:
    """∂L/∂W [out, in] by module name: L is the mean over the batches of each one's mean loss per target token."""
    options = parse_options(place.arguments("unused", val_size=0))
    examples = prepare_data(options, load_tokenizer_of(options)).train
    order = DataOrder(len(examples), options.batch_size, options.seed, None)
    model = AutoModelForCausalLM.from_pretrained(place.model)
    for step in range(1, steps + 1):
        rows = [examples[int(index)] for index in order.indices(step)]
        losses = [_loss(model, row.input_ids, row.labels) for row in rows]
        count = sum(int((torch.as_tensor(row.labels[1:]) >= 0).sum()) for row in rows)
        (torch.stack(losses).sum() / (count * steps)).backward()
    return {
        name: module.weight.grad
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in targets and module.weight.grad is not None
    }


def _loss(model: torch.nn.Module, ids: object, labels: object) -> Tensor:
    tokens, wanted = torch.as_tensor(ids)[None].long(), torch.as_tensor(labels).long()
    logits = model(input_ids=tokens).logits[0, :-1]
    return F.cross_entropy(logits, wanted[1:], reduction="sum", ignore_index=-100)
