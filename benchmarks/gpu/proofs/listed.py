"""All proofs: the cheapest and most important of each lane first."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.proofs import engines, gradient, kernels, programs, resuming
from benchmarks.gpu.proofs.proof import Proof

CHANGES = "tests/distributed/test_rank_changes.py::"
DROPOUT = "tests/library/test_dropout_apply.py::"
INTERPRETED = "tests/launch/test_interpreted_kernels.py::"
GRADIENT = "tests/distributed/test_gradient_growth.py::"


def proofs() -> list[Proof]:
    """In the order in which each lane runs them."""
    return [*_kernels(), *_changes(), *_gradient(), *_memory(), *_replays(), *_programs()]


def _kernels() -> Iterator[Proof]:
    name = "the compiled dropout's bits are the written mask's and a CPU's"
    test = INTERPRETED + "test_the_triton_kernel_drops_what_the_mask_drops"
    yield Proof(name, test, kernels.dropout_bits, "here")
    name, test = "dropout inside a compiled graph drops what the written mask drops", DROPOUT
    test += "test_a_graph_drops_what_the_mask_drops"
    yield Proof(name, test, kernels.dropout_in_graphs, "here", seconds=10)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"losses in chunks are those of full logits, {kernels.short(dtype)}"
        test = "tests/launch/test_head_loss.py::test_losses_and_gradients_are_those_of_cross_entropy"
        yield Proof(name, test, partial(kernels.chunked_head, dtype), "here")
    name = "gradients looked at together are judged as one by one"
    test = "tests/distributed/test_gradient_checks.py::test_the_norm_is_deepspeeds_own"
    yield Proof(name, test, kernels.gradient_checks, "here")
    for attention, dtype in (
        ("sdpa", torch.float32),
        ("sdpa", torch.bfloat16),
        ("varlen", torch.bfloat16),
        ("flash-attn", torch.bfloat16),
    ):
        name = f"packed examples compute what padded ones do: {attention}, {kernels.short(dtype)}"
        test = "tests/launch/test_packed.py::test_losses_and_gradients_are_the_padded_ones"
        yield Proof(name, test, partial(kernels.packed, attention, dtype), "here", seconds=4)


def _changes() -> Iterator[Proof]:
    for dtype in ("fp32", "bf16", "fp16"):
        for stage in engines.STAGES:
            name = f"stage {stage} in {dtype} trains as plain torch"
            test = CHANGES + "test_ranks_and_losses_are_those_of_plain_torch"
            prove = partial(engines.against_plain_torch, stage, dtype)
            yield Proof(name, test, prove, tiny=stage != 0 and (stage, dtype) != (3, "bf16"))
    name = "gradients copied together train as those copied one by one"
    test = "tests/distributed/test_gradient_buckets.py::test_losses_ranks_and_masters_are_deepspeeds"
    yield Proof(name, test, engines.together)
    for stage in engines.STAGES:
        name, test = f"stage {stage}: an empty plan changes no bit", "test_an_empty_plan_changes_nothing"
        yield Proof(name, CHANGES + test, partial(engines.empty_plan, stage), seconds=3, tiny=stage == 2)
    for stage in engines.STAGES:
        name = f"stage {stage}: every state of every survivor is exact"
        test = CHANGES + "test_every_state_of_every_survivor_is_carried_exactly"
        yield Proof(name, test, partial(engines.survivors, stage), tiny=stage == 3)
    for stage in (0, 3):
        name, test = (
            f"stage {stage}: growth leaves the function as it is",
            "test_expansion_leaves_the_function_as_it_is",
        )
        yield Proof(name, CHANGES + test, partial(engines.growth, stage), tiny=stage == 3)


def _gradient() -> Iterator[Proof]:
    for stage in engines.STAGES:
        name = f"stage {stage}: a start from the gradient gives the pairs of the whole gradient"
        test = "tests/distributed/test_gradient_start.py::test_one_process"
        yield Proof(name, test, partial(gradient.start, stage), tiny=stage == 3)
    name = "directions from the gradient are the top pairs of the whole gradient, at every stage"
    test = GRADIENT + "test_the_new_direction_is_the_top_pair_of_the_whole_gradient"
    yield Proof(name, test, gradient.directions, seconds=6)
    name = "the market's prices are what autograd says, at every stage"
    yield Proof(name, GRADIENT + "test_the_market_prices_what_autograd_says", gradient.prices, seconds=6)


def _memory() -> Iterator[Proof]:
    name, test = (
        "stage 3: a change while fetches are in flight",
        "test_a_change_at_stage_3_never_gathers_the_base",
    )
    yield Proof(name, CHANGES + test, engines.busy, "memory", seconds=12)
    for stage in (3, 2):
        name = f"stage {stage}: 100 changes leave allocated and reserved memory flat"
        test = CHANGES + "test_200_changes_grow_no_memory"
        yield Proof(name, test, partial(engines.memory, stage), "memory", seconds=10)
    for stage in (2, 3):
        name = f"stage {stage}: the optimizer on the host trains as on the device"
        test = "tests/distributed/test_offload.py::test_the_optimizer_on_the_host_trains_as_on_the_device"
        yield Proof(name, test, partial(programs.offload, stage), "memory", seconds=4, tiny=stage == 2)


def _replays() -> Iterator[Proof]:
    name = "replayed layers compute what compiled ones do, over rank changes"
    test = (
        "tests/distributed/test_replayed_layers.py::test_replayed_layers_train_bit_for_bit_as_computed_ones"
    )
    yield Proof(name, test, programs.replayed, "memory", seconds=40)
    name = "a recording that fails leaves the card as it was"
    test = "tests/launch/test_layer_stack.py::test_what_cannot_be_recorded_is_computed"
    yield Proof(name, test, kernels.broken_recording, "here")


def _programs() -> Iterator[Proof]:
    name = "compiled layers compute what plain ones do, and rank changes compile nothing"
    test = "tests/distributed/test_compiled_blocks.py::"
    test += "test_every_layer_runs_one_graph_that_no_rank_change_compiles_again"
    yield Proof(name, test, programs.compiled, "programs", seconds=40, tiny=False)
    name = "Liger's kernels compute what the base does"
    test = INTERPRETED + "test_ligers_kernels_compute_what_the_base_does"
    yield Proof(name, test, programs.liger, "programs", seconds=6)
    name = "a resumed run is the run, bit for bit"
    test = "tests/distributed/test_resume.py::test_same_configuration_continues_bit_for_bit"
    yield Proof(name, test, resuming.resumed, "programs", seconds=20)
    for stage in (2, 3):
        name = f"stage {stage}: two processes on one card over gloo are one"
        test = CHANGES + "test_ranks_and_losses_are_those_of_plain_torch"
        yield Proof(name, test, partial(programs.pair, stage), "pair", seconds=8, tiny=stage == 2)
