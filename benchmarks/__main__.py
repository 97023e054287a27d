"""Runs every benchmark: `python -m benchmarks`."""

from benchmarks import (
    demo,
    feed,
    loop,
    loss_scaling,
    metrics,
    objectives,
    phantom,
    plan_table,
    retrieval,
    weights,
)

phantom.main()
weights.main()
feed.main()
demo.main()
objectives.main()
loop.main()
loss_scaling.main()
metrics.main()
plan_table.main()
retrieval.main()
