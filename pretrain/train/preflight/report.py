"""A plan as text for people."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pretrain.config import TrainConfig
from pretrain.train.preflight.plan import Memory, Plan, make_plan

_GB = 1e9


def print_plan(config: TrainConfig, num_ranks: int | None = None, as_json: bool = False) -> int:
    """`dermvlp train CONFIG --plan`; the exit status is 2 for a run that cannot work."""
    plan = make_plan(config, num_ranks)
    print(json.dumps(plan.to_json(), indent=1) if as_json else "\n".join(plan_lines(plan)))
    return 2 if plan.problems else 0


def plan_lines(plan: Plan) -> Iterator[str]:
    """Sections of one kind of figure each, then what is wrong."""
    yield f"Plan of {plan.run_dir}"
    yield from _parameters(plan)
    yield from _steps(plan)
    yield from _captions(plan)
    if plan.memory is not None:
        yield from _memory(plan, plan.memory)
    yield from _traffic(plan)
    for title, messages in (
        ("Not checked", plan.not_checked),
        ("Warnings", plan.warnings),
        ("This cannot work", plan.problems),
    ):
        if messages:
            yield f"\n{title}"
            yield from (f"  - {message}" for message in messages)
    if not plan.problems:
        yield "\nNothing speaks against this run."


def _parameters(plan: Plan) -> Iterator[str]:
    if not plan.parameters:
        return
    yield "\nParameters                 trained            frozen"
    for part, count in plan.parameters.items():
        name = part if plan.knows_text_tower or part != "text" else "text (unknown)"
        if part == "text" and not plan.knows_text_tower:
            yield f"  {name:16}               ?                 ?"
        else:
            yield f"  {name:16} {count.trained:15,} {count.frozen:17,}"


def _steps(plan: Plan) -> Iterator[str]:
    batch = plan.batch
    yield "\nSteps"
    yield f"  samples            {batch.num_samples:,}"
    yield f"  steps an epoch     {batch.steps_per_epoch:,}"
    if batch.num_steps is not None:
        epochs = f", {batch.num_steps / batch.steps_per_epoch:.1f} epochs" if batch.steps_per_epoch else ""
        yield f"  steps in all       {batch.num_steps:,}{epochs}"
    yield (
        f"  images a step      {batch.global_batch_size:,} over {batch.num_ranks} rank(s): {batch.images_per_rank:g} "
        f"each, in {batch.num_parts} forward(s) of {batch.images_per_forward:g}"
    )
    if batch.order_s is not None:
        yield f"  order of an epoch  {batch.order_s:.3f} s to work out, once an epoch"


def _captions(plan: Plan) -> Iterator[str]:
    captions, tokens = plan.captions, plan.tokens
    if captions is None:
        return
    yield "\nTexts a step" + (" (scaled up: the data hold fewer samples than a batch)" if captions.is_scaled else "")
    yield f"  valid captions     {captions.captions_per_image:.2f} of {captions.num_slots} an image, over the data set"
    if not captions.captions:
        yield "  read by the terms  none"
        return
    yield (
        f"  read by the terms  {captions.captions:,.0f}, {captions.texts:,.0f} distinct, at most "
        f"{captions.max_texts_of_a_rank:,.0f} on a rank"
    )
    if tokens is None:
        yield "  tokens             not counted: see below"
        return
    yield (
        f"  tokens             {tokens.tokens:,.0f} ({tokens.tokens_per_text:.1f} a text, "
        f"{tokens.truncated_fraction:.1%} of the texts cut)"
    )
    yield f"  in the buckets     {tokens.packed_tokens:,.0f}, edges {', '.join(map(str, tokens.bucket_edges))}"
    yield (
        f"  all slots padded   {tokens.padded_tokens:,.0f}: "
        f"{tokens.padded_tokens / max(1.0, tokens.packed_tokens):.1f} times as many"
    )


def _memory(plan: Plan, memory: Memory) -> Iterator[str]:
    yield f"\nMemory of a rank in GB ({plan.batch.num_ranks} rank(s), {plan.precision}; * as configured)"
    kind = "ZeRO" if len(memory.state) > 1 else "torch"
    marks = [f"{'*' if stage == memory.stage else ''}{kind} {stage}" for stage in memory.state]
    yield f"  {'':22}" + "".join(f"{mark:>10}" for mark in marks)
    for part in memory.state[0]:
        sizes = [parts.get(part) for parts in memory.state.values()]
        if any(sizes):
            cells = (f"{'host':>10}" if size is None else f"{size / _GB:10.2f}" for size in sizes)
            yield f"  {part:22}" + "".join(cells)
    rest = {
        "activations (estimate)" if memory.counts_texts else "activations of images": memory.activation_bytes,
        "logits": memory.logits,
        "gathered features": memory.features,
    }
    for part, size in rest.items():
        yield f"  {part:22}" + f"{size / _GB:10.2f}" * len(memory.state)
    totals = "".join(f"{memory.total(stage) / _GB:10.2f}" for stage in memory.state)
    yield f"  {'sum of these':22}{totals}"
    kept = memory.activations
    yield (
        f"  activations = images of a forward x {kept.per_image / 1e6:.1f} MB + packed tokens x "
        f"{kept.per_token / 1e3:.1f} kB" + (" (in parts: the larger of the two)" if plan.batch.num_parts > 1 else "")
    )
    yield "  kept for the backward, with fused attention; workspaces, the largest temporary and fragments come on top"


def _traffic(plan: Plan) -> Iterator[str]:
    if plan.traffic is None:
        return
    if not plan.traffic:
        yield "\nCommunication a step: none, one rank"
        return
    yield "\nCommunication a step    kind             MB put in    MB sent in a ring"
    num_ranks = plan.batch.num_ranks
    for transfer in plan.traffic:
        put_in = transfer.num_elements * transfer.element_bytes / 1e6
        sent = transfer.sent_bytes(num_ranks) / 1e6
        yield f"  {transfer.what:21} {transfer.kind:14} {put_in:12,.3f} {sent:16,.3f}"
    yield f"  {'in all':36} {'':12} {sum(t.sent_bytes(num_ranks) for t in plan.traffic) / 1e6:16,.3f}"
